"""Several processes of one run: under torchrun, asked to end, and when one of them dies."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtp_lightning.run import checkpoints
from mtp_lightning.run.metrics import read_newest
from mtp_lightning.run.status import read_status
from sweeps.devices import DeviceQueue
from sweeps.display import Lines
from sweeps.pool import Pool
from sweeps.process import Task
from tests.integration.helpers import (
    ROOT,
    assert_same_run,
    checkpoint,
    command,
    environment,
    execute,
    overrides,
    rows,
    start,
    wait_for_step,
)

DDP = {"trainer.devices": 2, "trainer.strategy": "ddp"}
LONG = {"trainer.max_steps": 4000, "trainer.val_check_interval": 4000, "model.n_layers": 2}


def torchrun(
    cache: Path, settings: dict[str, Any], *, more: list[str], run_dir: str | None = None
) -> list[str]:
    """The command line of a run under torchrun."""
    place = [] if run_dir is None else [f"run_dir={run_dir}"]
    agent = [sys.executable, "-m", "torch.distributed.run", *more, str(ROOT / "train.py")]
    return [*agent, *overrides(cache, settings), *place]


def standalone(cache: Path, settings: dict[str, Any], run_dir: Path) -> list[str]:
    more = ["--standalone", "--nproc-per-node=2"]
    return torchrun(cache, settings, more=more, run_dir=str(run_dir))


def lightning(cache: Path, settings: dict[str, Any], run_dir: Path) -> list[str]:
    return command(run_dir, cache, settings)


def children(pid: int) -> list[int]:
    """Processes that a process has started, and that train."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]


def trains(pid: int) -> bool:
    try:
        return "train.py" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def ended(pids: list[int], *, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(trains(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _ranks(process: subprocess.Popen[bytes], how: Callable[..., list[str]]) -> list[int]:
    """The two processes that train, the first rank's first."""
    started = sorted(pid for pid in children(process.pid) if trains(pid))
    ranks = [process.pid, *started] if how is lightning else started
    assert len(ranks) == 2
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "strategy"),
    [(lightning, "fsdp"), pytest.param(standalone, "ddp", marks=pytest.mark.long)],
)
def test_sigterm_to_one_ends_all_and_the_run_goes_on_exactly(
    tmp_path: Path,
    cache: Path,
    how: Callable[[Path, dict[str, Any], Path], list[str]],
    strategy: str,
) -> None:
    """To the second process, which nobody waits for."""
    settings = LONG | {
        "trainer.devices": 2,
        "trainer.strategy": strategy,
        "trainer.max_steps": 120,
        "trainer.val_check_interval": 120,
        "callbacks": "[nan_guard,checkpoints]",
        "callbacks.throughput.measure_matmul": None,
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.mkdir()
    process = start(how(cache, settings, run), run / "first.log")
    wait_for_step(process, run, 30)
    ranks = _ranks(process, how)
    os.kill(ranks[1], signal.SIGTERM)
    assert process.wait(240) != 0
    assert ended(ranks, seconds=120)
    log = (run / "first.log").read_text()
    stopped = checkpoint(run)["global_step"]
    assert 30 <= stopped < 120 and f"interrupted; saved is step {stopped}" in log
    assert int(rows(run)[-1]["step"]) == stopped
    for folder in (run, whole):
        done = execute(how(cache, settings, folder))
        assert done.returncode == 0, done.stderr
    assert_same_run(run, whole)


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", {}), ("fsdp", {"trainer.split_checkpoint_gb": 0})],
    ids=["ddp", "fsdp-in-parts"],
)
def test_sigterm_ten_times_to_any_process_at_any_moment(
    tmp_path: Path, cache: Path, strategy: str, more: dict[str, Any]
) -> None:
    """Validations and saves among the moments; the run that was asked ten times to end equals one
    that was not, so each time it was saved as it was."""
    draw = random.Random(strategy)
    settings = LONG | {
        "trainer.devices": 2,
        "trainer.strategy": strategy,
        "trainer.max_steps": 80,
        "trainer.val_check_interval": 5,
        "callbacks.checkpoints.every_n_steps": 3,
        "callbacks": "[nan_guard,checkpoints]",
        "callbacks.throughput.measure_matmul": None,
        **more,
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.mkdir()
    reached = 0
    for attempt in range(10):
        process = start(lightning(cache, settings, run), run / f"{attempt}.log")
        wait_for_step(process, run, reached + draw.randrange(1, 6), seconds=300)
        time.sleep(draw.uniform(0, 0.2))
        ranks = _ranks(process, lightning)
        os.kill(ranks[draw.randrange(2)], signal.SIGTERM)
        assert process.wait(240) != 0
        assert ended(ranks, seconds=120)
        log = (run / f"{attempt}.log").read_text()
        stopped = checkpoints.stored_step(run / "checkpoints" / "last.ckpt")
        assert reached < stopped < 80 and f"interrupted; saved is step {stopped}" in log
        assert int(rows(run)[-1]["step"]) == stopped, "every step that was taken is saved"
        reached = stopped
    for folder in (run, whole):
        done = execute(lightning(cache, settings, folder))
        assert done.returncode == 0, done.stderr
    assert rows(run) == rows(whole)
    ends = [checkpoints.load(folder / "checkpoints" / "last.ckpt") for folder in (run, whole)]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name])


