"""The code that computes on a CPU in a test; the part ``mtp_lightning.cpu`` may be missing."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_lightning import parts
from mtp_lightning.nn import experts, ops
from mtp_lightning.nn.weight_scales import WeightScales

ROOT = Path(__file__).parents[1]
HAS_CPU = importlib.util.find_spec("mtp_lightning.cpu") is not None

parts.load_cpu()


def native() -> Any:
    """The module that holds the library."""
    return importlib.import_module("mtp_lightning.cpu.library")


CAPABILITY = torch.backends.cpu.get_cpu_capability()
LIBRARY = native().library if HAS_CPU else None
# Whether the products of a pass of decoding give a row's bits alone.
BATCH_INVARIANT = LIBRARY is not None or (HAS_CPU and native().ONEDNN)


def use_library(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """Compute with a C++ library, or without one for None."""
    if HAS_CPU:
        monkeypatch.setattr(native(), "library", library)


def prepared(module: nn.Module) -> AbstractContextManager[Any]:
    """Any module as a model is while it decodes."""
    if not HAS_CPU:
        return nullcontext()
    return closing(importlib.import_module("mtp_lightning.cpu.prepared").Prepared(module))


def blocks_of(shape: tuple[int, int], levels: int, seed: int, *, symmetric: bool) -> Tensor:
    """Random weights in blocks of 32 by the definition: step x q + offset, both of them in fp16."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[0] * shape[1] // 32
    step = (torch.randn(n, 1, generator=generator) * 0.02).half().float()
    q = torch.randint(levels, (n, 32), generator=generator)
    drawn = torch.randn(n, 1, generator=generator) * 0.1
    offset = (-levels // 2 * step if symmetric else drawn).half().float()
    # In float64 first: the sum is rounded once.
    return (step.double() * q + offset.double()).float().view(shape)


def k_quants(shape: tuple[int, int], bits: int, group: int, factor: Any) -> tuple[Tensor, Any]:
    """Random weights as in K-quants, and their scales: steps and offsets are products of ``factor``
    and a small integer."""
    rows, blocks = shape[0], shape[1] // group
    steps, offsets = factor * torch.randint(1, 16, (2, rows, blocks))
    scales = WeightScales(steps=steps, offsets=-offsets * 8, group=group, bits=bits)
    q = torch.randint(0, 1 << bits, (rows, blocks, group))
    exact = steps.double()[..., None] * q + scales.offsets.double()[..., None]
    return exact.float().flatten(1), scales


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """A function that returns the C++ library of this checkout for some instructions: the installed
    one, or a new build if there is none or a source is newer."""
    if not HAS_CPU:
        pytest.skip("needs the part mtp_lightning.cpu")
    if CAPABILITY not in ("AVX2", "AVX512") or not shutil.which("g++"):
        pytest.skip("needs a CPU with AVX2 or AVX-512, and g++")
    sources = [ROOT / "setup.py", *(ROOT / "mtp_lightning/cpu/cpp").iterdir()]
    newest = max(source.stat().st_mtime for source in sources)

    @cache
    def build() -> Path:
        folder = tmp_path_factory.mktemp("native")
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        options = {"cwd": ROOT, "env": environment, "check": True, "capture_output": True}
        subprocess.run([*command, *places], **options)
        return folder

    @cache
    def library_for(instructions: str) -> ctypes.CDLL:
        file: Path = native().file_for(instructions)
        if not file.is_relative_to(ROOT) or not file.is_file() or file.stat().st_mtime < newest:
            (file,) = build().rglob(file.name)
        opened, _ = native().load(file)
        assert opened is not None
        return opened

    return library_for


@pytest.fixture
def library(libraries: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """This CPU's library."""
    return libraries(CAPABILITY)


@pytest.fixture(params=["plain", "pytorch", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the plain formulas, with the part for CPUs, and with its library."""
    if request.param == "plain":
        for op in (*vars(ops).values(), experts.routed_experts):
            if isinstance(op, ops.Op):
                monkeypatch.setattr(op, "_on", {})
    chosen = request.getfixturevalue("library") if request.param == "native" else None
    use_library(monkeypatch, chosen)
    yield request.param
