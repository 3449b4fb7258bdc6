"""Who gets which devices, and with how many threads."""

from __future__ import annotations

import pytest

from sweeps import devices
from sweeps.devices import DeviceQueue, choose_gpus, clean_environment


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-abc,3")


def test_gpus_are_handed_out_once() -> None:
    queue = DeviceQueue(gpus=["0", "1", "2"], n_tasks=9)
    one, two = queue.take(1), queue.take(2)
    assert one is not None and two is not None
    assert (one.gpus, two.gpus) == (("0",), ("1", "2"))
    assert one.environment()["CUDA_VISIBLE_DEVICES"] == "0"
    assert two.environment()["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert str(two) == "cuda:1,2"
    assert queue.take(1) is None and not queue.has_room
    queue.give_back(one)
    assert queue.take(2) is None
    again = queue.take(1)
    assert again is not None and again.gpus == ("0",)


def test_a_job_that_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 GPUs, and there are 2"):
        DeviceQueue(gpus=["0", "1"]).take(3)


@pytest.mark.parametrize(
    ("n_jobs", "n_tasks", "processes", "at_once", "threads"),
    [
        (None, 9, 1, 8, 1),  # a job a core
        (None, 9, 2, 4, 1),  # a core a process
        (None, 9, 3, 2, 1),
        (None, 9, 20, 1, 1),
        (8, 9, 1, 8, 1),
        (2, 9, 1, 2, 4),
        (2, 9, 2, 2, 2),  # the processes of a job share
        (8, 9, 2, 8, 1),
        (None, 1, 1, 1, 1),  # as many threads, whatever other jobs there are
        (1, 9, 1, 1, 8),  # a single job at a time gets all
        (20, 30, 1, 20, 1),
    ],
)
def test_cores_are_divided(
    n_jobs: int | None, n_tasks: int, processes: int, at_once: int, threads: int
) -> None:
    queue = DeviceQueue(n_jobs=n_jobs, n_tasks=n_tasks)
    taken = [queue.take(processes) for _ in range(at_once)]
    assert queue.take(processes) is None
    first = taken[0]
    assert first is not None
    assert sorted(str(d) for d in taken) == sorted(f"cpu:{i}" for i in range(at_once))
    environment = first.environment()
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == str(threads)
    for job in taken:
        assert job is not None
        queue.give_back(job)
    again = [queue.take(processes) for _ in range(at_once)]
    assert None not in again and queue.take(processes) is None
    # A job for the CPU does not find the GPU that is there.
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_no_jobs_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="n_jobs must be at least 1, not 0"):
        DeviceQueue(n_jobs=0)


def test_what_launchers_leave_behind_does_not_reach_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    leaks = ("LOCAL_RANK", "MASTER_PORT", "PL_GLOBAL_SEED", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID")
    for name in leaks:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    kept = clean_environment()
    assert not kept.keys() & set(leaks)
    assert kept["SLURM_JOB_ID"] == "7"


def test_choosing_gpus() -> None:
    assert choose_gpus("auto") == ["0", "1", "GPU-abc", "3"]
    assert choose_gpus("cpu") == []
    assert choose_gpus([3, 0]) == ["3", "0"]
    for wrong in ([7], [0, 0], "cuda", []):
        with pytest.raises(ValueError, match=r"hydra\.launcher\.devices"):
            choose_gpus(wrong)  # type: ignore[arg-type]


def test_gpus_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.find_gpus() == []
