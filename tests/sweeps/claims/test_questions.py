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


def test_how_fast_a_real_model_writes(tmp_path: Path) -> None:
    """Where little is stored: test_result.py compares docs/results.md with all that is."""
    row = {"kind": "code", "temperature": 0.0, "tokens": 96, "drafts_1": {"over_plain_cpu": 1.2}}
    measured_speeds(tmp_path, [row], options={"new_tokens": 32})
    assert "one processor: code 1.20 × (3 texts per kind, no interval)." in answers([], tmp_path)


def test_nothing_is_said_without_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers([(claim_of(tmp_path), None)], tmp_path) == ""
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.claims.__main__.block", lambda *_, **_options: "\n")
        main(["questions", "--root", str(tmp_path)])
    assert "answers one of the three questions has a result" in capsys.readouterr().err
