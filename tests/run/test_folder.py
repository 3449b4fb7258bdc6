"""One process uses a run's folder at a time; a run that makes no step leaves none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning.run.folder import claimed


def test_it_is_made_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with claimed(folder):
        (folder / "metrics.csv").write_text("step\n")
    with claimed(folder):  # once released, it is free again
        pass
    assert (folder / "metrics.csv").exists()


def test_another_process_is_told(tmp_path: Path) -> None:
    code = (
        "import pathlib; from mtp_lightning.run import folder\n"
        "folder._SECONDS = 0.1\n"
        f"with folder.claimed(pathlib.Path({str(tmp_path)!r})): pass"
    )
    with claimed(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert f"Another process trains in {tmp_path}" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_takes_it_away_before_the_first_step(tmp_path: Path, begun: bool) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyError), claimed(folder):
        (folder / ".hydra").mkdir()
        (folder / "config.yaml").write_text("a: 1\n")
        (folder / "checkpoints").mkdir()
        if begun:
            (folder / "checkpoints" / "last.ckpt").write_bytes(b"weights")
        raise KeyError
    assert folder.exists() == begun


def test_what_a_user_had_there_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KeyError), claimed(tmp_path):
        raise KeyError
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_files_of_the_names_of_a_run_stay(name: str, tmp_path: Path) -> None:
    """They look like a run's files, so a folder that had them before is not removed."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="refused"), claimed(tmp_path):
        raise ValueError("refused")
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_kill_left_of_a_save_goes(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / ".best.ckpt.tmp").write_bytes(b"half")
    (checkpoints / "best.ckpt").write_bytes(b"whole")
    with claimed(tmp_path):
        assert [file.name for file in checkpoints.iterdir()] == ["best.ckpt"]
