"""Workers share a sweep through leases in its folder, and continue the jobs of killed ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from mtp_lightning.command_line.quote import quoted
from mtp_lightning.run.status import read_status, state_of, write_status
from sweeps.devices import DeviceQueue
from sweeps.display import Display
from sweeps.lease import FOLDER, Leases, live
from sweeps.plan import Recipe, SweepPlan
from sweeps.pool import Pool
from sweeps.process import Job
from sweeps.work import SweepWorker, main
from tests.integration import helpers
from tests.integration.helpers import ROOT, rows, train_here, typed
from tests.sweeps.typed import command, execute, job_folders, job_states, wait_until

# Replaces a run: it writes its summary exclusively, or fails if its seed is 13.
STUB = """
import json, os, sys, time
if "-m" in sys.argv:
    from mtp_lightning.apps.train import main
    main()
    sys.exit()
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = values["run_dir"].strip("'")
with open(f"{folder}/begun", "a") as begun:
    begun.write("x")
if os.path.exists(f"{folder}/summary.json"):
    open(f"{folder}/ended", "a").close()
    sys.exit()  # finished, but its worker was killed before it could write the status
time.sleep(float(os.environ["STUB_SECONDS"]))
if values["seed"] == "13" and "FAIL" in os.environ:
    sys.exit("error: unlucky")
with open(f"{folder}/summary.json", "x") as file:
    json.dump({"seed": int(values["seed"])}, file)