@pytest.mark.long
def test_sigterm_without_checkpoints_ends_all(tmp_path: Path, cache: Path) -> None:
    settings = (
        LONG | DDP | {"callbacks": "[nan_guard]", "callbacks.throughput.measure_matmul": None}
    )
    settings["callbacks.checkpoints.every_n_steps"] = None
    run = tmp_path / "run"
    run.mkdir()
    process = start(lightning(cache, settings, run), run / "first.log")
    wait_for_step(process, run, 20)
    ranks = _ranks(process, lightning)
    os.kill(ranks[1], signal.SIGTERM)
    assert process.wait(240) != 0
    assert ended(ranks, seconds=120)
    assert "interrupted before the first checkpoint" in (run / "first.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "victim"),
    [
        (lightning, "second"),
        pytest.param(standalone, "first", marks=pytest.mark.long),
        pytest.param(lightning, "first", marks=pytest.mark.long),
        pytest.param(standalone, "second", marks=pytest.mark.long),
    ],
)
def test_one_that_dies_takes_the_others_along(
    tmp_path: Path,
    cache: Path,
    how: Callable[[Path, dict[str, Any], Path], list[str]],
    victim: str,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    process = start(how(cache, LONG | DDP, run), run / "first.log")
    wait_for_step(process, run, 20)
    ranks = _ranks(process, how)
    os.kill(ranks[0 if victim == "first" else 1], signal.SIGKILL)
    assert process.wait(240) != 0
    assert ended(ranks, seconds=120)


def _wait_for_child(process: subprocess.Popen[bytes]) -> int:
    """The second process, as soon as it is there: it imports for seconds before they meet."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        for pid in children(process.pid):
            if trains(pid):
                return pid
        time.sleep(0.01)
    raise AssertionError("no second process was started")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_one_that_dies_before_they_have_met_is_told_of(
    tmp_path: Path, cache: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    settings = LONG | DDP | {"trainer.strategy": strategy}
    process = start(lightning(cache, settings, run), tmp_path / "log")
    os.kill(_wait_for_child(process), signal.SIGKILL)
    assert process.wait(30) == 1
    log = (tmp_path / "log").read_text()
    assert log.count("error: another process of this run has gone") == 1 and "Traceback" not in log
    assert "process 1 was ended by signal 9" in log and f"run_dir={run}" in log
    assert not run.exists()


@pytest.mark.slow
def test_a_child_ends_with_its_parent_before_they_have_met(tmp_path: Path, cache: Path) -> None:
    process = start(lightning(cache, LONG | DDP, tmp_path / "run"), tmp_path / "log")
    child = _wait_for_child(process)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert ended([child], seconds=25)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "until", [pytest.param("it is asked", marks=pytest.mark.long), "the group is made"]
)
def test_one_of_another_machine_that_dies_before_they_have_met_is_told_of(
    tmp_path: Path, cache: Path, until: str
) -> None:
    """Nobody has started both; the second is played here, up to a moment, and then shows nothing
    of itself, as one that was killed."""
    port, run = 20000 + os.getpid() % 20000, tmp_path / "run"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place |= {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    settings = DDP | {"trainer.devices": 1, "trainer.num_nodes": 2}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            lightning(cache, settings, run),
            stdout=log, stderr=subprocess.STDOUT, env=environment() | place, cwd=ROOT,
        )  # fmt: skip
    tcp = dist.TCPStore(
        "127.0.0.1", port, timeout=timedelta(minutes=2), wait_for_workers=False, multi_tenant=True
    )
    store = dist.PrefixStore("mtp-lightning/None/None", tcp)
    store.set("pulse 1", "1")
    if until == "the group is made":
        name = json.loads(store.get("witness 1").decode())
        store.set(f"{name} by 1", " ")
    assert process.wait(60) == 1
    text = (tmp_path / "log").read_text()
    assert text.count("error: another process of this run has gone") == 1, text
    assert "process 1 has shown no sign of life for 20 s" in text and "Traceback" not in text
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_sweep_that_stops_lets_all_processes_save(
    tmp_path: Path, cache: Path, strategy: str
) -> None:
    settings = LONG | DDP | {"trainer.strategy": strategy}
    settings["callbacks.checkpoints.every_n_steps"] = 4000
    run = tmp_path / "run"
    task = Task(folder=run, overrides=(), command=tuple(command(run, cache, settings)), processes=2)

    def far(_: Task) -> str | None:
        newest = read_newest(run / "metrics.csv", "train/loss")
        return "enough" if newest is not None and newest[0] >= 20 else None

    pool = Pool(queue=DeviceQueue(n_jobs=1), display=Lines(1), grace_seconds=240)
    pool.run([task], watch=far)
    status = read_status(run)
    assert status is not None
    assert (status["state"], status["reason"]) == ("interrupted", "enough")
    step = checkpoint(run)["global_step"]
    assert 20 <= step < 4000, "it is the newest step that was saved"
    assert int(rows(run)[-1]["step"]) == step


@pytest.mark.slow
def test_two_machines_train_in_one_folder(tmp_path: Path) -> None:
    """Two torchrun agents, a name made of the time, an empty cache, and the same numbers."""
    cache, common = tmp_path / "cache", {"tokenizer": "bpe", "tokenizer.vocab_size": 300}
    both = common | {"trainer.num_nodes": 2}
    logs = _machines(cache, both, [tmp_path, tmp_path])
    (run,) = (tmp_path / "runs").iterdir()
    assert len(rows(run)) == 10
    assert logs.count("training the bpe tokenizer") == 1, logs
    alone = execute(command(tmp_path / "one", cache, common | {"data.batch_size": 8}))
    assert alone.returncode == 0, alone.stderr
    for one, other in zip(rows(run), rows(tmp_path / "one"), strict=True):
        assert one == pytest.approx(other, rel=2e-6)


@pytest.mark.long
def test_machines_whose_folders_are_their_own_are_refused(tmp_path: Path, cache: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    settings = {"trainer.num_nodes": 2}
    logs = _machines(cache, settings, places, run_dir="runs/mine", fails=True)
    assert len(re.findall(r"error: run_dir=\S+ is not one folder for all processes", logs)) == 2, (
        logs
    )


@pytest.mark.slow
def test_as_many_processes_as_the_config_says(tmp_path: Path, cache: Path) -> None:
    done = execute(standalone(cache, {}, tmp_path / "run"))
    assert done.returncode == 1
    assert "error: 2 processes were started, 2 of them on this machine, and" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def _machines(
    cache: Path,
    settings: dict[str, Any],
    places: list[Path],
    *,
    run_dir: str | None = None,
    fails: bool = False,
) -> str:
    """Two torchrun agents on this machine, each in a folder of its own; what they print."""
    port = 20000 + os.getpid() % 20000
    processes = []
    for rank, place in enumerate(places):
        more = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", "--rdzv-backend=c10d"]
        more += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=test{port}"]
        args = torchrun(cache, settings, more=more, run_dir=run_dir)
        processes.append(
            subprocess.Popen(
                args,
                cwd=place,
                env=environment() | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    logs = [process.communicate(timeout=480)[0] for process in processes]
    for process, log in zip(processes, logs, strict=True):
        assert (process.returncode != 0) == fails, log
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(logs))
