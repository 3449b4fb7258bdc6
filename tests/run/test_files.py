"""Files are replaced as a whole, and keys are sorted by their effect on results, without torch."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning.run.atomic import replacing, write_bytes, write_json
from mtp_lightning.run.config import (
    affects_training,
    describe_differences,
    flatten,
    key_of,
    lies_in,
)
from mtp_lightning.run.lock import Lock


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_keeps_the_old_file_and_no_temporary(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.txt"
    write_bytes(b"old", path, shared=shared)
    with pytest.raises(KeyboardInterrupt), replacing(path, shared=shared) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_temporary_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.tmp").write_bytes(b"a long rest of an earlier process")
    write_bytes(b"new", tmp_path / "a.txt")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_bytes() == b"new"


def test_the_temporary_of_a_shared_file_is_named_by_process(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt", shared=True) as temporary:
        assert str(os.getpid()) in temporary.name and temporary.parent == tmp_path
        temporary.write_bytes(b"")


def test_json_has_null_for_nan_and_infinity(tmp_path: Path) -> None:
    content = {"a": math.inf, "b": [1, None, math.nan], "c": "漢", "d": {"e": -0.5, "f": True}}
    write_json(content, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {**content, "a": None, "b": [1, None, None]}
    assert text.endswith("}\n") and "Infinity" not in text and "NaN" not in text


def test_keys_are_flattened_parsed_and_compared() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": []}}, "e": None}) == {"a.b": 1, "a.c.d": [], "e": None}
    assert [key_of(o) for o in ("a.b=1", "+a=x=y", "~a", "++a.b=")] == ["a.b", "a", "a", "a.b"]
    assert lies_in("a.b", ["a"]) and lies_in("a", ["a"]) and not lies_in("ab", ["a"])


def test_only_some_keys_affect_training() -> None:
    keys = {
        *("seed", "sweeps", "data.seq_len"),
        *("callbacks.early_stopping.patience", "callbacks.speculative_eval.n_prompts"),
    }
    others = {
        *("run_dir", "sweep.retry_failed", "logger.wandb.project", "data.cache_dir"),
        *("callbacks.progress.refresh_seconds", "callbacks.checkpoints.keep"),
    }
    assert {key for key in keys | others if affects_training(key)} == keys


def test_differences_of_configs_ignore_keys_and_defaults() -> None:
    stored, wanted = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}, {"a": {"b": 2}, "d": {"e": 4}}
    differences = describe_differences(stored, wanted, ignore=["d"])
    assert differences == ["a.b: 1 -> 2", "a.c: 2 -> nothing"]
    # An older config lacks a newer key: it had that key's default.
    assert describe_differences({}, {"data": {"train_windows": "all"}}) == []
    five = {"data": {"train_windows": 5}}
    assert describe_differences({}, five) == ["data.train_windows: all -> 5"]


def test_the_modules_import_no_torch() -> None:
    names = ("atomic", "config", "layout", "lock", "metrics", "status", "summary")
    modules = ("settings", "run", *(f"run.{name}" for name in names))
    slow = ("torch", "lightning", "numpy", "rich", "omegaconf")
    program = (
        "import importlib, sys\n"
        f"for m in {modules}: importlib.import_module('mtp_lightning.' + m)\n"
        f"print([m for m in {slow} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_lock_blocks_others_until_it_is_released(tmp_path: Path) -> None:
    one, other = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock")
    with one.held(seconds=0):
        assert not other.wait(seconds=0)
        with pytest.raises(BlockingIOError, match=r"\.lock is held"), other.held(seconds=0):
            pass
    assert other.wait(seconds=0)
    other.release()


def test_a_failed_lock_leaves_no_file_open(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "No answer")

    closed, close = [], os.close
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "close", lambda file: closed.append(file) or close(file))
    with pytest.raises(OSError, match="No answer"):
        Lock(tmp_path / ".lock").acquire()
    assert len(closed) == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_on_a_file_system_without_locks_every_lock_is_free(tmp_path, monkeypatch, code):
    def flock(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(tmp_path / ".lock").held(seconds=0), Lock(tmp_path / ".lock").held(seconds=0):
        assert not Lock(tmp_path / ".lock").is_free()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_lock_on_a_removed_file_is_not_held(tmp_path, monkeypatch, elsewhere):
    """Its holder removes the file between another one's opening and locking."""
    file, flock = tmp_path / ".lock", fcntl.flock

    def after_removal(*arguments: object) -> None:
        file.unlink(missing_ok=True)
        if elsewhere:
            raise OSError(errno.ESTALE, "Stale file handle")
        flock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", after_removal)
        assert not Lock(file).acquire()
    assert Lock(file).acquire()