open(f"{folder}/ended", "a").close()
"""


def stubs(folder: Path, seeds: str, *more: str) -> list[str]:
    """The command line of a sweep whose jobs are stubs."""
    command = [sys.executable, str(folder.parent / "stub.py"), "-m", f"seed={seeds}"]
    return [*command, "trainer.accelerator=cpu", f"sweep_dir={quoted(str(folder))}", *more]


def planned(tmp_path: Path, seeds: str) -> Path:
    """The folder of a planned sweep of stubs, at a path with spaces."""
    (programs := tmp_path / "my programs").mkdir()
    (programs / "stub.py").write_text(STUB)
    args = stubs(programs / "sweep", seeds, "hydra/launcher=plan")
    assert "python -m sweeps.work sweep" in execute(args, programs).stdout
    return programs / "sweep"


# The environment of a worker and its stubs.
WORKER = {"PYTHONPATH": str(ROOT), "STUB_SECONDS": "0"}


def start(folder: Path, *more: str, real: bool = False, **values: str) -> subprocess.Popen[bytes]:
    """A worker whose jobs are stubs, or real runs."""
    program = [] if real else ["--program", f"'{folder.parent / 'stub.py'}'"]
    command = [sys.executable, "-m", "sweeps.work", str(folder), *program, *more]
    environment = {**WORKER, **values}
    return helpers.start(command, folder.parent / "workers.log", cwd=folder.parent, **environment)


def status_output(folder: Path, *, code: int = 0) -> str:
    """The output of ``sweeps.status``."""
    command = [sys.executable, "-m", "sweeps.status", str(folder)]
    return execute(command, folder, code=code).stdout


def log_of(folder: Path) -> str:
    return (folder.parent / "workers.log").read_text()


@pytest.mark.slow
def test_two_workers_do_each_job_once(tmp_path: Path) -> None:
    folder = planned(tmp_path, "range(10,20)")
    assert "10 jobs: 10 pending" in status_output(folder, code=2)
    workers = [start(folder, "--n-jobs=2", "--stale=4", FAIL="1") for _ in range(2)]
    for worker in workers:
        assert worker.wait(240) == 0, log_of(folder)
    begun = {job.parent.name: job.read_text() for job in folder.glob("*/begun")}
    assert begun == {f"seed-{i}": "x" for i in range(10, 20)}
    assert sorted(job_states(folder).values()) == ["done"] * 9 + ["failed"]
    output = status_output(folder, code=1)
    assert "10 jobs: 9 done, 1 failed" in output and "error: unlucky" in output
    assert "9 of 10 jobs done" in log_of(folder)
    assert set(log_of(folder).split()) & {"started", "done", "failed"}
    # A failed job stays failed until the sweep is planned with sweep.retry_failed=true.
    assert start(folder, FAIL="1").wait(240) == 0
    assert {job.read_text() for job in folder.glob("*/begun")} == {"x"}
    again = stubs(folder, "range(10,20)", "hydra/launcher=plan", "sweep.retry_failed=true")
    assert "9 done before" in execute(again, tmp_path).stdout
    assert start(folder).wait(240) == 0
    assert "(1 of 1)" in log_of(folder), "nine had ended before"
    assert set(job_states(folder).values()) == {"done"} and status_output(folder)


@pytest.mark.slow
def test_another_worker_continues_the_jobs_of_a_stopped_one(tmp_path: Path) -> None:
    folder = planned(tmp_path, "0,1,2")
    first = start(folder, "--n-jobs=1", STUB_SECONDS="60")
    wait_until(lambda: list(folder.glob("*/begun")))
    output = status_output(folder, code=2)
    assert "1 running" in output and f"{os.uname().nodename}-{first.pid}" in output
    # A sweep cannot run the jobs meanwhile.
    assert "Workers are at work" in execute(stubs(folder, "0,1,2"), tmp_path, code=1).stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(240) == 143, log_of(folder)
    assert sorted(job_states(folder).values()) == ["interrupted", "pending", "pending"]
    # It released its leases, so another worker need not wait until they are stale.
    assert start(folder, "--n-jobs=2").wait(240) == 0
    assert set(job_states(folder).values()) == {"done"}
    assert sorted(job.read_text() for job in folder.glob("*/begun")) == ["x", "x", "xx"]


def recipe_of(processes: int, nodes: int, *, on_cpu: bool, max_steps: int | None = 1) -> Recipe:
    size = {"processes": processes, "nodes": nodes, "on_cpu": on_cpu, "max_steps": max_steps}
    return Recipe(program="train", options=(), cwd="/", **size)


def test_a_worker_stops_a_job_that_another_has_taken_over(tmp_path: Path) -> None:
    """A worker that slept too long loses its lease, and leaves the status of the new owner."""
    recipe = recipe_of(1, 1, on_cpu=True)
    sweep = SweepPlan(tmp_path)
    for job in sweep.add([["seed=0"], ["seed=1"]]):
        job.recipe = recipe
    leases, other = (Leases(tmp_path, owner=name, stale_seconds=9) for name in ("a", "b"))
    queue = DeviceQueue(n_jobs=2)
    worker = SweepWorker(sweep, leases=leases, queue=queue)
    sleeps = "trap '' TERM; echo > begun; sleep 600"
    programs = {"seed-0": sleeps, "seed-1": "echo {} > summary.json"}
    for name, job in worker.jobs.items():
        job.folder.mkdir()
        command = ("sh", "-c", f"cd {job.folder}; {programs[name]}")
        worker.jobs[name] = replace(job, command=command)
    began = time.monotonic()

    def watch(job: Job) -> str | None:
        if (tmp_path / "seed-0" / "begun").exists() and not other.held:
            assert other.take("seed-0", leases.look()["seed-0"])
            write_status(tmp_path / "seed-0", ["seed=0"], "running", device="other")
            worker.leases.beat()
        return worker.watch(job)

    Pool(queue=queue, display=Display(2), grace_seconds=60).run(
        worker, watch=watch, ended=worker.ended
    )
    assert time.monotonic() - began < 300
    status = read_status(tmp_path / "seed-0")
    assert (status["state"], status["device"]) == ("running", "other")
    assert state_of(tmp_path / "seed-1") == "done" and leases.held == []
    assert not leases.free(leases.look()["seed-0"]), "the other worker has the lease"
    assert worker.drop_ended()
    write_status(tmp_path / "seed-0", ["seed=0"], "failed")
    assert not worker.drop_ended()


# Ends its own job, and as another worker would that of seed 1.
ENDS_BOTH = """
import sys
from pathlib import Path
from mtp_lightning.run.status import write_status
values = dict(argument.replace("'", "").split("=", 1) for argument in sys.argv[1:])
(Path(values["run_dir"]) / "summary.json").write_text("{}")
other = Path(values["sweep_dir"]) / "seed-1"
write_status(other, ["seed=1"], "done")
(other / "summary.json").write_text("{}")
"""


def test_the_jobs_that_other_workers_end_are_counted(tmp_path: Path, capsys) -> None:
    (stub := tmp_path / "stub.py").write_text(ENDS_BOTH)
    sweep = SweepPlan(tmp_path / "sweep")
    for job in sweep.add([["seed=0"], ["seed=1"]]):
        job.recipe = replace(recipe_of(1, 1, on_cpu=True), program=str(stub))
    sweep.write([])
    main([str(sweep.folder), f"--program={stub}", "--n-jobs=1"])
    printed = capsys.readouterr().out
    assert "done seed=0 (2 of 2)" in printed and "2 of 2 jobs done" in printed


def test_a_worker_takes_only_jobs_that_fit_its_devices(tmp_path: Path) -> None:
    sweep = SweepPlan(tmp_path)
    sweep.add([["a=1"], ["a=2"], ["a=3"], ["a=4"]])
    sizes = [(1, 1, False), (4, 1, False), (4, 1, True), (1, 2, False)]
    for job, (n, m, cpu) in zip(sweep.jobs, sizes, strict=True):
        job.recipe = recipe_of(n, m, max_steps=n - 1 or None, on_cpu=cpu)
    sweep.write([])
    stored = SweepPlan(tmp_path)
    assert stored.jobs == sweep.jobs
    leases = Leases(tmp_path, owner="a")
    queue = DeviceQueue(gpus=["0", "1"])
    worker = SweepWorker(stored, leases=leases, queue=queue)
    assert list(worker.too_large) == ["a-2", "a-4"]
    assert [job.name for job in takewhile(bool, worker)] == ["a-1", "a-3"] == leases.held


def test_invalid_folders_and_options_of_workers_are_refused(tmp_path, capsys):
    sweep = SweepPlan(folder := tmp_path / "sweep")
    for job in sweep.add([["seed=0"], ["seed=1"]]):
        job.recipe = replace(recipe_of(1, 1, on_cpu=True), program="/my/stub.py")
    sweep.write([])
    (empty := tmp_path / "empty").mkdir()
    stored = json.loads((folder / "sweep.json").read_text())
    cases = [
        ([str(empty)], "holds no planned sweep"),
        ([str(tmp_path / "none")], "There is no folder"),
        ([str(folder)], "--program /my/stub.py"),
        ([str(folder), "--program=no quote'"], "--program"),
        ([str(folder), "--stale=0"], "--stale must be above 0"),
        *(
            ([str(folder), f"--grace-seconds={n}"], "must be at least 0")
            for n in ("nan", "-5", "inf")
        ),
        ([str(folder), "--threads=many"], "threads_per_process=many"),
    ]
    for name, changed, message in (
        ("cwd", {"cwd": "/not/here"}, "has no such folder"),
        ("own", {"program": "train"}, "run this project's train.py: leave --program out"),
        ("run", None, "does not say how"),
    ):
        (copy := tmp_path / name).mkdir()
        jobs = [{key: job[key] for key in ("folder", "overrides")} for job in stored["jobs"]]
        if changed is not None:
            jobs = [{**job, "run": {**job["run"], **changed}} for job in stored["jobs"]]
        (copy / "sweep.json").write_text(json.dumps({**stored, "jobs": jobs}))
        cases.append(([str(copy), "--program=x"], message))
    for arguments, message in cases:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_three_workers_do_a_thousand_jobs_though_one_is_killed(tmp_path: Path) -> None:
    began = time.process_time(), time.monotonic()
    folder = planned(tmp_path, "range(1000)")
    assert len(SweepPlan(folder).jobs) == 1000
    print(f"planned in {time.monotonic() - began[1]:.1f} s")
    began_work = time.monotonic()
    settings = ("--n-jobs=4", "--stale=5")
    workers = [start(folder, *settings, STUB_SECONDS="0.1") for _ in range(3)]
    wait_until(lambda: len(list(folder.glob("*/ended"))) > 100)
    workers[0].kill()
    assert workers[0].wait() == -signal.SIGKILL
    begun_by_killed = [
        job for job in job_folders(folder).values() if _is_of(job, workers[0].pid, folder)
    ]
    assert begun_by_killed
    for worker in workers[1:]:
        assert worker.wait(400) == 0, log_of(folder)
    print(f"worked in {time.monotonic() - began_work:.1f} s")
    assert set(job_states(folder).values()) == {"done"}
    # No job was lost or finished twice: the stub creates its summary exclusively.
    assert len(list(folder.glob("*/ended"))) == 1000
    twice = {job.parent for job in folder.glob("*/begun") if job.read_text() != "x"}
    assert twice <= set(begun_by_killed), "only jobs of the killed worker run again"
    assert all((folder / ".leases" / f"{job.name}.2").exists() for job in twice)
    assert not list((folder / ".leases").glob("*.3"))


def _is_of(job: Path, pid: int, folder: Path) -> bool:
    file = folder / ".leases" / f"{job.name}.1"
    owner = json.loads(file.read_text() or "{}").get("owner", "") if file.exists() else ""
    return owner.endswith(f"-{pid}") and state_of(job) != "done"


@pytest.mark.slow
def test_another_worker_continues_the_run_of_a_killed_one(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    settings = typed(
        "seed=0,1 trainer.max_steps=150 trainer.val_check_interval=150 "
        "callbacks.checkpoints.every_n_steps=10"
    )
    execute(command(folder, cache, settings, launcher="plan"), tmp_path)
    options = ("--n-jobs=1", "--stale=6", "--allow", str(cache))
    first = start(folder, *options, real=True)
    wait_until(lambda: list(folder.glob("*/checkpoints/last.ckpt")))
    second = start(folder, *options, real=True)
    first.kill()
    first.wait()
    assert second.wait(300) == 0, log_of(folder)
    assert set(job_states(folder).values()) == {"done"}
    logs = {job.name: (job / "job.log").read_text() for job in job_folders(folder).values()}
    assert sum("Continuing" in text for text in logs.values()) == 1
    train_here(tmp_path / "alone", cache, {**settings, "seed": 0})
    assert rows(job_folders(folder)["seed=0"]) == rows(tmp_path / "alone")


# Leases.


def make_old(folder: Path, lease: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / FOLDER / lease, (then, then))


def test_only_one_of_many_workers_gets_a_job(tmp_path: Path) -> None:
    """Twenty threads that each ask for a hundred jobs at the same time."""
    jobs = [f"seed-{i}.5" for i in range(100)]  # names with dots, as values have them
    workers = [Leases(tmp_path, owner=str(i)) for i in range(20)]
    barrier = threading.Barrier(len(workers))

    def ask(worker: Leases) -> None:
        barrier.wait()
        for job in jobs:
            worker.take(job, None)

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = sorted(job for worker in workers for job in worker.held)
    assert held == sorted(jobs)
    assert {lease.number for lease in workers[0].look().values()} == {1}


def test_a_stale_lease_is_taken_over_by_only_one_worker(tmp_path: Path) -> None:
    gone, a, b = (Leases(tmp_path, owner=name, stale_seconds=120) for name in ("gone", "a", "b"))
    assert gone.take("job", None)
    seen = a.look()["job"]
    assert not a.free(seen) and a.owner(seen) == "gone"
    (tmp_path / FOLDER / "job.1").write_text("[" * 100_000)
    assert a.owner(seen) == "", "a damaged lease has no owner"
    make_old(tmp_path, "job.1", 119)
    assert not a.free(a.look()["job"])
    make_old(tmp_path, "job.1", 121)
    seen_by_a, seen_by_b = a.look()["job"], b.look()["job"]
    assert a.free(seen_by_a) and b.free(seen_by_b)
    assert a.take("job", seen_by_a)
    # b looked before a took the job, and cannot take it from a.
    assert not b.take("job", seen_by_b)
    assert a.look()["job"].number == 2 and a.owner(a.look()["job"]) == "a"
    a.beat()
    gone.beat()
    assert a.held == ["job"] and gone.held == []
    gone.release("job")
    assert not b.free(b.look()["job"]), "a worker that has lost a lease cannot release it"


def test_a_heartbeat_keeps_a_lease_and_a_release_frees_it(tmp_path: Path) -> None:
    a, b = (Leases(tmp_path, owner=name, stale_seconds=120) for name in "ab")
    assert a.take("job", None)
    make_old(tmp_path, "job.1", 500)
    a.beat()
    assert not b.free(b.look()["job"])
    a.release("job")
    assert b.free(b.look()["job"]) and b.take("job", b.look()["job"])


def test_a_file_server_that_is_away_for_a_moment_stops_no_heartbeat(tmp_path, monkeypatch):
    a, b = (Leases(tmp_path, owner=name) for name in "ab")
    assert a.take("job", None)
    with monkeypatch.context() as away:
        error = OSError(errno.ESTALE, "Stale file handle")
        away.setattr(Path, "exists", lambda self: (_ for _ in ()).throw(error))
        a.beat()
        assert a.held == ["job"]
    assert b.take("job", b.look()["job"])
    a.beat()
    assert a.held == []


def test_the_age_of_a_lease_is_by_the_file_servers_clock(tmp_path, monkeypatch):
    a, b = (Leases(tmp_path, owner=name) for name in "ab")
    assert a.take("job", None)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a machine whose clock is wrong
    assert abs(b.look()["job"].age) < 60


def test_live_leases_exclude_released_ones(tmp_path: Path) -> None:
    assert live(tmp_path) == []
    a = Leases(tmp_path, owner="a")
    assert a.take("one", None) and a.take("two", None)
    a.release("one")
    assert [lease.job for lease in live(tmp_path)] == ["two"]
    a.release_all()
    assert live(tmp_path) == []
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["one.1", "two.1"]
