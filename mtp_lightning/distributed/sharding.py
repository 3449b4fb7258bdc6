"""A model sharded over processes with torch's ``fully_shard`` (FSDP2), and what needs it whole.

Fully sharded data parallelism (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3; Zhao et al.
2023, arXiv 2304.11277): every process keeps its shard of each parameter, gradient and optimizer
state. A group of parameters is gathered while its module's ``forward`` runs, and again for its
backward pass. A mesh of two axes spreads the shards over one axis and repeats them along the other.

The tensors of a sharded module are ``DTensor``; only this file knows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mtp_lightning.model import MTPModel
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.moe import routers_of
from mtp_lightning.processes import Tensors


class Sharded(Tensors):
    """Tensors of which each process may have a shard; see the base class."""

    def whole(self, tensor: Tensor) -> Tensor:
        return whole(tensor)

    def local(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def own_part(self, tensor: Tensor, like: Tensor) -> Tensor:
        return own_part(tensor, like)

    def lay_out(self, run: Any) -> None:
        if run.device_mesh is None or is_sharded(run):
            return
        # Heads that are trained in turn are gathered with the root: their gradients are taken by
        # hand, in the midst of a forward pass (mtp/kinds.py).
        alone = run.model.mtp.in_turn
        inside = (run.model.trunk if alone else run.model).modules()
        units = [module for module in inside if isinstance(module, Block)]
        shard(
            run,
            run.device_mesh,
            units,
            # A rounding must not decide which expert a token goes to.
            precise=[router for unit in units for router in routers_of(unit).values()],
            low=torch.bfloat16 if run.trainer.precision == "bf16-mixed" else None,
        )
        run.no_sync = partial(no_sync, run)
        if run.deferred:
            run.model.to_empty(device=run.trainer.strategy.root_device)
            run.model.initialise(run.seed)

    def whole_model(self, run: Any, *, everywhere: bool) -> MTPModel | None:
        model: MTPModel = run.model
        if not is_sharded(run):
            return model
        state = gathered(model.state_dict(), everywhere=everywhere)
        if not state:
            return None
        copy = MTPModel(model.config)
        copy.to(model.head.weight.dtype).load_state_dict(state)
        return copy.to(run.device).train(model.training)


def build_mesh(device: str, world: int, shard_size: int | None) -> DeviceMesh:
    """The processes as (parts), or as (copies, parts).

    Args:
        device: its kind.
        world: processes.
        shard_size: that a copy of the model is spread over; None for all.
    """
    if shard_size is None or shard_size == world:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    shape = (world // shard_size, shard_size)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    root: nn.Module,
    mesh: DeviceMesh,
    units: Iterable[nn.Module],
    *,
    precise: Iterable[nn.Module] = (),
    low: torch.dtype | None = None,
) -> None:
    """Shard a module in place.

    Args:
        root: whose ``forward`` everything goes through. What is in no unit is gathered from its
            beginning to the end of the backward pass.
        mesh: of :func:`build_mesh`.
        units: modules inside that are gathered one at a time.
        precise: modules inside of those that compute in the precision that is stored.
        low: the precision that units are gathered and compute in; gradients are summed in fp32.
    """
    policy = MixedPrecisionPolicy()
    if low is not None:
        for module in precise:
            fully_shard(module, mesh=mesh)
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for module in units:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was applied to it."""
    return isinstance(module, FSDPModule)


@contextmanager
def no_sync(root: nn.Module) -> Iterator[None]:
    """Backward passes inside leave their gradients unsummed, for one outside to sum them, too."""
    assert isinstance(root, FSDPModule)
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part; if it has, all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, *, everywhere: bool = False) -> Any:
    """A state dict, of whatever nesting, with its tensors whole and on the CPU.

    Args:
        state: the same on every process, but for its tensors' parts.
        everywhere: whether each process wants it, or the first alone.

    Returns:
        On the other processes, an empty dictionary.
    """
    keep = everywhere or dist.get_rank() == 0
    result = _gathered(state, keep)
    return result if keep else {}


def _gathered(value: Any, keep: bool) -> Any:
    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = whole(leaf.detach())  # one after the other: only the first process keeps them
        return tensor.cpu().clone() if keep else None

    return _changed(value, gather)


def _changed(state: Any, change: Callable[[Any], Any]) -> Any:
    """A state dict, of whatever nesting, with each of its leaves changed."""
    if isinstance(state, Mapping):
        return {key: _changed(entry, change) for key, entry in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_changed(entry, change) for entry in state)
    return change(state)


def outlined(state: Any) -> Any:
    """A state dict whose tensors have a shape and no content."""
    return _changed(state, lambda leaf: _outline(leaf) if isinstance(leaf, Tensor) else leaf)


def outlined_parts(state: Any) -> Any:
    """A state dict in which the tensors that are sharded have their whole shape and no content;
    the others are on the CPU."""

    def outline(leaf: Any) -> Any:
        if isinstance(leaf, DTensor):
            return _outline(leaf)
        return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf

    return _changed(state, outline)


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def own_parts(state: Any) -> Any:
    """A state dict with copies, on the CPU, of this process's parts, and None for all else."""

    def part(leaf: Any) -> Any:
        # A copy: a view would be written to a file with all of its memory.
        return local(leaf.detach()).cpu().clone() if isinstance(leaf, DTensor) else None

    return _changed(state, part)


def bytes_of(state: Any) -> int:
    """Of a state dict's tensors, were they whole."""
    sizes: list[int] = []

    def measure(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            sizes.append(leaf.numel() * leaf.element_size())

    _changed(state, measure)
    return sum(sizes)


def rows_of(part: int, parts: int, length: int) -> tuple[int, int]:
    """The first row of a part, and the one behind its last, of a tensor that is cut along its first
    dimension: into rows as many for each, but for the last ones, which have what is left."""
    size = -(-length // parts)
    start = min(part * size, length)
    return start, min(start + size, length)


def place_in(mesh: DeviceMesh) -> tuple[int, int, bool]:
    """(which part this process has, of how many, whether it is of the first copy of the model)."""
    names = mesh.mesh_dim_names
    assert names is not None
    copy = mesh.get_local_rank("replicate") if "replicate" in names else 0
    return mesh.get_local_rank("shard"), mesh.size(names.index("shard")), copy == 0


def own_rows(rows: Callable[[int, int], Tensor], like: Tensor) -> Tensor:
    """This process's part of a tensor that every process can read.

    Args:
        rows: gives some of its rows, from one up to another.
        like: that says how it is sharded.
    """
    if not isinstance(like, DTensor):
        return rows(0, like.shape[0])
    part, parts, _ = place_in(like.device_mesh)
    own = rows(*rows_of(part, parts, like.shape[0])).to(local(like).device)
    return DTensor.from_local(
        own,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that the first process has.

    Args:
        tensor: whole; on the other processes, of the same shape and without content.
        like: that says where it goes, and how it is sharded.
    """
    device = local(like).device
    if tensor.is_meta:
        content = torch.empty_like(tensor, device=device)
    else:
        content = tensor.to(device).contiguous()
    dist.broadcast(content, src=0)
    return own_part(content, like)


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    device = local(like).device
    return distribute_tensor(
        tensor.to(device), like.device_mesh, like.placements, src_data_rank=None
    )
