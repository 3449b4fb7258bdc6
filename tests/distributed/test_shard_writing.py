"""A sharded checkpoint gets its name once every process's shard is on the disk, not before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mtp_lightning.distributed.shard_files import ShardWriting
from mtp_lightning.distributed.sharding import build_mesh
from mtp_lightning.run import checkpoints

WEIGHT = torch.arange(15.0).reshape(5, 3)


def state(mesh: Any) -> dict[str, Any]:
    weight = distribute_tensor(WEIGHT.clone(), mesh, [Shard(0)])
    moment = distribute_tensor(WEIGHT + 1, mesh, [Shard(0)])
    entry = {"exp_avg": moment, "step": torch.tensor(2.0)}
    groups = [{"betas": (0.9, 0.95), "params": [0]}]
    return {
        "global_step": 2,
        "state_dict": {"weight": weight, "bias": torch.ones(2)},
        "optimizer_states": [{"state": {0: entry}, "param_groups": groups}],
        "loops": {"done": [1, 2]},
    }


def assert_stored(path: Path) -> None:
    read = checkpoints.load(path)
    assert read["global_step"] == 2 and read["loops"] == {"done": [1, 2]}
    assert torch.equal(read["state_dict"]["weight"], WEIGHT)
    assert torch.equal(read["state_dict"]["bias"], torch.ones(2))
    (optimizer,) = read["optimizer_states"]
    assert torch.equal(optimizer["state"][0]["exp_avg"], WEIGHT + 1)
    assert optimizer["param_groups"] == [{"betas": (0.9, 0.95), "params": [0]}]


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield build_mesh("cpu", 1, None)
    dist.destroy_process_group()


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set, it lets shards reach the disk."""
    go, save = threading.Event(), checkpoints.save

    def slowly(content: dict[str, Any], path: Path) -> None:
        if path.suffix == ".pt":
            assert go.wait(60)
        save(content, path)

    monkeypatch.setattr(checkpoints, "save", slowly)
    yield go
    go.set()


def test_a_checkpoint_is_unaffected_by_later_training_steps(tmp_path, mesh, delayed):
    target, content = tmp_path / "last.ckpt", state(mesh)
    writing = ShardWriting(content, target, mesh, dist.group.WORLD)
    assert not writing.ended(wait=False) and not target.exists()
    with torch.no_grad():  # the next steps
        content["state_dict"]["weight"].mul_(0)
        content["state_dict"]["bias"].mul_(0)
        content["optimizer_states"][0]["state"][0]["exp_avg"].mul_(0)
    content["loops"]["done"].append(3)
    assert not writing.ended(wait=False) and not target.exists()
    delayed.set()
    assert writing.ended(wait=True)
    assert_stored(target)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("index"))


def test_a_save_replaces_the_previous_one(tmp_path: Path, mesh: Any) -> None:
    target = tmp_path / "last.ckpt"
    (tmp_path / "parts" / "00000001-half").mkdir(parents=True)  # left by a kill
    for _ in range(3):
        assert ShardWriting(state(mesh), target, mesh, dist.group.WORLD).ended(wait=True)
    assert len(list((tmp_path / "parts").iterdir())) == 1
    assert_stored(target)


def _second_process_fails(rank: int, folder: str) -> None:
    place = Path(folder)
    store = dist.FileStore(str(place / "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    mesh, target = build_mesh("cpu", 2, None), place / "last.ckpt"
    assert ShardWriting(state(mesh), target, mesh, dist.group.WORLD).ended(wait=True)
    weight = state(mesh)["state_dict"]["weight"]
    assert isinstance(weight, DTensor) and len(weight.to_local()) == (3 if rank == 0 else 2)
    before = target.read_bytes()
    save = checkpoints.save

    def full(content: dict[str, Any], path: Path) -> None:
        if rank == 1:
            raise OSError(28, "the disk is full")
        save(content, path)

    checkpoints.save = full
    with pytest.raises(OSError, match="the disk is full" if rank == 1 else "Another process"):
        ShardWriting(state(mesh), target, mesh, dist.group.WORLD).ended(wait=True)
    dist.barrier()
    assert target.read_bytes() == before
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_failed_write_of_one_process_raises_in_all(tmp_path: Path) -> None:
    mp.spawn(_second_process_fails, args=(str(tmp_path),), nprocs=2)
    assert_stored(tmp_path / "last.ckpt")
