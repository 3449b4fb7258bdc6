"""Several processes of one run: under torchrun, with signals, and when one of them dies."""

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
import torch.distributed as dist

from mtp_lightning.run.metrics import read_newest
from mtp_lightning.run.status import read_status
from sweeps.devices import DeviceQueue
from sweeps.display import Display
from sweeps.pool import Pool
from sweeps.process import Job
from tests.integration import helpers
from tests.integration.helpers import DDP, ROOT, checkpoint, command, execute, rows, start, typed

LONG = typed("trainer.max_steps=4000 trainer.val_check_interval=4000 model.n_layers=2")
IN_PARTS = typed("trainer.strategy=fsdp trainer.split_checkpoint_gb=0")
BARE = typed("callbacks=[nan_guard,checkpoints] callbacks.throughput.measure_matmul")
Launcher = Callable[[Path, dict[str, Any], Path], list[str]]


def torchrun(
    cache: Path, settings: dict[str, Any], *, more: list[str], run_dir: str | None = None
) -> list[str]:
    """The command line of a run under torchrun."""
    place = [] if run_dir is None else [f"run_dir={run_dir}"]
    agent = [sys.executable, "-m", "torch.distributed.run", *more, str(ROOT / "train.py")]
    return [*agent, *helpers.overrides(cache, settings), *place]


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


