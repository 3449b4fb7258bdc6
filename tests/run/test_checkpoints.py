"""Checkpoint files survive kills, full disks and flipped bytes, and hold only plain values."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath

import pytest
import torch
from omegaconf import OmegaConf

from mtp_lightning.run import checkpoints as cio


def content(step: int, size: int = 50) -> dict:
    weights = torch.arange(size, dtype=torch.float32) + step
    return {
        "global_step": step,
        "state_dict": OrderedDict(w=weights),
        "loops": {"a": [1, (2, None)]},
    }


def same(a: dict, b: dict) -> bool:
    return a["global_step"] == b["global_step"] and torch.equal(
        a["state_dict"]["w"], b["state_dict"]["w"]
    )


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_saved_checkpoint_is_loaded_equal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "last.ckpt"
    cio.save(content(3), path)
    assert same(cio.load(path), content(3))
    assert cio.intact(path) and cio.inspect(path) == (None, 3)
    assert names(path.parent) == ["last.ckpt"]


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    cio.save(content(3), path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert not cio.intact(path), length


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """Only bytes without content (padding, time stamps) are harmless."""
    path = tmp_path / "last.ckpt"
    cio.save(content(3), path)
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged_files = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        if cio.intact(path):
            assert same(cio.load(path), content(3)), place
        else:
            damaged_files += 1
    assert damaged_files > 100


def test_a_flipped_weight_that_torch_loads_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    cio.save(content(3, size=10_000), path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    silently = torch.load(path, weights_only=True)
    assert not same(silently, content(3, size=10_000)), "torch itself does not notice"
    assert "checksum" in (cio.inspect(path)[0] or "")
    with pytest.raises(ValueError, match="last.ckpt is damaged .*checksum"):
        cio.load(path)


def test_a_disk_that_is_away_is_no_damage(tmp_path: Path, monkeypatch) -> None:
    cio.save(content(3), tmp_path / "last.ckpt")

    def away(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zipfile.ZipFile.testzip", away)
    with pytest.raises(OSError, match="Input/output error"):
        cio.newest_intact(tmp_path)


@pytest.mark.parametrize("container", [dict, Counter, OrderedDict])
def test_a_tensor_without_content_is_damage_in_any_container(tmp_path: Path, container) -> None:
    path = tmp_path / "last.ckpt"
    weights = [container(a=torch.empty(3, device="meta"))]
    torch.save({"state_dict": {"b": weights}, "global_step": 3}, path)
    with pytest.raises(ValueError, match="does not hold the tensors that it should"):
        cio.load(path)


class FullDisk(io.BufferedWriter):
    """A file on a disk with ``room`` bytes."""

    room = 2000

    def write(self, data) -> int:
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    cio.save(content(3), path)

    def full(name, mode):
        return FullDisk(io.FileIO(name, mode))

    monkeypatch.setattr(cio, "open", full, raising=False)
    with pytest.raises(OSError) as error:
        cio.save(content(4, size=100_000), path)
    assert error.value.errno == errno.ENOSPC
    for word in (str(path), "bytes free", "previous checkpoint"):
        assert word in str(error.value)
    assert names(tmp_path) == ["last.ckpt"]
    assert same(cio.load(path), content(3))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_an_error_while_saving_leaves_no_temporary(tmp_path, monkeypatch, failing, error) -> None:
    path = tmp_path / "last.ckpt"
    cio.save(content(3), path)

    def fail(*_args) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(cio.os, failing, fail)
        with pytest.raises(type(error)):
            cio.save(content(4), path)
    assert names(tmp_path) == ["last.ckpt"]
    assert same(cio.load(path), content(3))


KILLED = """
import sys, torch
from mtp_lightning.run import checkpoints as cio
step = 1
while True:
    weights = torch.full((200_000,), float(step))
    cio.save({"global_step": step, "state_dict": {"w": weights}}, sys.argv[1])
    print(step, flush=True)
    step += 1
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    rng = random.Random(1)
    root = Path(__file__).parents[2]
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(path)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            child.kill()
            steps = child.stdout.read().split()
        loaded = cio.load(path)
        step = loaded["global_step"]
        assert step >= int(steps[-1] if steps else 1)
        assert torch.equal(loaded["state_dict"]["w"], torch.full((200_000,), float(step)))
    assert cio.newest_intact(tmp_path) == path


