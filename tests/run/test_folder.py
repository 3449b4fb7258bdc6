"""One process uses a run's folder at a time; a run that makes no step leaves none."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from mtp_lightning.run.folder import claimed, leave
from mtp_lightning.run.lock import Lock


def test_a_claimed_folder_is_made_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with claimed(folder):
        (folder / "metrics.csv").write_text("step\n")
    with claimed(folder):  # once released, it is free again
        pass
    assert (folder / "metrics.csv").exists()


def test_a_claimed_folder_cannot_be_claimed_again(tmp_path: Path) -> None:
    again = claimed(tmp_path, seconds=0)  # a second open file conflicts, as that of a process would
    message = f"Another process works in {re.escape(str(tmp_path))}: .* another run_dir"
    with claimed(tmp_path), pytest.raises(BlockingIOError, match=message), again:
        pass
    with claimed(tmp_path, seconds=0):
        pass


@pytest.mark.parametrize("saved", [False, True])
def test_an_error_before_the_first_checkpoint_removes_the_folder(tmp_path, saved):
    folder = tmp_path / "run"
    with pytest.raises(KeyError), claimed(folder):
        (folder / ".hydra").mkdir()
        (folder / "config.yaml").write_text("a: 1\n")
        (folder / "train_ddp_process_1.log").touch()
        (folder / "checkpoints").mkdir()
        if saved:
            (folder / "checkpoints" / "last.ckpt").write_bytes(b"weights")
        raise KeyError
    assert folder.exists() == saved


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "config.yaml", "tokenizer.json", "events.out.tfevents.1.other", "train.log"],
)
def test_files_of_users_and_of_other_programs_are_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match="refused"), claimed(tmp_path):
        raise ValueError("refused")
    assert (tmp_path / name).read_text() == "theirs"


def test_a_folder_that_a_failed_start_removes_is_made_again(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", Lock(tmp_path / "run" / ".run.lock")
    folder.mkdir()
    assert other.acquire()

    def fail() -> None:
        leave(folder)  # the lock's next attempt may make the folder again meanwhile
        other.release()

    threading.Timer(0.3, fail).start()
    with claimed(folder):
        assert folder.is_dir()


def test_temporaries_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / ".best.ckpt.tmp").write_bytes(b"half")
    (checkpoints / "best.ckpt").write_bytes(b"whole")
    with claimed(tmp_path):
        assert [file.name for file in checkpoints.iterdir()] == ["best.ckpt"]
