"""The three questions of the front page, from results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeps.claims.__main__ import main
from sweeps.claims.claim import Claim
from sweeps.claims.pages import answers
from sweeps.claims.read import read_claim
from tests.sweeps.claims.fixture_claims import claim_of, measured_speeds

GAIN = "equivalent_gain_600k"


def entry(arm: str, effect: float | None, **more: Any) -> dict[str, Any]:
    measure = {"tag": "val/bits_per_byte", "solved": None, "last": None, "part": "total"}
    base = {"arm": arm, "against": None, "side": "below", "by": 1, "effect": effect, "why": ""}
    base |= {"low": None, "high": None, "n": 0, "verdict": "undecided", "own": None, "other": None}
    return {**base, "measure": {**measure, "curve": ["a", "b"]}, **more}


def result(claim: Claim, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    return {"digest": claim.digest, "predictions": predictions, "arms": {}}


def test_what_a_module_is_worth(tmp_path: Path) -> None:
    claim = read_claim(GAIN)
    found = [
        entry("sequential", None, why="sequential at seed 1: out of range: its loss"),
        entry("parallel", 0.8125, n=1),
        entry("top", 0.75, low=0.7, high=0.8, n=5, verdict="holds"),
        entry("top", 0.9, measure={**entry("top", 1)["measure"], "part": "effect"}),
    ]
    small = read_claim("equivalent_gain_200k_long")
    text = answers([(small, None), (claim, result(claim, found))], tmp_path, to="../")
    assert (
        "0.2 M: not run yet; 0.6 M: sequential modules out of range (undecided, 0 seeds of 5), "
        in text
    )
    assert "parallel heads 0.812 × (undecided, 1 seed of 5), " in text
    assert "top head 0.750 × [0.700 ×, 0.800 ×] (5 seeds)." in text
    assert f"](../results/{GAIN}.svg)" in text and "plan?" not in text
    # What was changed since has no numbers.
    stale = {**result(claim, found), "digest": "other"}
    text = answers([(claim, stale)], tmp_path)
    assert "0.6 M: not run yet." in text and "svg" not in text


def test_whether_it_teaches_to_plan(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, "planning_seeds")
    share = {"count": 4, "n": 4, "low": 0.4, "high": 1.0, "rate": 1.0}
    none = {"count": 0, "n": 5, "low": 0.0, "high": 0.5, "rate": 0.0}
    solved = {**entry("mtp", 1)["measure"], "solved": 0.95, "curve": []}
    entries = [entry("mtp", 1, against="plain", own=share, other=none, measure=solved)]
    text = answers([(claim, result(claim, entries))], tmp_path)
    planned = f", {len(claim.scale.seeds)} planned" if len(claim.scale.seeds) > 4 else ""
    assert (
        f"no MTP 0 of 5 seeds [0 %, 50 %]; sequential modules 4 of 4 seeds [40 %, 100 %]{planned}."
        in text
    )


@pytest.mark.parametrize("llama", [None, 60.5])
def test_how_fast_a_real_model_writes(tmp_path: Path, llama: float | None) -> None:
    row: dict[str, Any] = {"kind": "code", "temperature": 0.0, "tokens": 256}
    row |= {"plain": {"tokens_per_cpu_second": 34.51}}
    row |= {"drafts_1_of_4096": {"tokens_per_cpu_second": 47.0, "over_plain_cpu": 1.362}}
    if llama:
        row["llama.cpp"] = {"tokens_per_cpu_second": llama}
    measured_speeds(tmp_path, [row, {**row, "temperature": 1.0}])
    text = answers([], tmp_path)
    said = ", llama.cpp 60.5" if llama else ""
    of = "(4 texts per kind, no interval)"
    assert f"code 1.36 × (47.0 tokens per CPU second, plain 34.5{said}) {of}." in text


def test_drafts_of_the_text_are_a_line_of_their_own(tmp_path: Path) -> None:
    ways = {"plain": 1.0, "drafts_1": 1.2, "drafts_of_both": 1.45}
    row: dict[str, Any] = {"kind": "code", "temperature": 0.0, "tokens": 128}
    row |= {way: {"tokens_per_cpu_second": 30.0, "over_plain_cpu": x} for way, x in ways.items()}
    options = {"new_tokens": 64, "lookup": 8}
    measured_speeds(tmp_path, [row], processor="One", options=options)
    text = answers([], tmp_path)
    assert "One: code 1.20 ×" in text and "One, lookup=8: code 1.45 ×" in text
    assert text.count("(2 texts per kind, no interval)") == 2


def test_nothing_is_said_without_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers([(claim_of(tmp_path), None)], tmp_path) == ""
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.claims.__main__.block", lambda *_, **_options: "\n")
        main(["questions", "--root", str(tmp_path)])
    assert "answers one of the three questions has a result" in capsys.readouterr().err
