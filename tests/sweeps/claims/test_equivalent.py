"""Claims about compute-equivalent gains, and arms that start from runs of other arms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.errors import UserError
from sweeps.claims import words
from sweeps.claims.claim import Claim
from sweeps.claims.decide import FAILS, HOLDS, UNDECIDED, decide
from sweeps.claims.jobs import jobs
from sweeps.claims.observe import ArmRun, Arms
from sweeps.claims.result import make_result
from sweeps.claims.reuse import shared_runs
from sweeps.claims.run import _ready, _with_parents
from sweeps.report.statistics import ratio_interval
from tests.sweeps.claims.fixture_claims import BEGAN, claim_of, finished_run, predict

TAG = "val/bits_per_byte"
PLAIN = {"short": 0.5, "middle": 1.0, "long": 2.0}
GAIN = {"equivalent": TAG, "curve": list(PLAIN)}
EFFECT = {**GAIN, "part": "effect"}
RUNS = Path("/nowhere/runs")


def gain_claim(folder: Path, predictions: list[dict[str, Any]], **changes: Any) -> Claim:
    arms = {
        "trunk": ["mtp=none", "optimizer/schedule=wsd", "optimizer.schedule.kind=constant"],
        **{name: ["mtp=none", "optimizer/schedule=wsd", "branch_from=trunk@9"] for name in PLAIN},
        "heads": ["mtp=sequential"],
        "large": ["mtp=sequential", "model.n_layers=3"],
    }
    content = {"arms": arms, "measure": GAIN, "predictions": predictions, "equal": "nothing"}
    return claim_of(folder, **{**content, **changes})


def run(flops: float, loss: float, *, steps: float) -> ArmRun:
    costs = {"flops": flops, "step": steps, "seconds": 1.0}
    return finished_run("x", values={TAG: loss}, costs=costs)


def law(flops: float, seed: int) -> float:
    return 1 + 0.01 * seed + flops**-0.3


def arms_of(effects: dict[str, list[float]], price: float = 0.8) -> Arms:
    """Plain runs by :func:`law`, and arms. ``effects`` has by seed how many plain steps one of an
    arm's steps is worth."""
    seeds = range(len(next(iter(effects.values()))))
    plain = {
        name: {s: run(length, law(length, s), steps=100 * length) for s in seeds}
        for name, length in PLAIN.items()
    }
    trunk = {s: run(2.0, 9.0, steps=200) for s in seeds}
    others = {
        arm: {s: run(1 / price, law(effect, s), steps=100) for s, effect in enumerate(of_arm)}
        for arm, of_arm in effects.items()
    }
    return {"trunk": trunk, **plain, **others}


NOISE = (1.0, 1.02, 0.98, 1.01, 0.99)


def test_gain_and_effect_are_tested_as_logarithms(tmp_path):
    predictions = [
        predict("heads", "below", 1, expected=0.8),
        predict("heads", "above", 0.9, measure=EFFECT),
        predict("heads", "below", 0.9, measure=EFFECT),
        predict("large", "above", 1, against="heads"),
    ]
    claim = gain_claim(tmp_path, predictions)
    effects = {"heads": list(NOISE), "large": [1.3 * n**2 for n in NOISE]}
    findings = decide(claim, arms_of(effects))
    assert [f.verdict for f in findings] == [HOLDS, HOLDS, FAILS, HOLDS]
    gain, effect, _, ratio = findings
    mean = math.exp(math.fsum(map(math.log, NOISE)) / 5)
    # A curve of three points is accurate to one percent.
    assert gain.effect == pytest.approx(0.8 * mean, rel=0.01)
    assert effect.effect == pytest.approx(mean, rel=0.01)
    assert ratio.effect == pytest.approx(1.3 * mean, rel=0.01)
    assert gain.low < 0.8 < gain.high < 0.83
    assert (gain.low, gain.high) == pytest.approx(
        ratio_interval([0.8 * n for n in NOISE]).ends, rel=0.01
    )


