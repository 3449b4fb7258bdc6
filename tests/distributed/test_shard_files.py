"""A sharded checkpoint is read as if it were one file, and damage is named."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mtp_lightning.distributed import shard_files
from mtp_lightning.errors import UserError
from mtp_lightning.run import checkpoints as cio
from mtp_lightning.run.loading import checkpoint_of_step
from tests.integration.helpers import assert_equal

FOLDER = "00000003-0123abcd"


def content(step: int = 3) -> dict[str, Any]:
    """A run's content, with tensors of fewer rows than shards, and one unsharded tensor."""
    shapes = [(1,), (2, 3), (7,), (8, 2, 2), (13, 1)]
    generator = torch.Generator().manual_seed(step)
    weights = {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    weights["bias"] = torch.arange(4.0)
    state = {
        i: {"exp_avg": torch.randn(shape, generator=generator), "step": torch.tensor(3.0)}
        for i, shape in enumerate(shapes)
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "params": list(state)}]
    return {
        "global_step": step,
        "state_dict": OrderedDict(weights),
        "optimizer_states": [{"state": state, "param_groups": groups}],
        "loops": {"a": [1, (2, None)]},
    }


def cut(value: Any, part: int, count: int) -> Any:
    """The rows of a nested value that a shard holds, by ``torch.split``."""

    def rows(leaf: Any) -> Tensor | None:
        if not is_large(leaf):
            return None
        pieces = leaf.split(-(-len(leaf) // count))
        return (pieces[part] if part < len(pieces) else leaf[:0]).clone()

    return tree_map(rows, value)


def outline(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.to("meta") if is_large(leaf) else leaf, value)


def is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not torch.equal(value, BIAS)


BIAS = torch.arange(4.0)


def write(path: Path, whole: dict[str, Any], count: int, folder: str = FOLDER) -> Path:
    """Write a checkpoint in ``count`` shards, and return their folder."""
    place = path.parent / "parts" / folder
    for key, name in (("state_dict", "weights"), ("optimizer_states", "optimizer")):
        for part in range(count):
            cio.save(cut(whole[key], part, count), place / f"{name}-{part}-of-{count}.pt")
    index = {k: outline(v) if k in shard_files.KINDS else v for k, v in whole.items()}
    cio.save({**index, "parts": {"folder": folder, "parts": count}}, path)
    return place


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_parts_are_read_as_one_file(tmp_path: Path, count: int) -> None:
    write(tmp_path / "last.ckpt", content(), count)
    read, plain = cio.load(tmp_path / "last.ckpt"), content()
    assert_equal(read, plain)
    assert read["loops"] == plain["loops"]  # lists stay lists, and tuples tuples
    assert cio.intact(tmp_path / "last.ckpt") and cio.stored_step(tmp_path / "last.ckpt") == 3
    assert cio.newest_intact(tmp_path) == tmp_path / "last.ckpt"


def test_any_rows_are_read_from_any_number_of_parts(tmp_path: Path) -> None:
    whole = content()
    for count in range(1, 7):
        path = tmp_path / f"{count}.ckpt"
        write(path, whole, count, folder=f"{count}")
        read = shard_files.opened(cio.load(path, mapped=True), path)
        for name, tensor in whole["state_dict"].items():
            pieces = read["state_dict"][name]
            if name == "bias":
                assert torch.equal(pieces, tensor)
                continue
            assert pieces.shape == tensor.shape and pieces.dtype == tensor.dtype
            for start in range(len(tensor) + 1):
                for stop in range(start, len(tensor) + 1):
                    assert torch.equal(pieces.rows(start, stop), tensor[start:stop])


def test_optimizer_false_does_not_read_the_optimizers_parts(tmp_path: Path) -> None:
    place = write(tmp_path / "last.ckpt", content(), 2)
    for file in place.glob("optimizer-*"):
        file.unlink()
    read = cio.load(tmp_path / "last.ckpt", optimizer=False)
    assert read["optimizer_states"] == []
    assert torch.equal(read["state_dict"]["w3"], content()["state_dict"]["w3"])
    with pytest.raises(UserError, match="optimizer-0-of-2.pt is not there"):
        cio.load(tmp_path / "last.ckpt")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    numbers = content()["state_dict"]["w3"].numpy().tobytes()[:8]
    data[data.index(numbers)] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(file: Path) -> None:
    tensors = torch.load(file, weights_only=True)
    cio.save({**tensors, "w3": torch.zeros(4, 2, 3)}, file)


def repeated(file: Path) -> None:
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "w3": torch.zeros(1).expand(4, 2, 2)}, file)


def other_content(file: Path) -> None:
    cio.save({"w3": [1, 2]}, file)


