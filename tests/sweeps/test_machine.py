"""Devices and threads of jobs, and how many jobs fit in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning.system import cores, cpu_quota
from sweeps import devices
from sweeps.devices import DeviceQueue, Devices, choose_gpus
from sweeps.display import Display
from sweeps.machine import MemoryUse, available, bytes_by_group
from sweeps.pool import Pool
from sweeps.process import Job


@pytest.fixture(autouse=True)
def eight_cores_and_four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-abc,3")


def test_a_gpu_belongs_to_one_job_at_a_time() -> None:
    queue = DeviceQueue(gpus=["0", "1", "2"])
    one, two = queue.take(1), queue.take(2)
    assert (one.gpus, two.gpus) == (("0",), ("1", "2"))
    assert one.environment()["CUDA_VISIBLE_DEVICES"] == "0"
    assert two.environment()["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert two.name == "cuda:1,2"
    assert queue.take(1) is None and not queue.has_room
    queue.give_back(one)
    assert queue.take(2) is None
    assert queue.take(1).gpus == ("0",)
    with pytest.raises(ValueError, match="needs 4 GPUs, and there are 3"):
        queue.take(4)


def test_a_job_on_the_cpu_takes_no_gpu_of_a_mixed_sweep() -> None:
    queue = DeviceQueue(gpus=["0"], n_jobs=2)
    taken = queue.take(2, on_cpu=True)
    assert (taken.name, taken.gpus, taken.threads) == ("cpu:0", (), 4)
    assert queue.take(1).gpus == ("0",)


@pytest.mark.parametrize(
    ("n_jobs", "requested", "processes", "at_once", "threads"),
    [
        (None, None, 1, 8, 1),  # one job per core
        (None, None, 3, 2, 1),  # one core per process
        (None, None, 20, 1, 1),
        (2, None, 2, 2, 1),
        (8, None, 2, 4, 1),  # a job of two processes takes two places
        (20, None, 1, 20, 1),  # more jobs than cores, if requested
        (20, None, 2, 10, 1),
        (None, 2, 2, 2, 2),
        (None, 16, 1, 1, 16),
        (None, "auto", 1, 1, 8),  # one job at a time, with all cores
        (None, "auto", 2, 1, 4),  # which its processes share
        (2, "auto", 2, 2, 2),
        (20, "auto", 1, 20, 1),
    ],
)
def test_cores_are_divided_among_jobs_and_processes(n_jobs, requested, processes, at_once, threads):
    queue = DeviceQueue(n_jobs=n_jobs, threads=requested)
    taken = [queue.take(processes) for _ in range(at_once)]
    assert queue.take(processes) is None
    first = taken[0]
    assert sorted(d.name for d in taken if d) == sorted(f"cpu:{i}" for i in range(at_once))
    environment = first.environment()
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == str(threads)
    for job in taken:
        queue.give_back(job)
    again = [queue.take(processes) for _ in range(at_once)]
    assert None not in again and queue.take(processes) is None
    assert environment["CUDA_VISIBLE_DEVICES"] == "", "a CPU job must not see the GPUs"


def test_a_process_with_a_gpu_has_the_gpus_share_of_the_cores() -> None:
    queue = DeviceQueue(gpus=["0", "1", "2", "3"], host="node1")
    one, two = queue.take(1), queue.take(2)
    assert one.threads == two.threads == 2
    assert (one.name, two.name) == ("node1:cuda:0", "node1:cuda:1,2")
    assert DeviceQueue(gpus=["0", "1"], threads=3).take(1).threads == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_jobs", 0, "n_jobs=0 must be a whole number from 1 to 1024"),
        *[("threads", n, f"threads_per_process={n}: give a number") for n in (0, -1, "all", 1.5)],
    ],
)
def test_invalid_numbers_of_jobs_and_threads_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        DeviceQueue(**{key: value})


QUOTAS = {
    "no limit": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "nothing to read": ({}, None),
    "a container": ({"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
    "a group in a group": (
        {
            "proc/self/cgroup": "0::/user.slice/job.scope\n",
            "sys/fs/cgroup/user.slice/cpu.max": "150000 50000\n",
            "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
        },
        3.0,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "version 1 without": ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
    "damaged": ({"sys/fs/cgroup/cpu.max": "what\n"}, None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cores_follow_the_quota_of_control_groups(tmp_path, monkeypatch, case):
    files, quota = QUOTAS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota
    monkeypatch.setattr("mtp_lightning.system.cpu_quota", lambda: quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert cores() == (16 if quota is None else max(1, int(quota)))


def test_variables_of_other_launchers_do_not_reach_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    leaks = ("LOCAL_RANK", "MASTER_PORT", "PL_GLOBAL_SEED", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID")
    for name in leaks:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    environment = Devices(name="cpu:0").environment()
    assert not environment.keys() & set(leaks)
    assert environment["SLURM_JOB_ID"] == "7"


def test_devices_choose_gpus_and_wrong_ones_are_refused() -> None:
    assert choose_gpus("auto") == ["0", "1", "GPU-abc", "3"]
    assert choose_gpus("cpu") == []
    for wrong in (1, True, 1.5):
        with pytest.raises(ValueError, match="give auto, cpu or a list of GPUs"):
            choose_gpus(wrong)  # type: ignore[arg-type]
    assert choose_gpus([3, 0]) == ["3", "0"]
    for wrong in ([7], [0, 0], "cuda", []):
        with pytest.raises(ValueError, match="^devices="):
            choose_gpus(wrong)


def test_gpus_after_one_that_does_not_exist_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, seen in (("0, 2,-1,1", ["0", "2"]), ("-1", []), ("", []), ("3,", ["3"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        assert devices.find_gpus() == seen


def test_without_nvidia_smi_no_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.find_gpus() == []


GB = 1_000_000_000


class Machine:
    """The files in which a system reports its memory."""

    def __init__(self, root: Path, free: float) -> None:
        self.root = root
        (root / "proc").mkdir()
        self.free(free)

    def free(self, gigabytes: float) -> None:
        kilobytes = round(gigabytes * GB / 1024)
        text = f"MemTotal:  999999999 kB\nMemAvailable:   {kilobytes} kB\n"
        (self.root / "proc" / "meminfo").write_text(text)

    def process(self, pid: int, group: int, gigabytes: float) -> None:
        folder = self.root / "proc" / str(pid)
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_text(f"{pid} (a (strange) name) S 1 {group} {group} 0")
        anonymous = round(gigabytes * GB / 1024)
        text = f"VmRSS: 123456789 kB\nRssAnon: {anonymous} kB\nRssFile: 99999 kB\nRssShmem: 0 kB\n"
        (folder / "status").write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, 10)


def test_the_memory_of_a_job_is_estimated_from_earlier_jobs(machine: Machine) -> None:
    use = MemoryUse(machine.root)
    assert use.per_process == GB and use.missing(10) is None
    assert "10.0 GB are available" in (use.missing(11) or "")
    use.begin(7, 1)
    use.begin(8, 2)
    assert use.missing(7) is None and use.missing(8) is not None, "3 GB are reserved"
    machine.process(70, 7, 0.25)
    machine.process(80, 8, 3.0)
    machine.process(81, 8, 2.0)  # the second process of the same job
    machine.free(4.75)
    use.look()
    assert use.per_process == pytest.approx(2.5 * GB, rel=1e-5), "the largest job, per process"
    # 2.25 GB are still reserved for the small job.
    assert use.missing(1) is None and use.missing(2) is not None
    machine.process(80, 8, 0.5)
    use.look()
    assert use.per_process == pytest.approx(2.5 * GB, rel=1e-5), "the peak counts"
    use.end(8, succeeded=False)
    assert use.per_process == GB, "a failed job does not count"
    use.end(7, succeeded=True)
    assert use.per_process == pytest.approx(GB / 4, rel=1e-5)


def test_available_memory_is_limited_by_the_control_group(machine: Machine) -> None:
    group = machine.root / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    (machine.root / "proc" / "self").mkdir()
    (machine.root / "proc" / "self" / "cgroup").write_text("0::/box\n")
    (group / "memory.max").write_text("max\n")
    assert available(machine.root) == pytest.approx(10 * GB, rel=1e-5)
    (group / "memory.max").write_text(f"{4 * GB}\n")
    (group / "memory.current").write_text(f"{3 * GB}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GB}\n")
    assert available(machine.root) == 2 * GB


def test_without_files_of_the_system_memory_is_unlimited(tmp_path: Path) -> None:
    assert available(tmp_path) is None and MemoryUse(tmp_path).missing(1000) is None


def test_the_memory_of_a_real_process_is_measured() -> None:
    program = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "process_group": 0}
    with subprocess.Popen([sys.executable, "-u", "-c", program], **pipes) as process:
        assert process.stdout.readline() == b"1\n"
        assert 200_000_000 < bytes_by_group()[process.pid] < 260_000_000
        process.communicate(b"\n")
    assert 0 < available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("free", "at_once"), [(0.5, 1), (2.5, 2), (10, 4)])
def test_a_pool_starts_only_jobs_that_fit_in_memory(machine, tmp_path, capsys, free, at_once):
    machine.free(free)
    script = "date +%s%N > a; sleep 0.4; date +%s%N > b; echo '{}' > summary.json"
    jobs = []
    for i in range(2 if at_once == 1 else 4):
        folder = tmp_path / "jobs" / str(i)
        folder.mkdir(parents=True)
        command = ("sh", "-c", f"cd {folder}; {script}")
        jobs.append(Job(folder=folder, overrides=(str(i),), command=command))
    use = MemoryUse(machine.root)
    Pool(queue=DeviceQueue(n_jobs=4), display=Display(len(jobs)), grace_seconds=60, memory=use).run(
        jobs
    )
    spans = [[int((t.folder / name).read_text()) for name in "ab"] for t in jobs]
    most = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert most == at_once
    assert ("To fit in memory, at most" in capsys.readouterr().out) == (at_once < 4)
