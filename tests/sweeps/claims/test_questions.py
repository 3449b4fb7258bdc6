"""Answers to the three questions of the front page, from stored results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from sweeps.claims.__main__ import main
from sweeps.claims.claim import Claim
from sweeps.claims.pages import answers, part
from sweeps.claims.read import read_claim
from sweeps.report.names import arm_names
from tests.sweeps.claims.fixture_claims import claim_of, output_of

GAIN = "equivalent_gain_600k"


def entry(arm: str, effect: float | None, **more: Any) -> dict[str, Any]:
    measure = {"tag": "val/bits_per_byte", "solved": None, "last": None, "part": "total"}
    base = {"arm": arm, "against": None, "side": "below", "by": 1, "effect": effect, "why": ""}
    base |= {"low": None, "high": None, "n": 0, "verdict": "undecided", "own": None, "other": None}
    return {**base, "measure": {**measure, "curve": ["a", "b"]}, **more}


def result(claim: Claim, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    arms = {arm: {"overrides": claim.overrides(arm), "seeds": {}} for arm in claim.arms}
    made = {"digest": claim.digest, "predictions": predictions, "arms": arms}
    return {**made, "verdict": "undecided", "predicted_in": "d" * 40, "unfinished": []}


def test_gains_answer_what_a_module_is_worth(tmp_path: Path) -> None:
    claim = read_claim(GAIN)
    predictions = [
        entry("sequential", None, why="sequential at seed 1: out of range: its loss"),
        entry("parallel", 0.8125, n=1),
        entry("top", 0.75, low=0.7, high=0.8, n=5, verdict="holds"),
    ]
    effect = {**entry("top", 1)["measure"], "part": "effect"}
    predictions += [
        {**prediction, "measure": effect, "effect": 0.9, "low": 0.8, "high": 1.1}
        for prediction in predictions
    ]
    small = read_claim("equivalent_gain_200k_long")
    pairs = [(small, None), (claim, result(claim, predictions))]
    text = answers(pairs, tmp_path)
    assert "main prediction?** It depends on the head at 0.6 M weights." in text
    assert (
        "\n| weights | | sequential modules | parallel heads | top head |\n|---|---|---|---|---|\n"
        "| 0.6 M | gain | out of range | 0.812 × (1 of 5 seeds) "
        "| 0.750 × [0.700, 0.800] |\n|  | effect of a step | 0.900 × [0.800, 1.100] (0 of 5 seeds) "
        in text
    )
    assert "over seeds. 0.2 M is predicted and not measured yet." in text
    assert f"](results/{GAIN}.svg)" in text and "plan?" not in text
    chinese = part(pairs, "README.zh-CN.md", tmp_path)
    assert "| 0.6 M | 增益 | 超出范围 | 0.812 ×" in chinese
    assert f"](results/{GAIN}.svg)" in chinese and "0.2 M 已写下预测" in chinese
    for verdict, answer in (("holds", "Less than it costs"), ("does not hold", "More than")):
        alike = [{**prediction, "verdict": verdict} for prediction in predictions]
        assert f"?** {answer}" in answers([(claim, result(claim, alike))], tmp_path)
        other_side = [{**prediction, "side": "above"} for prediction in alike]
        assert f"?** {answer}" not in answers([(claim, result(claim, other_side))], tmp_path)
    # One seed at a larger size changes neither the answer nor the picture.
    of_small = [{**p, "n": 5, "verdict": "holds"} for p in predictions]
    one_seed = [{**p, "n": 1, "verdict": "undecided"} for p in predictions]
    text = answers([(small, result(small, of_small)), (claim, result(claim, one_seed))], tmp_path)
    assert "?** Less than it costs" in text and "| 0.6 M | gain |" in text
    assert f"](results/{small.label}.svg)" in text and f"{GAIN}.svg" not in text
    # The growth of every head's gain.
    growth = read_claim("gain_growth_600k")
    grown = entry("sequential_600k", 1.5, low=1.2, high=1.8, n=5, verdict="does not hold")
    grown = [grown, {**grown, "arm": "parallel_600k", "verdict": "undecided"}]
    both = [(claim, result(claim, predictions)), (growth, result(growth, grown))]
    text = answers(both, tmp_path)
    assert "the gain of sequential modules is 1.500 × [1.200, 1.800] that at 0.2 M." in text
    assert "parallel heads is 1.500 × [1.200, 1.800] that at 0.2 M, undecided.\n" in text
    assert "串行模块的增益是 0.2 M 时的 1.500 × [1.200, 1.800]。" in (
        part(both, "README.zh-CN.md", tmp_path)
    )
    # A claim that was changed after its runs has no numbers.
    assert answers([(claim, {**result(claim, predictions), "digest": "other"})], tmp_path) == ""


def test_without_results_there_is_no_answer(tmp_path, capsys):
    assert answers([(claim_of(tmp_path), None)], tmp_path) == ""
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.claims.__main__.answers", lambda *_: "\n")
        main(["questions", "--root", str(tmp_path)])
    assert "answers one of the three questions has a result" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "jinja2" else find_spec(name)
    )
    message = output_of(capsys, "questions", "--root", tmp_path, code=1)
    assert "a page of claims needs the package jinja2" in message


def test_shares_of_seeds_answer_which_heads_teach_to_plan(tmp_path: Path) -> None:
    """Heads above the plain model or a level are named once; heads below are not."""
    claim = read_claim("planning_seeds")

    def share(count: int, n: int = 20) -> dict[str, Any]:
        return {"count": count, "n": n, "rate": count / n, "low": 0.0, "high": 1.0}

    def solving(arm: str, against: str | None, side: str, n: int = 20, **more: Any) -> Any:
        shares = {"own": share(8, n), "other": None if against is None else share(0, n)}
        measure = {**entry(arm, 0.4)["measure"], "curve": None, "solved": 0.95}
        facts = {"against": against, "side": side, "verdict": "holds", "n": n, "measure": measure}
        return {**entry(arm, 0.4), **facts, **shares, **more}

    arms = list(claim.arms)
    plain = next(a for a in arms if "mtp=none" in claim.overrides(a))
    first, second, third = [a for a in arms if a != plain][:3]
    predictions = [
        solving(first, None, "above"),
        solving(second, plain, "above"),
        solving(second, first, "below"),
        solving(third, second, "above"),
        solving(plain, None, "below"),
    ]
    made = result(claim, predictions)
    text = answers([(claim, made)], tmp_path)
    names = arm_names({a: claim.overrides(a) for a in arms})
    assert f"beyond noise: {names[first]}, {names[second]}. The" in text
    few = [solving(first, None, "above", n=19)]  # of 20
    assert "| 8 of 19 (20 planned) |" in answers([(claim, {**made, "predictions": few})], tmp_path)
