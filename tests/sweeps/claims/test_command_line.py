"""A small claim by real runs: run, interrupted, continued, judged, replicated."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.run.status import read_status
from sweeps.claims.result import read_result
from tests.integration.helpers import overrides, start, typed
from tests.sweeps.claims import fixture_claims
from tests.sweeps.claims.fixture_claims import commit, predict, with_pages, write_claim
from tests.sweeps.typed import wait_until


def states(runs: Path) -> dict[str, dict[str, Any]]:
    """The status of every run; a file that is being written counts as pending."""
    folders = [file.parent for file in runs.glob("*/status.json")]
    return {folder.name: read_status(folder) or {"state": "pending"} for folder in folders}


@pytest.mark.slow
def test_a_claim_is_run_interrupted_continued_and_judged(tmp_path, cache, capsys):
    claims, runs, results = (tmp_path / name for name in ("claims", "runs", "results"))

    output = partial(fixture_claims.output_of, capsys)  # the runs are processes of their own
    quick = typed(
        "mtp mtp.depth trainer.max_steps=40 trainer.val_check_interval=40 "
        "callbacks.checkpoints.every_n_steps=5"
    )
    # A claim's file has no paths.
    shared = [o for o in overrides(cache, quick) if not o.startswith("paths.cache_dir=")]
    common = {"seeds": [0, 1], "minimum": 2, "shared": shared}
    write_claim(claims, predictions=[predict("mtp", "within", 5, against="plain")], **common)
    options = ["--claims", claims, "--runs", runs]
    commit(claims)
    command = [sys.executable, "-m", "sweeps.claims", "run", "mine", *map(str, options)]
    log = tmp_path / "log"
    started = start(command, log)

    def one_is_done_and_the_next_trains() -> bool:
        assert started.poll() is None, log.read_text()
        ordered = sorted(status["state"] for status in states(runs).values())
        return ordered[:3] == ["done", "pending", "pending"]

    try:
        wait_until(one_is_done_and_the_next_trains)
        started.send_signal(signal.SIGINT)
        assert started.wait(480) == 130, log.read_text()
    finally:
        started.kill()
    assert "interrupted. The same command continues." in log.read_text()
    first = {name: s for name, s in states(runs).items() if s["state"] == "done"}
    assert len(first) == 1 and len(states(runs)) == 4

    verdict = output("verdict", "mine", *options, "--root", with_pages(tmp_path))
    assert "mine: undecided." in verdict and "unfinished: mtp: 0 of 2" in verdict

    # Another claim shares the control's runs.
    arms = {"control": ["mtp=none"], "heads": ["mtp=linear", "mtp.depth=1"]}
    predictions = [predict("heads", "below", against="control")]
    write_claim(claims, "yours", arms=arms, predictions=predictions, **common)
    commit(claims)
    done = output("run", "mine", "yours", *options, "--seeds", 0, 1, "--root", tmp_path / "none")
    assert "6 runs in" in done and "1 ended before" in done
    after = states(runs)
    assert len(after) == 6 and {s["state"] for s in after.values()} == {"done"}
    for name, status in first.items():
        assert after[name] == status, "a finished run was run again"

    output("verdict", "--all", *options, "--root", tmp_path)
    result, yours = read_result("mine", results), read_result("yours", results)
    assert result["verdict"] == "holds" and result["unfinished"] == []
    folders = [
        {seed: run["folder"] for seed, run in arm["seeds"].items()}
        for arm in (result["arms"]["plain"], yours["arms"]["control"])
    ]
    assert folders[0] == folders[1], "both claims have the same control runs"
    for arm in result["arms"].values():
        for seed in arm["seeds"].values():
            summary = json.loads((runs / seed["folder"] / "summary.json").read_text())
            assert seed["values"]["val/bits_per_byte"] == summary["val/bits_per_byte"]
    assert "### mine: holds" in (tmp_path / "docs" / "results.md").read_text()

    # On another machine that has only the result.
    elsewhere = ["--claims", claims, "--runs", tmp_path / "elsewhere", "--root", tmp_path]
    assert "Nothing to run" in output("run", "mine", *elsewhere)
    output("verdict", "mine", *elsewhere)
    assert read_result("mine", results) == result

    # Here the stored result is of these runs.
    again = output("replicate", "mine", *options, "--root", tmp_path)
    assert "4 runs in" in again and "4 ended before" in again
    assert again.count("they agree") == 1 and "mine: holds." in again

    # The final weights of an arm, from its runs.
    wanted = ["--arms", "heads", "--seeds", 0, 1, "--to", tmp_path / "w"]
    weights = output("weights", "yours", *options, "--root", tmp_path, *wanted)
    assert "2 runs in" in weights and "2 ended before" in weights
    assert weights.count("the result has no digest of this run") == 2
    assert len(list((tmp_path / "w" / "yours").glob("heads_seed-*.safetensors"))) == 2
