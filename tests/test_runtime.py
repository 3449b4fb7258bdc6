"""The number of CPU threads of a process, and the name of its processor."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_lightning import runtime
from mtp_lightning.errors import UserError
from mtp_lightning.runtime import set_threads
from mtp_lightning.system import processor, this_machine


@pytest.fixture(autouse=True)
def one_thread_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("cores", "threads", "processes", "expected"),
    [(8, None, 1, 7), (1, None, 1, 1), (8, None, 2, 3), (2, None, 1, 1), (8, 2, 1, 2),
     (2, None, 2, 1)],
)  # fmt: skip
def test_threads_are_all_cores_but_one_or_as_many_as_set(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int | None, processes: int, expected: int
) -> None:
    monkeypatch.setattr(runtime, "_CORES", cores)
    set_threads(threads, processes=processes)
    assert torch.get_num_threads() == expected


def test_omp_num_threads_limits_the_default_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_CORES", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(3)
    set_threads(None)
    assert torch.get_num_threads() == 3
    set_threads(5)
    assert torch.get_num_threads() == 5


def test_a_containers_quota_counts_as_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts all cores of the machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("mtp_lightning.system.cpu_quota", lambda: 2.5)
    assert runpy.run_path(runtime.__file__)["_CORES"] == 2


@pytest.mark.parametrize("n", [-1, 10**9])
def test_a_number_of_threads_that_no_machine_has_is_refused(n: int) -> None:
    rule = r"must be a whole number in \[1, 1024\]"
    with pytest.raises(UserError, match=f"num_threads {rule}, not {n}"):
        set_threads(n)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx2 avx512f avx512bw amx_tile", "AMD EPYC with AMX"),
        ("avx512bw avx2", "AMD EPYC with AVX-512"),
        ("sse avx2", "AMD EPYC with AVX2"),
        ("sse", "AMD EPYC"),
    ],
)
def test_a_processor_is_named_with_its_instructions(tmp_path: Path, flags: str, name: str) -> None:
    (tmp_path / "proc").mkdir()
    file = tmp_path / "proc" / "cpuinfo"
    file.write_text(
        f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
    )
    assert processor(tmp_path) == name
    file.write_text("Processor: some other machine\n")
    assert processor(tmp_path) == ""


def test_a_machine_of_another_processor_has_another_description(monkeypatch) -> None:
    names = ["AMD EPYC with AVX2", "AMD EPYC with AVX-512", ""]
    described = []
    for name in names:
        monkeypatch.setattr("mtp_lightning.system.processor", lambda name=name: name)
        described.append(this_machine())
    assert len(set(described)) == 3
    assert described[0] == f"{described[2]} of {names[0]}"


def test_a_short_epoch_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Rows are logged by step."""
    runtime.quiet_lightning()
    warnings.warn("The number of training batches (5) is smaller than the logging interval.")  # noqa: B028
    assert not recwarn
