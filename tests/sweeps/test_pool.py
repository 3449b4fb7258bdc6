"""The pool that runs jobs, with small shell programs as jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT
from mtp_lightning.run.layout import LOG_FILE
from mtp_lightning.run.lock import Lock
from mtp_lightning.run.status import read_status, state_of, write_status
from sweeps import pool as pools
from sweeps import process
from sweeps.devices import DeviceQueue
from sweeps.display import Display
from sweeps.pool import Pool, run
from sweeps.process import Job, JobProcess
from tests.sweeps.typed import wait_until

DONE = "echo '{}' > summary.json"


def job(folder: Path, program: str, **values: Any) -> Job:
    """A job that runs a shell program in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ("sh", "-c", f"cd {folder}; {program}")
    return Job(folder=folder, overrides=(f"job={folder.name}",), command=command, **values)


def pool(total: int, *, n_jobs: int = 2, grace_seconds: float = 120.0, **queue: Any) -> Pool:
    devices = DeviceQueue(n_jobs=n_jobs, **queue)
    return Pool(queue=devices, display=Display(total), grace_seconds=grace_seconds)


def status(job: Job) -> dict[str, Any]:
    return read_status(job.folder)


def wait_for(file: Path) -> str:
    wait_until(lambda: file.exists() and file.read_text())
    return file.read_text()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_every_job_has_its_own_status_and_stops_no_other(tmp_path, capsys):
    jobs = [
        job(tmp_path / "good", f"sleep 0.3; {DONE}"),
        job(tmp_path / "error", "echo 'error: a bad value' >&2; exit 1"),
        job(tmp_path / "killed", "kill -9 $$"),
        job(tmp_path / "empty", "true"),
        job(tmp_path / "stopped", "exit 143"),
        Job(folder=tmp_path / "missing", overrides=(), command=("/no/such/program",)),
        job(tmp_path / "last", DONE),
    ]
    pool(len(jobs)).run(jobs)
    states = [status(one)["state"] for one in jobs]
    assert states == ["done", "failed", "failed", "failed", "interrupted", "failed", "done"]
    assert status(jobs[1])["reason"] == "exit code 1: error: a bad value"
    assert status(jobs[1])["exit_code"] == 1
    assert "SIGKILL" in status(jobs[2])["reason"]
    assert "summary.json" in status(jobs[3])["reason"]
    assert "/no/such/program" in status(jobs[5])["reason"]
    good = status(jobs[0])
    assert good["device"] in ("cpu:0", "cpu:1") and good["overrides"] == ["job=good"]
    assert good["started"] <= good["ended"] and good["reason"] is None
    printed = capsys.readouterr().out
    assert "failed error (" in printed and str(tmp_path / "error" / LOG_FILE) in printed


def test_jobs_use_all_gpus_and_share_none(tmp_path: Path) -> None:
    timed = "date +%s%N > a; sleep 0.3; date +%s%N > b"
    program, needs = f'echo "$CUDA_VISIBLE_DEVICES" > gpus; {timed}; {DONE}', [1, 2, 1, 1]
    jobs = [job(tmp_path / str(i), program, processes=n) for i, n in enumerate(needs)]
    pool(len(jobs), n_jobs=2, gpus=["4", "7"]).run(jobs)
    spans, gpus = [], []
    for t in jobs:
        spans.append(tuple(int((t.folder / name).read_text()) for name in "ab"))
        gpus.append((t.folder / "gpus").read_text().strip().split(","))
    assert [len(names) for names in gpus] == needs
    for (one, own), (other, others) in combinations(zip(spans, gpus, strict=True), 2):
        if max(one[0], other[0]) < min(one[1], other[1]):  # at the same time
            assert not set(own) & set(others)
    assert spans[3][0] < spans[2][1], "the last two jobs run at the same time"


def hopeless_if_up(job: Job) -> str | None:
    """A reason to stop the job, as soon as its file ``up`` exists."""
    return "hopeless" if (job.folder / "up").exists() else None


def test_a_watcher_stops_a_job(tmp_path: Path) -> None:
    jobs = [job(tmp_path / "slow", "echo up > up; exec sleep 60"), job(tmp_path / "b", DONE)]
    ended = []
    pool(2).run(jobs, watch=hopeless_if_up, ended=lambda t: ended.append(t.folder.name))
    assert (status(jobs[0])["state"], status(jobs[0])["reason"]) == ("interrupted", "hopeless")
    assert state_of(jobs[1].folder) == "done"
    assert sorted(ended) == ["b", "slow"]


def test_jobs_that_a_users_mistake_stops_say_it_as_a_sentence(tmp_path: Path) -> None:
    slow = job(tmp_path / "slow", "echo up > up; exec sleep 60")

    def refuse_if_up(job: Job) -> None:
        if hopeless_if_up(job):
            raise UserError("--metric x was not logged.")

    with pytest.raises(UserError):
        pool(1).run([slow], watch=refuse_if_up)
    assert status(slow)["reason"] == "--metric x was not logged."


