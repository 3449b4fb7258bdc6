"""A small claim from its file to its verdict, by real runs, interrupted and continued."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from sweeps.claims.__main__ import main
from tests.integration.helpers import ROOT, environment, overrides
from tests.sweeps.claims.fixture_claims import commit, predict, root, write_claim
from tests.sweeps.typed import wait_until


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sweeps.claims", *map(str, arguments)]


def here(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """The command in this process; the runs are processes of their own."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), said.out, said.err)


def states(runs: Path) -> dict[str, dict[str, str]]:
    files = runs.glob("*/status.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


@pytest.mark.slow
def test_a_claim_is_run_interrupted_continued_and_judged(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = partial(here, capsys)
    claims, runs = tmp_path / "claims", tmp_path / "runs"
    quick = {
        "mtp": None,
        "mtp.depth": None,
        "trainer.max_steps": 40,
        "trainer.val_check_interval": 40,
    }
    shared = overrides(cache, {**quick, "callbacks.checkpoints.every_n_steps": 5})
    # A claim does not say where token stores are kept.
    shared = [override for override in shared if not override.startswith("paths.cache_dir=")]
    write_claim(
        claims,
        seeds=[0, 1],
        minimum=2,
        shared=shared,
        predictions=[predict("mtp", "within", 5, against="plain")],
    )
    where = ["--claims", claims, "--runs", runs]
    commit(claims)
    started = subprocess.Popen(
        command("run", "mine", *where),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    )

    def one_is_done_and_the_next_trains() -> bool:
        assert started.poll() is None, started.communicate()
        found = sorted(status["state"] for status in states(runs).values())
        return found[:3] == ["done", "pending", "pending"]

    try:
        wait_until(one_is_done_and_the_next_trains)
        started.send_signal(signal.SIGINT)
        said, _ = started.communicate(timeout=480)
    finally:
        started.kill()
    assert started.returncode == 130, said
    assert "interrupted. The same command continues." in said
    first = {name: s for name, s in states(runs).items() if s["state"] == "done"}
    assert len(first) == 1 and len(states(runs)) == 4

    judged = execute("verdict", "mine", *where, "--root", root(tmp_path))
    assert judged.returncode == 0, judged.stderr
    assert "mine: undecided." in judged.stdout and "unfinished: mtp: 0 of 2" in judged.stdout

    # Another claim that asks for the same control.
    write_claim(
        claims,
        "yours",
        seeds=[0, 1],
        minimum=2,
        shared=shared,
        arms={"control": ["mtp=none"], "heads": ["mtp=linear", "mtp.depth=1"]},
        predictions=[predict("heads", "below", against="control")],
    )
    commit(claims)
    done = execute("run", "mine", "yours", *where, "--seeds", 0, 1, "--root", tmp_path / "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 runs in" in done.stdout and "1 ended before" in done.stdout
    after = states(runs)
    assert len(after) == 6 and {s["state"] for s in after.values()} == {"done"}
    for name, status in first.items():
        assert after[name] == status, "it was not run again"
    assert "nothing" not in done.stderr

    judged = execute("verdict", "--all", *where, "--root", tmp_path)
    assert judged.returncode == 0, judged.stderr
    result = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert result["verdict"] == "holds" and result["unfinished"] == []
    yours = json.loads((tmp_path / "results" / "yours.json").read_text())
    folders = [
        {seed: run["folder"] for seed, run in arm["seeds"].items()}
        for arm in (result["arms"]["plain"], yours["arms"]["control"])
    ]
    assert folders[0] == folders[1], "one control for both"
    for arm in result["arms"].values():
        for seed in arm["seeds"].values():
            summary = json.loads((runs / seed["folder"] / "summary.json").read_text())
            assert seed["values"]["val/bits_per_byte"] == summary["val/bits_per_byte"]
    assert "### mine: holds" in (tmp_path / "docs" / "results.md").read_text()

    # On another machine, with the result alone.
    elsewhere = ["--claims", claims, "--runs", tmp_path / "elsewhere", "--root", tmp_path]
    nothing = execute("run", "mine", *elsewhere)
    assert nothing.returncode == 0 and "Nothing to run" in nothing.stdout, nothing.stderr
    assert execute("verdict", "mine", *elsewhere).returncode == 0
    assert json.loads((tmp_path / "results" / "mine.json").read_text()) == result

    # The stored result is of the same runs here.
    again = execute("replicate", "mine", *where, "--root", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "4 runs in" in again.stdout and "4 ended before" in again.stdout
    assert again.stdout.count("they agree") == 1 and "mine: holds." in again.stdout

    # What an arm ended with, from the runs that are there.
    weights = execute(
        "weights", "yours", *where, "--root", tmp_path, "--to", tmp_path / "w",
        "--arms", "heads", "--seeds", 0, 1,
    )  # fmt: skip
    assert weights.returncode == 0, weights.stderr
    assert "2 runs in" in weights.stdout and "2 ended before" in weights.stdout
    assert weights.stdout.count("the result has no digest of this run") == 2
    assert len(list((tmp_path / "w" / "yours").glob("heads_seed-*.safetensors"))) == 2
