"""A model in parts, one a process, with torch's ``fully_shard`` (FSDP2), and what needs it whole.

Fully sharded data parallelism (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3; Zhao et al.
2023, arXiv 2304.11277): every process keeps its part of each parameter, gradient and optimizer
state. A group of parameters is gathered while its module's ``forward`` runs, and again for its
backward pass. With a mesh of two axes the parts are spread over one, and repeated along the other.

The tensors of a sharded module are ``DTensor``; here is all that knows so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


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
    if isinstance(value, Mapping):
        return {key: _gathered(entry, keep) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_gathered(entry, keep) for entry in value)
    if not isinstance(value, Tensor):
        return value
    tensor = whole(value.detach())  # one after the other: only the first process keeps them
    return tensor.cpu().clone() if keep else None


def outlined(state: Any) -> Any:
    """A state dict whose tensors have a shape and no content."""
    if isinstance(state, dict):
        return {key: outlined(entry) for key, entry in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(outlined(entry) for entry in state)
    return torch.empty_like(state, device="meta") if isinstance(state, Tensor) else state


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