def test_a_job_that_is_stopped_after_its_summary_is_done(tmp_path: Path) -> None:
    ending = job(tmp_path / "ending", f"sleep 0.5; {DONE}; echo up > up; sleep 60")
    working = job(tmp_path / "working", f"{DONE}; touch -d '1 hour ago' summary.json; "
                                        "echo up > up; sleep 60")  # fmt: skip
    by_itself = job(tmp_path / "by_itself", f"sleep 0.5; {DONE}; exit 143")
    pool(3, n_jobs=3).run([ending, working, by_itself], watch=hopeless_if_up)
    assert [state_of(one.folder) for one in (ending, working, by_itself)] == [
        "done", "interrupted", "done",
    ]  # fmt: skip
    assert status(ending)["reason"] is None and status(working)["reason"] == "hopeless"


def test_child_processes_of_a_finished_job_are_ended(tmp_path: Path) -> None:
    one = job(tmp_path / "parent", f"(echo $$ > x; exec sleep 60) & echo $! > child; {DONE}")
    pool(1).run([one])
    assert state_of(one.folder) == "done"
    child = int((one.folder / "child").read_text())
    wait_until(lambda: has_ended(child))


def test_the_log_of_a_restarted_job_is_appended(tmp_path: Path) -> None:
    pool(1).run([job(tmp_path / "a", "echo 'error: first'; exit 1")])
    two = job(tmp_path / "a", f"echo second; {DONE}")
    pool(1).run([two])
    log = (tmp_path / "a" / LOG_FILE).read_text()
    assert log.index("first") < log.index("--- started again") < log.index("second")
    assert state_of(two.folder) == "done"


SWEEP = """
import sys
from pathlib import Path
from sweeps.devices import DeviceQueue
from sweeps.display import Display
from sweeps.pool import Pool
from sweeps.process import Job
base = Path(sys.argv[1])
saves = "trap 'echo saved > saved; exit 143' TERM; echo $$ > pid; while true; do sleep 0.05; done"
deaf = "trap '' TERM; echo $$ > pid; while true; do sleep 0.05; done"
jobs = []
for name, program in (("one", saves), ("two", sys.argv[2] == "deaf" and deaf or saves)):
    (base / name).mkdir()
    command = ("sh", "-c", f"cd {base / name}; {program}")
    jobs.append(Job(folder=base / name, overrides=(name,), command=command))
Pool(queue=DeviceQueue(n_jobs=2), display=Display(2), grace_seconds=1).run(jobs)
"""


def start_sweep(tmp_path: Path, kind: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    program = tmp_path / "sweep.py"
    program.write_text(textwrap.dedent(SWEEP))
    command = [sys.executable, str(program), str(tmp_path), kind]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    return process, [int(wait_for(tmp_path / name / "pid")) for name in ("one", "two")]


@pytest.mark.parametrize(("kind", "signum"), [("saving", signal.SIGINT), ("deaf", signal.SIGTERM)])
def test_interrupted_jobs_save_and_have_the_signal_as_reason(tmp_path, kind, signum):
    process, pids = start_sweep(tmp_path, kind)
    process.send_signal(signum)
    assert process.wait(120) != 0
    wait_until(lambda: all(map(has_ended, pids)))
    assert (tmp_path / "one" / "saved").exists()
    # A job that ignores SIGTERM is killed after the grace period.
    assert (tmp_path / "two" / "saved").exists() == (kind != "deaf")
    for name in ("one", "two"):
        job_status = read_status(tmp_path / name)
        reason = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        assert (job_status["state"], job_status["reason"]) == ("interrupted", reason)


def test_a_killed_sweep_leaves_no_process(tmp_path: Path) -> None:
    process, pids = start_sweep(tmp_path, "deaf")
    process.kill()
    process.wait()
    wait_until(lambda: all(map(has_ended, pids)))
    assert (tmp_path / "one" / "saved").exists() and not (tmp_path / "two" / "saved").exists()
    assert state_of(tmp_path / "one") == "running", "no process was left to write a status"


def test_a_job_waits_for_a_process_of_an_earlier_sweep(tmp_path: Path) -> None:
    one = job(tmp_path / "a", DONE)
    holder = Lock(one.folder / ".lock")
    assert holder.acquire()
    threading.Timer(0.3, holder.release).start()
    pool(1).run([one])
    assert state_of(one.folder) == "done"


def test_ctrl_c_ends_the_wait_for_a_process_of_an_earlier_sweep(tmp_path: Path) -> None:
    one = job(tmp_path / "a", DONE)
    holder = Lock(one.folder / ".lock")
    assert holder.acquire()
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):  # else the test waits for a minute and does not raise
        pool(1).run([one])
    holder.release()
    pool(1).run([one])
    assert state_of(one.folder) == "done"


