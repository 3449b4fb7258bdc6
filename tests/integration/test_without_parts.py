"""A copy of the code without the parts that come off trains and decodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning import parts
from tests.integration.helpers import ROOT, environment, overrides

pytestmark = pytest.mark.slow

# An editable install would bring the deleted folders back from the checkout.
BARE = """
import runpy, sys
sys.meta_path[:] = [found for found in sys.meta_path if "ditable" not in repr(found)]
sys.path[0] = ROOT
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """The checkout's code, with every part deleted."""
    core = tmp_path / "core"
    for name in ("mtp_lightning", "data_modules", "hydra_plugins", "conf", "sweeps"):
        shutil.copytree(ROOT / name, core / name, ignore=shutil.ignore_patterns("__pycache__"))
    for app in ("train.py", "generate.py"):
        shutil.copy(ROOT / app, core)
    for part in parts.PARTS:
        shutil.rmtree(core.joinpath(*part.split(".")))
    (core / "bare.py").write_text(BARE.replace("ROOT", repr(str(core))))
    return core


def run(core: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "bare.py", *words],
        cwd=core,
        env=environment() | {"PYTHONPATH": str(core)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_core_trains_and_decodes(core: Path, cache: Path) -> None:
    folder = core / "run"
    done = run(core, "train.py", *overrides(cache, {}), f"run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU layers by PyTorch's operators, threads" in done.stdout + done.stderr
    words = ["generate.py", f"checkpoint={folder}", "prompt=de", "num_threads=1"]
    texts = [run(core, *words, f"speculative={way}") for way in ("true", "false")]
    assert all(done.returncode == 0 for done in texts), texts[0].stderr
    assert texts[0].stdout == texts[1].stdout != ""
    refused = run(core, *words, "precision=bf16")
    assert refused.returncode == 1 and "needs the part mtp_lightning.cpu" in refused.stderr
