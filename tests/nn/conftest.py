"""The layers' code in C++, and the operators of PyTorch that stand for it: tests get either."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_lightning.nn.kernels import native

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Of this checkout's sources, as an installation builds it: the one that it built, or where
    there is none, or a source is newer, one of its own."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not shutil.which("g++"):
        pytest.skip("needs a CPU with AVX-512 and g++")
    sources = [ROOT / "setup.py", *(ROOT / "mtp_lightning/nn/kernels/cpp").iterdir()]
    newest = max(source.stat().st_mtime for source in sources)
    built = native._FILE
    if built.is_relative_to(ROOT) and built.is_file() and built.stat().st_mtime > newest:
        return _loaded(built)
    folder = tmp_path_factory.mktemp("native")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, *places], cwd=ROOT, env=environment, check=True, capture_output=True)
    (file,) = (folder / "lib").rglob(native._FILE.name)
    return _loaded(file)


def _loaded(file: Path) -> ctypes.CDLL:
    found, _ = native.load(file)
    assert found is not None
    return found


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with PyTorch's operators, and with the library."""
    own = request.getfixturevalue("library") if request.param == "native" else None
    monkeypatch.setattr(native, "library", own)
    yield request.param
