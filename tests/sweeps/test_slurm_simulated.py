"""Requests to Slurm and its answers, with scripts in place of its programs (see test_slurm.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_lightning.errors import UserError
from mtp_lightning.run.status import state_of, write_status
from sweeps import slurm_cluster
from sweeps.follow import follow
from sweeps.process import Job
from sweeps.slurm_cluster import _Queue, export_paths, max_array_size, torchrun
from tests.integration.helpers import ROOT, environment, overrides, rows, train_here

SETTINGS: dict[str, Any] = {
    "partition": None, "account": None, "timeout_min": 5, "cpus_per_process": 2,
    "gpus_per_process": 1, "mem_gb": None, "n_jobs": 100, "signal_delay_s": 9, "max_requeues": 1,
    "additional": None,
}  # fmt: skip


def jobs_of(folder: Path, n: int, **values: Any) -> list[Job]:
    return [
        Job(folder=folder / f"{i}", overrides=(f"seed={i}",), command=("x",), **values)
        for i in range(n)
    ]


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in PATH, for scripts in place of Slurm's programs."""
    (folder := tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_fewer_jobs_at_once_than_arrays_are_refused(tmp_path, slurm) -> None:
    jobs = [*jobs_of(tmp_path, 2), *jobs_of(tmp_path, 2, processes=2)]
    with pytest.raises(UserError, match="n_jobs=1 is less than the 2 job arrays"):
        slurm_cluster.run(jobs, **{**SETTINGS, "n_jobs": 1})


@pytest.mark.parametrize("before", [None, "/theirs"])
def test_jobs_find_a_project_in_any_folder(tmp_path: Path, before: str | None) -> None:
    (root := tmp_path / "my code $x").mkdir()
    line = f'{export_paths(root)}; printf %s "$PYTHONPATH"'
    env = {"PATH": os.environ["PATH"], **({"PYTHONPATH": before} if before else {})}
    found = subprocess.check_output(["bash", "-c", line], env=env, text=True)
    assert found == ":".join([str(root), *([before] if before else [])])


def test_the_limit_of_arrays_is_read_from_scontrol(slurm: Path) -> None:
    program(slurm, "scontrol", "echo 'MaxArraySize            = 40'; echo 'MaxJobCount = 9'")
    assert max_array_size() == 40
    program(slurm, "scontrol", "exit 1")
    assert max_array_size() == 1001


def test_squeue_is_called_at_most_every_fifteen_seconds(tmp_path, slurm, monkeypatch):
    calls = tmp_path / "calls"
    program(slurm, "squeue", f"echo x >> {calls}; echo 5_0")
    one, two = jobs_of(tmp_path, 2)
    queue = _Queue({one: "5_0", two: "5_1"})
    clock = [1000.0]
    monkeypatch.setattr(slurm_cluster, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    ended = []
    for _ in range(61):
        ended.append(queue.find_ended())
        clock[0] += 1
    assert calls.read_text().count("x") == 5
    assert ended[0] == {} and list(ended[15]) == [two] and "5_1" in ended[60][two]
    program(slurm, "squeue", "exit 1")  # jobs keep their state while the controller is away
    clock[0] += 15
    assert list(queue.find_ended()) == [two]


class Refused(Exception):
    """Replaces submitit's error."""


class Executor:
    """Replaces submitit's executor: records settings and the number of jobs of each array."""

    submitted: list[tuple[dict[str, Any], int]]
    refused_array = 0  # the number of the array that is refused

    def __init__(self, folder: Path, max_num_timeout: int) -> None: ...

    def update_parameters(self, **settings: Any) -> None:
        self.submitted.append((settings, 0))

    def batch(self) -> Any:
        return nullcontext()

    def submit(self, function: Any) -> Any:
        if len(self.submitted) == self.refused_array:
            raise Refused("no such node")
        settings, n = self.submitted[-1]
        self.submitted[-1] = settings, n + 1
        return SimpleNamespace(job_id=f"{len(self.submitted)}_{n}")


@pytest.fixture
def executor(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> type[Executor]:
    core = SimpleNamespace(utils=SimpleNamespace(FailedJobError=Refused))
    fake = SimpleNamespace(SlurmExecutor=Executor, core=core, __spec__="found")
    monkeypatch.setitem(sys.modules, "submitit", fake)
    monkeypatch.setattr(Executor, "submitted", [], raising=False)
    program(slurm, "scontrol", "echo 'MaxArraySize = 1001'")
    return Executor


def test_arrays_have_one_kind_of_job_and_at_most_slurms_length(tmp_path, executor, monkeypatch):
    followed = []
    monkeypatch.setattr(slurm_cluster, "follow", lambda jobs, **values: followed.append(jobs))
    jobs = [*jobs_of(tmp_path / "far", 2, processes=4, nodes=2), *jobs_of(tmp_path, 1500)]
    jobs += [*jobs_of(tmp_path / "w", 1, processes=4), *jobs_of(tmp_path / "c", 1, on_cpu=True)]
    slurm_cluster.run(jobs, **SETTINGS)
    assert followed == [jobs]
    assert [n for _, n in executor.submitted] == [1001, 499, 1, 1, 2]
    first, second, *_, far = (settings for settings, _ in executor.submitted)
    assert first["array_parallelism"] + second["array_parallelism"] <= 100
    keys = ("nodes", "cpus_per_task", "gpus_per_node")
    kinds = [tuple(settings.get(key) for key in keys) for settings, _ in executor.submitted]
    assert kinds == [(1, 2, 1), (1, 2, 1), (1, 2, None), (1, 8, 4), (2, 8, 4)]
    assert far["ntasks_per_node"] == 1 and far["array_parallelism"] == 1
    assert far["srun_args"] == ["--cpus-per-task=8"], "srun does not inherit it"


def test_arrays_of_unequal_sizes_run_no_more_jobs_at_once_than_asked(
    tmp_path, executor, monkeypatch
):
    monkeypatch.setattr(slurm_cluster, "follow", lambda jobs, **values: None)
    jobs = jobs_of(tmp_path, 98)
    jobs += [*jobs_of(tmp_path / "b", 1, processes=2), *jobs_of(tmp_path / "c", 1, processes=4)]
    slurm_cluster.run(jobs, **{**SETTINGS, "n_jobs": 10})
    assert [s["array_parallelism"] for s, _ in executor.submitted] == [7, 1, 1]
    executor.submitted.clear()
    slurm_cluster.run(jobs[:98], **{**SETTINGS, "n_jobs": 10})
    assert [s["array_parallelism"] for s, _ in executor.submitted] == [10]


def test_queued_arrays_are_canceled_when_a_later_one_is_refused(
    tmp_path, slurm, executor, monkeypatch
):
    program(slurm, "scancel", f'echo "$@" >> {tmp_path / "calls"}')
    monkeypatch.setattr(executor, "refused_array", 2)
    jobs = [*jobs_of(tmp_path, 2), *jobs_of(tmp_path / "far", 1, processes=4, nodes=2)]
    with pytest.raises(UserError, match="Slurm refuses the job: no such node"):
        slurm_cluster.run(jobs, **SETTINGS)
    assert (tmp_path / "calls").read_text().split() == ["1_0", "1_1"]


def test_jobs_with_a_final_status_are_not_waited_for(tmp_path, capsys):
    """A failure of an earlier start does not count as one of this start."""
    jobs = jobs_of(tmp_path, 3)
    write_status(jobs[0].folder, (), "failed", reason="before")
    write_status(jobs[1].folder, (), "pending")
    rounds = []

    def find_ended() -> dict[Job, str]:
        rounds.append(1)
        if len(rounds) == 1:
            write_status(jobs[1].folder, (), "done", device="slurm:1")
        if len(rounds) == 2:
            write_status(jobs[0].folder, (), "running", device="slurm:2")
            return {jobs[2]: "Slurm ended job 3"}
        if len(rounds) == 3:
            write_status(jobs[0].folder, (), "done", device="slurm:2")
        return {}

    follow(jobs, find_ended=find_ended, cancel=lambda left: None, grace_seconds=1)
    assert len(rounds) == 3
    assert [state_of(job.folder) for job in jobs] == ["done", "done", "failed"]
    assert len([line for line in capsys.readouterr().out.splitlines() if " of 3)" in line]) == 3


def test_torchrun_gets_the_node_rank_and_the_master_address(tmp_path, slurm, monkeypatch):
    program(slurm, "scontrol", 'test "$3" = "n[1-2]" && printf "n1\\nn2\\n"')
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    command = ("python", "-m", "mtp_lightning.apps.train", "seed=1")
    job = Job(folder=tmp_path, overrides=(), command=command, processes=4, nodes=2)
    arguments = torchrun(job, node=1)
    assert arguments[:3] == (sys.executable, "-m", "torch.distributed.run")
    assert arguments[-3:] == ("-m", "mtp_lightning.apps.train", "seed=1")
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=4"} <= set(arguments)
    assert {"--master-addr=n1", "--master-port=24567"} <= set(arguments)


MACHINE = """
import json, sys
from pathlib import Path
from sweeps.process import Job
from sweeps.slurm_cluster import SlurmRun
folder, command = Path(sys.argv[1]), tuple(json.loads(sys.argv[2]))
SlurmRun(Job(folder=folder, overrides=("x",), command=command, nodes=2), threads=1)()
"""


@pytest.mark.slow
def test_two_nodes_train_one_run(tmp_path: Path, cache: Path, slurm: Path) -> None:
    """Two processes on this machine, with the environments that Slurm would set."""
    program(slurm, "scontrol", "echo 127.0.0.1")
    settings = {"trainer.num_nodes": 2, "trainer.strategy": "ddp", "data.batch_size": 4}
    # Builds the files that they share.
    train_here(tmp_path / "alone", cache, {"trainer.max_steps": 1})
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *overrides(cache, settings)]
    command += [f"run_dir={folder}", f"sweep_dir={tmp_path}"]
    machines = []
    for node in ("0", "1"):
        variables = {
            "SLURM_JOB_ID": str(int(time.time()) % 10_000), "SLURM_JOB_NODELIST": "here",
            "SLURM_NODEID": node, "SLURM_NTASKS": "2", "SLURM_PROCID": node,
        }  # fmt: skip
        machine = [sys.executable, "-c", MACHINE, str(folder), json.dumps(command)]
        env = {**environment(), **variables, "PYTHONPATH": str(ROOT)}
        machines.append(subprocess.Popen(machine, env=env, cwd=tmp_path))
    assert [machine.wait(240) for machine in machines] == [0, 0]
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "done" and status["device"].startswith("slurm:")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_size"] == 2 and rows(folder)
