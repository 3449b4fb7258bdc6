"""Which code computes on a CPU in a test; the part ``mtp_lightning.cpu`` may be missing."""

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
from torch import nn

from mtp_lightning import parts
from mtp_lightning.nn import experts, ops

ROOT = Path(__file__).parents[1]
HAS_CPU = importlib.util.find_spec("mtp_lightning.cpu") is not None

parts.load()


def native() -> Any:
    """The module that holds the library."""
    return importlib.import_module("mtp_lightning.cpu.library")


CAPABILITY = torch.backends.cpu.get_cpu_capability()
LIBRARY = native().library if HAS_CPU else None
# Whether the products of a pass of decoding give a row's bits alone.
BATCH_INVARIANT = LIBRARY is not None or (HAS_CPU and native().ONEDNN)


def use_library(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """Compute by that library, or without one."""
    if HAS_CPU:
        monkeypatch.setattr(native(), "library", library)


def prepared(module: nn.Module) -> AbstractContextManager[Any]:
    """Any module as a model is while it decodes."""
    if not HAS_CPU:
        return nullcontext()
    return closing(importlib.import_module("mtp_lightning.cpu.prepared").Prepared(module))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The C++ of this checkout for some instructions, as an installation builds it: the library
    that it built, or, where there is none or a source is newer, one that is built here."""
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
        given = {"cwd": ROOT, "env": environment, "check": True, "capture_output": True}
        subprocess.run([*command, *places], **given)
        return folder

    @cache
    def library_for(instructions: str) -> ctypes.CDLL:
        file: Path = native().file_for(instructions)
        if not file.is_relative_to(ROOT) or not file.is_file() or file.stat().st_mtime < newest:
            (file,) = build().rglob(file.name)
        found, _ = native().load(file)
        assert found is not None
        return found

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
    own = request.getfixturevalue("library") if request.param == "native" else None
    use_library(monkeypatch, own)
    yield request.param