def all_ended(pids: list[int], *, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(trains(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _ranks(process: subprocess.Popen[bytes], launcher: Launcher) -> list[int]:
    """The two processes that train, the first rank's first."""
    started = sorted(pid for pid in children(process.pid) if trains(pid))
    ranks = [process.pid, *started] if launcher is lightning else started
    assert len(ranks) == 2
    return ranks


def end_one(
    process: subprocess.Popen[bytes],
    launcher: Launcher,
    number: int,
    *,
    victim: int,
    run: Path,
    step: int,
) -> None:
    """Send a signal to one of two processes after a step, and wait until both are gone."""
    helpers.wait_for_step(process, run, step)
    ranks = _ranks(process, launcher)
    os.kill(ranks[victim], number)
    assert process.wait(240) != 0
    assert all_ended(ranks, seconds=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy", "times"),
    [
        (lightning, {"trainer.strategy": "fsdp"}, 1),
        pytest.param(standalone, {"trainer.strategy": "ddp"}, 1, marks=pytest.mark.long),
        pytest.param(lightning, {"trainer.strategy": "ddp"}, 10, marks=pytest.mark.long),
        pytest.param(lightning, IN_PARTS, 10, marks=pytest.mark.long),
    ],
    ids=["fsdp", "torchrun-ddp", "ddp", "fsdp-in-parts"],
)
def test_sigterm_to_one_process_stops_all_and_the_run_resumes_exactly(
    tmp_path, cache, launcher, strategy, times
):
    """At any moment, during validations and saves too, and to any process; a single signal goes to
    the second process, which no process waits for."""
    draw = random.Random(str(strategy))
    settings = LONG | BARE | DDP | strategy
    settings |= typed("trainer.max_steps=80 trainer.val_check_interval=5")
    settings["callbacks.checkpoints.every_n_steps"] = 3
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.mkdir()
    reached = 0
    for attempt in range(times):
        log = run / f"{attempt}.log"
        process = start(launcher(cache, settings, run), log)
        victim = draw.randrange(2) if times > 1 else 1
        step = reached + draw.randrange(1, 6)
        end_one(process, launcher, signal.SIGTERM, victim=victim, run=run, step=step)
        stopped = checkpoint(run)["global_step"]
        assert reached < stopped < 80
        assert f"interrupted; step {stopped} is saved" in log.read_text()
        assert int(rows(run)[-1]["step"]) == stopped, "the newest step is saved"
        reached = stopped
    for folder in (run, whole):
        execute(launcher(cache, settings, folder), code=0)
    helpers.assert_same_run(run, whole)
    if launcher is lightning:  # what both processes know is said once
        assert "Continuing" in (run / "train.log").read_text()
        assert not any(file.read_text() for file in run.glob("train_*.log"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [lightning, pytest.param(standalone, marks=pytest.mark.long)],
    ids=["own", "torchrun"],
)
def test_an_interruption_of_all_processes_is_told_once(tmp_path, cache, launcher):
    settings = LONG | BARE | DDP | {"callbacks.checkpoints.every_n_steps": 2}
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(launcher(cache, settings, run), log)
    helpers.wait_for_step(process, run, 3)
    for rank in reversed(_ranks(process, launcher)):  # as the terminal's Ctrl-C
        os.kill(rank, signal.SIGINT)
    assert process.wait(240) != 0
    lines = [line for line in log.read_text().splitlines() if line.startswith("interrupted")]
    assert len(lines) == 1 and "the same command with run_dir=" in lines[0]


@pytest.mark.long
def test_sigterm_without_checkpoints_ends_all(tmp_path: Path, cache: Path) -> None:
    settings = LONG | DDP | BARE | {"callbacks": "[nan_guard]"}
    settings["callbacks.checkpoints.every_n_steps"] = None
    process = start(lightning(cache, settings, tmp_path / "run"), tmp_path / "log")
    end_one(process, lightning, signal.SIGTERM, victim=1, run=tmp_path / "run", step=20)
    assert "interrupted before the first checkpoint" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        (lightning, 1),
        pytest.param(standalone, 0, marks=pytest.mark.long),
        pytest.param(lightning, 0, marks=pytest.mark.long),
        pytest.param(standalone, 1, marks=pytest.mark.long),
    ],
)
def test_a_killed_process_ends_the_others(tmp_path, cache, launcher, victim):
    process = start(launcher(cache, LONG | DDP, tmp_path / "run"), tmp_path / "log")
    end_one(process, launcher, signal.SIGKILL, victim=victim, run=tmp_path / "run", step=20)


def _wait_for_child(process: subprocess.Popen[bytes]) -> int:
    """The second process, as soon as it exists: its imports take seconds before the rendezvous."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        for pid in children(process.pid):
            if trains(pid):
                return pid
        time.sleep(0.01)
    raise AssertionError("no second process was started")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_process_that_dies_before_the_rendezvous_is_named(tmp_path, cache, strategy):
    run = tmp_path / "run"
    settings = LONG | DDP | {"trainer.strategy": strategy}
    process = start(lightning(cache, settings, run), tmp_path / "log")
    os.kill(_wait_for_child(process), signal.SIGKILL)
    assert process.wait(30) == 1
    log = (tmp_path / "log").read_text()
    assert log.count("error: another process of this run has ended") == 1 and "Traceback" not in log
    assert "process 1 was ended by signal 9" in log and f"run_dir={run}" in log
    assert not run.exists()


@pytest.mark.slow
def test_a_child_ends_with_its_parent_before_the_rendezvous(tmp_path: Path, cache: Path) -> None:
    process = start(lightning(cache, LONG | DDP, tmp_path / "run"), tmp_path / "log")
    child = _wait_for_child(process)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert all_ended([child], seconds=25)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "until", [pytest.param("rendezvous", marks=pytest.mark.long), "process group"]
)
def test_a_silent_process_of_another_machine_is_named(tmp_path, cache, until):
    """The test plays the second process up to a moment, and then is silent as if killed."""
    port, run = 20000 + os.getpid() % 20000, tmp_path / "run"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place |= {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    settings = DDP | {"trainer.devices": 1, "trainer.num_nodes": 2}
    process = start(lightning(cache, settings, run), tmp_path / "log", **place)
    options = {"timeout": timedelta(minutes=2), "wait_for_workers": False, "multi_tenant": True}
    tcp = dist.TCPStore("127.0.0.1", port, **options)
    store = dist.PrefixStore("mtp-lightning/None/None", tcp)
    store.set("pulse 1", "1")
    if until == "process group":
        name = json.loads(store.get("witness 1").decode())
        store.set(f"{name} by 1", " ")
    assert process.wait(60) == 1
    text = (tmp_path / "log").read_text()
    assert text.count("error: another process of this run has ended") == 1, text
    assert "process 1 has shown no sign of life for 20 s" in text and "Traceback" not in text
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_stopped_sweep_lets_all_processes_save(tmp_path, cache, strategy):
    settings = LONG | DDP | {"trainer.strategy": strategy}
    settings["callbacks.checkpoints.every_n_steps"] = 4000
    run = tmp_path / "run"
    job = Job(folder=run, overrides=(), command=tuple(command(run, cache, settings)), processes=2)

    def far_enough(_: Job) -> str | None:
        newest = read_newest(run / "metrics.csv", "train/loss")
        return "enough" if newest is not None and newest[0] >= 20 else None

    pool = Pool(queue=DeviceQueue(n_jobs=1), display=Display(1), grace_seconds=240)
    pool.run([job], watch=far_enough)
    status = read_status(run)
    assert status is not None
    assert (status["state"], status["reason"]) == ("interrupted", "enough")
    step = checkpoint(run)["global_step"]
    assert 20 <= step < 4000, "the newest step is saved"
    assert int(rows(run)[-1]["step"]) == step


@pytest.mark.slow
def test_two_machines_train_in_one_folder(tmp_path: Path) -> None:
    """Two torchrun agents, a run_dir named by the time and an empty cache equal one process."""
    cache, common = tmp_path / "cache", {"tokenizer": "bpe", "tokenizer.vocab_size": 300}
    both = common | {"trainer.num_nodes": 2}
    logs = _machines(cache, both, [tmp_path, tmp_path])
    (run,) = (tmp_path / "runs").iterdir()
    assert len(rows(run)) == 10
    assert logs.count("training the bpe tokenizer") == 1, logs
    helpers.train_apart(tmp_path / "one", cache, common | {"data.batch_size": 8})
    helpers.assert_near_rows(run, tmp_path / "one")


@pytest.mark.long
def test_machines_without_a_shared_run_folder_are_refused(tmp_path: Path, cache: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    settings = {"trainer.num_nodes": 2}
    logs = _machines(cache, settings, places, run_dir="runs/mine", fails=True)
    errors = re.findall(r"error: run_dir=\S+ is not one folder for all processes", logs)
    assert len(errors) == 2, logs


@pytest.mark.slow
def test_more_processes_than_the_config_has_are_refused(tmp_path: Path, cache: Path) -> None:
    done = execute(standalone(cache, {}, tmp_path / "run"))  # torchrun has a traceback of its own
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
    """The output of two torchrun agents on this machine, each in its own folder."""
    port = 20000 + os.getpid() % 20000
    processes = []
    for rank, place in enumerate(places):
        more = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", "--rdzv-backend=c10d"]
        more += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=test{port}"]
        args = torchrun(cache, settings, more=more, run_dir=run_dir)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = helpers.environment() | {"PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(args, cwd=place, env=env, **pipes))
    logs = [process.communicate(timeout=480)[0] for process in processes]
    for process, log in zip(processes, logs, strict=True):
        assert (process.returncode != 0) == fails, log
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(logs))