def test_an_arm_of_another_size_has_its_own_plain_curve(tmp_path):
    wide = {f"wide_{name}": length for name, length in PLAIN.items()}
    grows = [predict("large", "above", 1, against="heads")]
    arms: dict[str, Any] = {"heads": ["mtp=sequential"], "large": ["mtp=sequential"]}
    arms |= {name: ["mtp=none", f"trainer.max_steps={i}"] for i, name in enumerate([*PLAIN, *wide])}
    measure = {**GAIN, "own_curves": {"large": list(wide)}}
    claim = gain_claim(tmp_path, grows, arms=arms, measure=measure)
    runs = dict(arms_of({"heads": list(NOISE)}))
    del runs["trunk"]
    seeds = range(len(NOISE))
    # Each costs three times as much as a small one; a step is worth 1.4 of its plain steps.
    for name, length in wide.items():
        runs[name] = {s: run(3 * length, law(length, s) - 0.5, steps=100 * length) for s in seeds}
    runs["large"] = {s: run(3 / 0.8, law(1.4 * n, s) - 0.5, steps=100) for s, n in enumerate(NOISE)}
    (ratio,) = decide(claim, runs)
    assert ratio.verdict == HOLDS and ratio.effect == pytest.approx(1.4, rel=0.01)
    result = json.loads(json.dumps(make_result(claim, runs, BEGAN)))
    assert result["predictions"][0]["measure"]["own_curves"] == [["large", list(wide)]]
    assert shared_runs(claim, [result])
    with_default = gain_claim(tmp_path / "b", grows, arms=arms)
    (without,) = decide(with_default, runs)
    assert without.why.startswith("large at seed 0: out of range")


def test_a_loss_beyond_the_plain_runs_is_undecided(tmp_path):
    """A seed out of range would be the best or the worst, so a mean without it is biased."""
    claim = gain_claim(tmp_path, [predict("heads", "below", 1)])
    (finding,) = decide(claim, arms_of({"heads": [1.0, 1.0, 0.4], "large": [1.0] * 3}))
    assert finding.verdict == UNDECIDED and finding.why.startswith("heads at seed 2: out of range")
    assert finding.effect is None and finding.p is None
    arms = arms_of({"heads": [1.0] * 3, "large": [1.0] * 3})
    missing = {**arms, "short": {s: ArmRun(folder="", state="missing") for s in range(3)}}
    (finding,) = decide(claim, missing)
    assert finding.why == "heads at seed 0: a run of the plain curve is not finished"


@pytest.mark.parametrize("arm", ["heads", "short"])
def test_a_finished_run_without_flops_or_a_loss_is_named(tmp_path, arm):
    claim = gain_claim(tmp_path, [predict("heads", "below", 1)])
    arms = arms_of({"heads": [1.0] * 3, "large": [1.0] * 3})
    for without, lacks in (({"costs": {"step": 50.0}}, "flops"), ({"values": {}}, TAG)):
        changed = {**arms[arm], 1: replace(arms[arm][1], **without)}
        (finding,) = decide(claim, {**arms, arm: changed})
        assert finding.verdict == UNDECIDED and finding.effect is None
        assert finding.why in (
            f"heads at seed 1: {arm} has no {lacks}",
            f"heads has no {lacks} at seed 1",
        )


def test_gains_have_words_and_their_runs_can_be_shared(tmp_path):
    claim = gain_claim(tmp_path, [predict("large", "above", 1, against="heads")])
    arms = arms_of({"heads": list(NOISE), "large": [1.3 * n for n in NOISE]})
    result = make_result(claim, arms, BEGAN)
    (entry,) = result["predictions"]
    assert words.subject(entry) == "large / heads"
    assert words.quantity(entry["measure"]) == "compute-equivalent gain, by loss in bits per byte"
    assert words.measured(entry).startswith("1.302 × [1.302, ")
    # Other claims with the same tag can share these runs, also if they measure no gain.
    plain = claim_of(tmp_path / "other", measure={"tag": TAG}, equal="nothing")
    assert shared_runs(plain, [result]).keys() == {"x"}


@pytest.mark.parametrize(
    ("measure", "prediction", "message"),
    [
        ({"equivalent": TAG}, {}, "no curve in measure"),
        ({**GAIN, "curve": ["short"]}, {}, "give at least two arms of plain runs"),
        ({**GAIN, "curve": ["short", "nowhere"]}, {}, "give at least two arms of plain runs"),
        ({**GAIN, "part": "price"}, {}, "choose one of total, effect"),
        ({**GAIN, "solved": 0.9}, {}, "no level at which it is solved"),
        ({"tag": TAG, "curve": list(PLAIN)}, {}, "belongs to equivalent"),
        ({**GAIN, "own_curves": {"nobody": ["short"]}}, {}, "the key nobody in measure.own_curves"),
        ({**GAIN, "own_curves": {"heads": ["short"]}}, {}, "own_curves.heads: .* give at least"),
        (GAIN, {"side": "within", "by": 0.1}, "say above or below"),
        (GAIN, {"by": 0}, "by a number above 0"),
    ],
)
def test_invalid_claims_about_gains_are_refused(tmp_path, measure, prediction, message):
    predictions = [{"arm": "heads", "side": "below", "by": 1, **prediction}]
    with pytest.raises(UserError, match=message):
        gain_claim(tmp_path, predictions, measure=measure)