@pytest.mark.parametrize("finished", ["since", "before", "not", "seen"])
def test_a_job_that_finished_without_its_sweep_is_not_run_again(tmp_path, finished):
    one = job(tmp_path / "a", f"echo x >> begun; {DONE}")
    # Slurm queues a job again that was asked to save, also if it ended well instead.
    write_status(one.folder, one.overrides, "done" if finished == "seen" else "running")
    if finished != "not":
        (one.folder / "summary.json").write_text("{}")
        # A summary older than the status is of an earlier start, and does not count.
        at = (one.folder / "status.json").stat().st_mtime + (5 if finished == "since" else -5)
        os.utime(one.folder / "summary.json", (at, at))
    pool(1).run([one])
    assert (status(one)["state"], status(one)["exit_code"]) == ("done", 0)
    assert (one.folder / "begun").exists() == (finished in ("before", "not"))


def test_jobs_of_several_nodes_are_refused_before_any_starts(tmp_path: Path) -> None:
    far, wide = (job(tmp_path / name, DONE, **{name: 2}) for name in ("nodes", "processes"))
    with pytest.raises(UserError, match="num_nodes=2 in a sweep takes hydra/launcher=slurm"):
        run([wide, far])
    assert read_status(wide.folder) == read_status(far.folder) == {}


def test_jobs_on_the_cpu_run_next_to_jobs_on_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    wide = job(tmp_path / "wide", DONE, processes=2, on_cpu=True)
    other = job(tmp_path / "other", DONE)
    run([wide, other])
    assert [status(each)["state"] for each in (wide, other)] == ["done", "done"]
    assert status(wide)["device"].startswith("cpu:") and status(other)["device"] == "cuda:0"


def test_a_job_whose_status_cannot_be_written_is_ended(tmp_path: Path, monkeypatch) -> None:
    one = job(tmp_path / "a", "echo $$ > pid; exec sleep 60")

    def full(self: JobProcess, state: str) -> None:
        wait_for(tmp_path / "a" / "pid")
        raise OSError("the disk is full")

    monkeypatch.setattr(JobProcess, "_write", full)
    pool(1).run([one])
    assert status(one)["reason"] == "not started: the disk is full"
    wait_until(lambda: has_ended(int(wait_for(tmp_path / "a" / "pid"))))


def test_a_job_in_a_folder_that_cannot_be_written_stops_no_other(tmp_path, monkeypatch, capsys):
    jobs = [job(tmp_path / name, DONE) for name in "abc"]

    def write(folder: Path, *values: Any, **more: Any) -> None:
        if folder.name == "b":
            raise PermissionError("this folder is another user's")
        write_status(folder, *values, **more)

    monkeypatch.setattr(pools, "write_status", write)
    monkeypatch.setattr(process, "write_status", write)
    pool(3, n_jobs=1).run(jobs)
    assert [state_of(each.folder) for each in jobs] == ["done", "pending", "done"]
    assert "not started: this folder is another user's" in capsys.readouterr().out


def test_a_full_disk_at_the_end_of_a_job_lets_the_others_save(tmp_path, monkeypatch):
    other = job(
        tmp_path / "other",
        "trap 'touch saved; exit 0' TERM; touch began; while :; do sleep .1; done",
    )
    one = job(tmp_path / "one", f"while [ ! -e ../other/began ]; do sleep .1; done; {DONE}")

    def write(folder: Path, overrides: Any, state: str, **more: Any) -> None:
        if state != "running":
            raise OSError(28, "No space left on device")
        write_status(folder, overrides, state, **more)

    monkeypatch.setattr(process, "write_status", write)
    with pytest.raises(OSError, match="No space left"):
        pool(2).run([other, one])
    assert (other.folder / "saved").exists()


def test_a_job_without_a_watchdog_is_not_started_and_keeps_no_lock(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError("no process is left")

    one = job(tmp_path / "a", DONE)
    with monkeypatch.context() as patch:
        patch.setattr(process, "_Watchdog", none)
        pool(1).run([one])
    assert status(one)["reason"] == "not started: no process is left"
    pool(1).run([one])
    assert state_of(one.folder) == "done"


def test_a_job_locked_by_an_earlier_start_is_interrupted(tmp_path: Path, monkeypatch) -> None:
    """The earlier process may still finish the job; otherwise the next start runs it."""
    one = job(tmp_path / "a", DONE)
    holder = Lock(one.folder / ".lock")
    assert holder.acquire()
    monkeypatch.setattr(Lock, "wait", lambda self, seconds, before: self.acquire())
    pool(1).run([one])
    assert status(one)["state"] == "interrupted" and "still in use" in status(one)["reason"]
    holder.release()
    pool(1).run([one])
    assert state_of(one.folder) == "done"