class Odd:
    pass


@pytest.mark.parametrize(
    "value",
    [
        Odd(), OmegaConf.create({"a": 1}), PurePosixPath("a"), torch.tensor(1.0).numpy(),
        torch.tensor(1.0).numpy()[()],
    ],
)  # fmt: skip
def test_an_object_is_refused_when_saving(tmp_path: Path, value) -> None:
    with pytest.raises(ValueError) as error:
        cio.save({"hyper_parameters": {"mtp": [1, value]}}, tmp_path / "x.ckpt")
    assert "checkpoint['hyper_parameters']['mtp'][1]" in str(error.value)
    assert type(value).__name__ in str(error.value)
    assert names(tmp_path) == []


def test_an_object_or_a_missing_file_is_refused_when_loading(tmp_path: Path) -> None:
    torch.save({"odd": Odd()}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="foreign.ckpt holds more than"):
        cio.load(tmp_path / "foreign.ckpt")
    with pytest.raises(FileNotFoundError, match="missing.ckpt"):
        cio.load(tmp_path / "missing.ckpt")


def test_every_plain_type_is_loaded_equal(tmp_path: Path) -> None:
    plain = {
        "a": [1, 2.5, None, True, b"x", "y", (1,), {3}, torch.Size([2]), torch.float16],
        1: torch.nn.Parameter(torch.ones(2)),
        0.5: OrderedDict(device=torch.device("cpu")),
    }
    cio.save(plain, tmp_path / "x.ckpt")
    loaded = cio.load(tmp_path / "x.ckpt")
    assert loaded["a"] == plain["a"] and loaded[0.5] == plain[0.5]


def test_newest_intact_skips_damaged_checkpoints(tmp_path, caplog):
    assert cio.newest_intact(tmp_path) is None
    assert cio.newest_intact(tmp_path / "nowhere") is None
    for name, step in {"last": 30, "previous": 20, "best": 10, "step_25": 25}.items():
        cio.save(content(step), tmp_path / f"{name}.ckpt")
    (tmp_path / ".last.ckpt.tmp").write_bytes(b"half a file")
    assert cio.newest_intact(tmp_path) == tmp_path / "last.ckpt"
    last = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(last[:-10])
    assert cio.newest_intact(tmp_path) == tmp_path / "step_25.ckpt"
    assert "last.ckpt is damaged and skipped" in caplog.text
    (tmp_path / "step_25.ckpt").write_bytes(b"")
    assert cio.newest_intact(tmp_path) == tmp_path / "previous.ckpt"
    assert "step_25.ckpt is damaged and skipped: the file is empty" in caplog.text
    # Of equal steps, the newest file.
    cio.save(content(20), tmp_path / "step_20.ckpt")
    for age, newest in ((1, "previous.ckpt"), (-1, "step_20.ckpt")):
        time_ns = (tmp_path / "previous.ckpt").stat().st_mtime_ns - age * 10**9
        os.utime(tmp_path / "step_20.ckpt", ns=(time_ns, time_ns))
        assert cio.newest_intact(tmp_path) == tmp_path / newest


def test_link_or_copy_copies_on_a_disk_without_links(tmp_path: Path, monkeypatch) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    cio.save(content(1), last)
    cio.link_or_copy(last, best)
    assert last.samefile(best)
    cio.link_or_copy(last, best)  # again, when both already are one file
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]
    cio.save(content(2), last)
    assert same(cio.load(best), content(1)), "a later save does not reach through the link"

    def no_links(*_args) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(cio.os, "link", no_links)
    cio.link_or_copy(last, best)
    assert not last.samefile(best) and same(cio.load(best), content(2))
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]