@pytest.mark.parametrize("damage", [Path.unlink, flip, cut_off])
def test_a_damaged_part_is_found(tmp_path, damage, caplog):
    folder = tmp_path / "checkpoints"
    last = folder / "last.ckpt"
    place = write(last, content(), 2)
    cio.save(content(2), folder / "previous.ckpt")
    assert checkpoint_of_step(f"{tmp_path}@3") == last
    damage(place / "weights-0-of-2.pt")
    reason, step = cio.inspect(last)
    assert reason is not None and "weights-0-of-2.pt" in reason and step == -1
    with pytest.raises(UserError, match="last.ckpt cannot be used .its part .*weights-0-of-2"):
        cio.load(last)
    assert cio.newest_intact(folder) == folder / "previous.ckpt"
    assert "last.ckpt is damaged and skipped: its part" in caplog.text
    with pytest.raises(UserError, match=r"no intact checkpoint of step 3 \(there are: 2\)"):
        checkpoint_of_step(f"{tmp_path}@3")


@pytest.mark.parametrize("forge", [other_shape, repeated, other_content])
def test_a_forged_part_is_refused(tmp_path: Path, forge: Any) -> None:
    place = write(tmp_path / "last.ckpt", content(), 2)
    forge(place / "weights-0-of-2.pt")
    with pytest.raises(UserError, match="weights-0-of-2.pt is damaged .it does not hold"):
        cio.load(tmp_path / "last.ckpt")


class Canary:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_code_in_a_part_is_not_executed(tmp_path: Path, capsys: Any) -> None:
    place = write(tmp_path / "last.ckpt", content(), 1)
    torch.save({"w3": Canary()}, place / "weights-0-of-1.pt")
    with pytest.raises(UserError, match="is damaged"):
        cio.load(tmp_path / "last.ckpt")
    path = tmp_path / "last.ckpt"
    pieces = shard_files.opened(cio.load(path, mapped=True), path)["state_dict"]["w3"]
    with pytest.raises(UserError, match="is damaged"):
        pieces.rows(0, 1)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts",
    [
        {"folder": "../../elsewhere", "parts": 2},
        {"folder": "/tmp", "parts": 2},
        {"folder": "", "parts": 2},
        {"folder": FOLDER, "parts": 0},
        {"folder": FOLDER, "parts": 10**12},
        {"folder": FOLDER, "parts": True},
        {"folder": FOLDER},
        "elsewhere",
    ],
)
def test_a_forged_index_is_refused(tmp_path: Path, parts: Any) -> None:
    path = tmp_path / "last.ckpt"
    write(path, content(), 2)
    cio.save({**cio.load(path, mapped=True), "parts": parts}, path)
    assert not cio.intact(path)
    with pytest.raises(UserError, match="last.ckpt is damaged"):
        cio.load(path)


def test_tensors_without_content_are_refused(tmp_path: Path) -> None:
    """They take a few bytes of a file, and would take all memory."""
    path = tmp_path / "last.ckpt"
    for where in ("state_dict", "loops"):
        cio.save(content() | {where: {"w": torch.empty(10**6, 10**6, device="meta")}}, path)
        with pytest.raises(UserError, match="damaged"):
            cio.load(path)


def test_parts_without_a_checkpoint_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", content(3), 2, folder="3")
    write(tmp_path / "best.ckpt", content(2), 2, folder="2")
    write(tmp_path / "gone.ckpt", content(1), 2, folder="1")
    (tmp_path / "gone.ckpt").unlink()
    half = tmp_path / "parts" / "4"
    half.mkdir()
    (half / ".weights-0-of-2.pt.tmp").write_bytes(b"half")
    shard_files.sweep(tmp_path)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["2", "3"]
    assert cio.intact(tmp_path / "last.ckpt") and cio.intact(tmp_path / "best.ckpt")


def test_keep_decides_which_parts_a_finished_run_leaves(tmp_path: Path) -> None:
    for name, folder in (("last", "3"), ("previous", "2"), ("best", "1")):
        write(tmp_path / f"{name}.ckpt", content(int(folder)), 2, folder=folder)
    cio.keep(tmp_path, "all")
    assert len(list(tmp_path.glob("parts/*/*.pt"))) == 12
    cio.keep(tmp_path, "weights")
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("parts/*/*"))
    names = [f"parts/{n}/weights-{i}-of-2.pt" for n in (1, 3) for i in (0, 1)]
    assert left == names and not (tmp_path / "previous.ckpt").exists()
    read = cio.load(tmp_path / "best.ckpt")
    assert read["optimizer_states"] == []
    assert torch.equal(read["state_dict"]["w3"], content(1)["state_dict"]["w3"])
    cio.keep(tmp_path, "none")
    assert list(tmp_path.iterdir()) == []


def test_a_moved_checkpoint_needs_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "here" / "last.ckpt", content(), 2)
    elsewhere = tmp_path / "there"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "here" / "last.ckpt", elsewhere)
    with pytest.raises(UserError, match="copy the folder parts/ along"):
        cio.load(elsewhere / "last.ckpt")
    shutil.copytree(tmp_path / "here" / "parts", elsewhere / "parts")
    assert cio.load(elsewhere / "last.ckpt")["global_step"] == 3