def test_an_arm_branches_from_the_run_of_the_same_seed(tmp_path):
    claim = gain_claim(tmp_path, [predict("heads", "below", 1)])
    all_jobs = jobs(claim, [3, 1], RUNS)
    trunks = {job.seed: job.name for job in all_jobs if job.arm == "trunk"}
    for job in all_jobs:
        branches = job.arm in PLAIN
        assert job.parent == (trunks[job.seed] if branches else None)
        assert (f"branch_from={RUNS / trunks[job.seed]}@9" in job.overrides) == branches
    # Names depend on the config and not on the folder.
    elsewhere = jobs(claim, [3, 1], Path("/somewhere/else"))
    assert [job.name for job in elsewhere] == [job.name for job in all_jobs]
    # A branch waits for its trunk.
    chosen = [job for job in all_jobs if job.arm in ("trunk", "long")]
    unfinished = {job.name for job in chosen}
    ready = _ready([*chosen], unfinished)
    assert [job.name for job in takewhile(bool, ready)] == [trunks[3], trunks[1]]
    assert next(ready) is None
    for seed, begins in ((1, 3), (3, 1)):
        unfinished.discard(trunks[seed])
        assert next(ready) == chosen[begins]
    assert list(ready) == []
    # A parent that is only in a stored result runs again, for its checkpoints.
    (branch,) = [job for job in all_jobs if (job.arm, job.seed) == ("long", 1)]
    again = _with_parents([branch], [claim], tmp_path)
    assert [(job.arm, job.seed) for job in again] == [("trunk", 1), ("long", 1)]


@pytest.mark.parametrize("link", ["branch_from=trunk@9", "init_from=trunk"])
def test_a_link_to_a_later_arm_is_refused(tmp_path, link):
    arms = {"late": [link], "trunk": ["mtp=none"]}
    claim = claim_of(tmp_path, arms=arms, predictions=[predict("late", "below", 1)])
    with pytest.raises(UserError, match=f"{link}: name an arm that is listed before it"):
        jobs(claim, [0], RUNS)


def test_arms_start_from_arms_that_start_from_others(tmp_path):
    arms = {
        "trunk": ["mtp=none", "trainer.max_steps=100"],
        "long": ["mtp=none", "trainer.max_steps=200", "branch_from=trunk@100"],
        "heads": ["mtp=linear", "mtp.freeze_trunk=true", "init_from=long"],
        "other": ["mtp=linear", "mtp.freeze_trunk=true", "init_from=runs/somewhere"],
    }
    claim = claim_of(tmp_path, arms=arms, predictions=[predict("heads", "below", 1)], shared=[])
    trunk, long, heads, other = jobs(claim, [3], RUNS)
    assert heads.parent == long.name and long.parent == trunk.name and other.parent is None
    assert f"init_from={RUNS / long.name}" in heads.overrides
    assert "init_from=runs/somewhere" in other.overrides
    assert jobs(claim, [3], Path("/somewhere/else"))[2].name == heads.name
    # All parents whose folders are missing run again.
    again = _with_parents([heads], [claim], tmp_path)
    assert [job.arm for job in again] == ["trunk", "long", "heads"]
    unfinished = {job.name for job in again}
    for job in _ready([*again], unfinished):
        assert job is not None and unfinished == {one.name for one in again[again.index(job) :]}
        unfinished.discard(job.name)


def test_a_plain_curve_on_another_text_is_undecided(tmp_path):
    claim = gain_claim(tmp_path, [predict("heads", "below", 1)])
    arms = arms_of({"heads": list(NOISE)})
    for name in PLAIN:
        arms[name] = {seed: replace(run, text="another") for seed, run in arms[name].items()}
    (finding,) = decide(claim, arms)
    why = "the arms were evaluated on different texts"
    assert (finding.verdict, finding.why) == (UNDECIDED, why)
