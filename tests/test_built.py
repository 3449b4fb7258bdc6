"""A C++ library is opened if it was built from these sources; otherwise a warning names it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from data_modules.tokenizers import pre_tokenizer
from mtp_lightning.built import digest, open_built
from tests.kernels import HAS_CPU, native

FUNCTIONS = {"seven": ((), ctypes.c_int64)}
SOURCE = """
extern "C" long seven() { return 7; }
extern "C" const char* built_from() { return BUILT_FROM; }
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "cpp"
    folder.mkdir()
    (folder / "seven.cpp").write_text(SOURCE)
    (folder / "seven.h").write_text("")
    (folder / "README").write_text("no source")
    return folder


@pytest.fixture
def file(sources: Path) -> Path:
    """A library, built as by setup.py."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    built = sources.with_name("seven.so")
    stamp = f'-DBUILT_FROM="{digest(sources)}"'
    command = ["g++", "-shared", "-fPIC", stamp, str(sources / "seven.cpp"), "-o", str(built)]
    subprocess.run(command, check=True)
    return built


def test_a_library_of_the_same_sources_is_loaded(file, sources, monkeypatch, caplog):
    (sources / "README").write_text("changed")
    library, reason = open_built(file, sources, FUNCTIONS)
    assert library is not None and library.seven() == 7 and not reason
    # An installation without sources.
    library, _ = open_built(file, sources.with_name("none"), FUNCTIONS)
    assert library is not None
    assert open_built(file.with_name("none.so"), sources, FUNCTIONS)[0] is None
    monkeypatch.setenv("MTP_LIGHTNING_NATIVE", "0")
    assert open_built(file, sources, FUNCTIONS) == (None, "MTP_LIGHTNING_NATIVE=0")
    assert not caplog.records


@pytest.mark.parametrize("case", ["changed", "renamed", "more", "partly built", "no library"])
def test_an_outdated_or_broken_library_is_named_with_the_remedy(file, sources, case, caplog):
    functions = dict(FUNCTIONS)
    if case == "changed":
        (sources / "seven.h").write_text("// a word")
    elif case == "renamed":
        (sources / "seven.h").rename(sources / "eight.h")
    elif case == "more":
        (sources / "eight.h").touch()
    elif case == "partly built":
        functions["eight"] = ((), ctypes.c_int64)
    else:
        file.write_text("no library")
    library, reason = open_built(file, sources, functions)
    assert library is None and "pip install -e ." in reason
    (warning,) = caplog.messages
    assert str(file) in warning and "pip install -e . builds it again" in warning


def test_the_installed_libraries_are_up_to_date() -> None:
    for module in (pre_tokenizer, *([native()] if HAS_CPU else [])):
        if module.library is not None:
            sources = Path(module.__file__).with_name("cpp")
            assert module.library.built_from().decode() == digest(sources) != ""
