"""Jobs at once are as many as memory holds, by what the ones before have taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.devices import DeviceQueue
from sweeps.display import Lines
from sweeps.machine import UNKNOWN_BYTES, MemoryUse, available, taken_by_groups
from sweeps.pool import Pool
from sweeps.process import Task

GB = 1_000_000_000


class Machine:
    """A file system that says what a machine's memory is."""

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


def test_a_job_takes_what_the_ones_before_took(machine: Machine) -> None:
    use = MemoryUse(machine.root)
    assert use.of_one == GB and use.missing(10) is None
    assert "10.0 GB are available" in (use.missing(11) or "")
    use.begin(7, 1)
    use.begin(8, 2)
    assert use.missing(7) is None and use.missing(8) is not None, "three are promised"
    machine.process(70, 7, 0.25)
    machine.process(80, 8, 3.0)
    machine.process(81, 8, 2.0)  # its second process
    machine.free(4.75)
    use.look()
    assert use.of_one == pytest.approx(2.5 * GB, rel=1e-5), "the larger of both, a process"
    # 2.25 are promised to the small one.
    assert use.missing(1) is None and use.missing(2) is not None
    machine.process(80, 8, 0.5)  # it is at its end
    use.look()
    assert use.of_one == pytest.approx(2.5 * GB, rel=1e-5), "the most that it took"
    use.end(8, well=False)
    assert use.of_one == GB, "nobody knows what a failed one would have taken"
    use.end(7, well=True)
    assert use.of_one == pytest.approx(GB / 4, rel=1e-5)


def test_the_limit_of_a_control_group_counts(machine: Machine) -> None:
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


def test_nobody_says(tmp_path: Path) -> None:
    assert available(tmp_path) is None and MemoryUse(tmp_path).missing(1000) is None


def test_what_a_process_takes_is_seen() -> None:
    grows = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); print(1); input()"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", grows],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        assert 200_000_000 < taken_by_groups()[process.pid] < 260_000_000
        process.communicate(b"\n")
    free = available()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("free", "at_once"), [(0.5, 1), (2.5, 2), (10, 4)])
def test_a_pool_starts_no_more_than_memory_holds(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], free: float, at_once: int
) -> None:
    machine.free(free)
    script = "date +%s%N > a; sleep 0.4; date +%s%N > b; echo '{}' > summary.json"
    tasks = []
    for i in range(2 if at_once == 1 else 4):
        folder = tmp_path / "jobs" / str(i)
        folder.mkdir(parents=True)
        command = ("sh", "-c", f"cd {folder}; {script}")
        tasks.append(Task(folder=folder, overrides=(str(i),), command=command))
    use = MemoryUse(machine.root)
    Pool(queue=DeviceQueue(n_jobs=4), display=Lines(len(tasks)), memory=use).run(tasks)
    spans = [[int((t.folder / name).read_text()) for name in "ab"] for t in tasks]
    most = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert most == at_once
    assert ("jobs at once, for memory" in capsys.readouterr().out) == (at_once < 4)


def test_what_has_not_been_measured_takes_a_gigabyte(machine: Machine) -> None:
    assert MemoryUse(machine.root).of_one == UNKNOWN_BYTES
