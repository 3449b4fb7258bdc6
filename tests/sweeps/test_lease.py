"""Of all who ask for a job one has it, and one that is gone has it no more."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from sweeps.lease import FOLDER, Leases, live


def at(folder: Path, owner: str, **values: float) -> Leases:
    return Leases(folder, owner=owner, **values)


def grow_old(folder: Path, lease: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / FOLDER / lease, (then, then))


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    """Twenty threads, a hundred jobs, each asking for all at once."""
    jobs = [f"seed-{i}.5" for i in range(100)]  # names with dots, as values have them
    workers = [at(tmp_path, str(i)) for i in range(20)]
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


def test_a_stale_one_is_taken_over_by_one(tmp_path: Path) -> None:
    gone, a, b = (at(tmp_path, name, stale_seconds=120) for name in ("gone", "a", "b"))
    assert gone.take("job", None)
    seen = {name: w.look()["job"] for name, w in (("a", a), ("b", b))}
    assert not a.free(seen["a"]) and a.owner(seen["a"]) == "gone"
    grow_old(tmp_path, "job.1", 119)
    assert not a.free(a.look()["job"])
    grow_old(tmp_path, "job.1", 121)
    seen = {name: w.look()["job"] for name, w in (("a", a), ("b", b))}
    assert a.free(seen["a"]) and b.free(seen["b"])
    assert a.take("job", seen["a"])
    # b looked before a took it: what it then does touches nothing of a's.
    assert not b.take("job", seen["b"])
    assert a.look()["job"].number == 2 and a.owner(a.look()["job"]) == "a"
    assert a.beat() == [] and gone.beat() == ["job"] and gone.held == []
    gone.release("job")
    assert not b.free(b.look()["job"]), "one who has lost it cannot let go of it"


def test_beating_keeps_it_and_letting_go_frees_it_at_once(tmp_path: Path) -> None:
    a, b = at(tmp_path, "a", stale_seconds=120), at(tmp_path, "b", stale_seconds=120)
    assert a.take("job", None)
    grow_old(tmp_path, "job.1", 500)
    assert a.beat() == []
    assert not b.free(b.look()["job"])
    a.release("job")
    assert b.free(b.look()["job"]) and b.take("job", b.look()["job"])


def test_only_the_file_servers_clock_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = at(tmp_path, "a"), at(tmp_path, "b")
    assert a.take("job", None)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a machine whose clock is wrong
    assert abs(b.look()["job"].age) < 60


def test_who_is_at_work(tmp_path: Path) -> None:
    assert live(tmp_path) == []
    a = at(tmp_path, "a")
    assert a.take("one", None) and a.take("two", None)
    a.release("one")
    assert [lease.job for lease in live(tmp_path)] == ["two"]
    a.release_all()
    assert live(tmp_path) == []
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["one.1", "two.1"]
