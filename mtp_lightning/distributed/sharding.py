"""Shards a model over processes with torch's ``fully_shard`` (FSDP2), and gathers it again.

In fully sharded data parallelism (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3; Zhao et al.
2023, arXiv 2304.11277), every process keeps its shard of each parameter, gradient and optimizer
state. A module's parameters are gathered for its ``forward``, and again for its backward pass. A
mesh of two axes spreads the shards over one axis and replicates them along the other.

The tensors of a sharded module are ``DTensor``, which no other file needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mtp_lightning.model import MTPModel
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.moe import routers_of
from mtp_lightning.processes import Tensors


def build_mesh(device: str, world: int, shard_size: int | None) -> DeviceMesh:
    """Build the mesh of all ``world`` processes: (shard), or (replicate, shard) if only
    ``shard_size`` of them share one replica of the model."""
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
        root: the module whose ``forward`` is called. Its parameters outside of units stay gathered
            from the start of the forward to the end of the backward pass.
        units: submodules that are gathered one at a time.
        precise: submodules of units that compute in the stored precision.
        low: the precision in which units are gathered and compute; None for the stored one.
            Gradients are summed in fp32.
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
    """Whether :func:`shard` was applied to the module."""
    return isinstance(module, FSDPModule)


@contextmanager
def no_sync(root: nn.Module) -> Iterator[None]:
    """Do not sum gradients over processes in this block; the next backward pass outside does."""
    assert isinstance(root, FSDPModule)
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded; all processes must then call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the whole tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, *, everywhere: bool = False) -> Any:
    """Gather a nested state dict: its tensors become whole, on the CPU.

    The state dict has the same content on every process except for the shards. Unless
    ``everywhere``, all processes but the first get an empty dictionary.
    """
    keep = everywhere or dist.get_rank() == 0

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = whole(leaf.detach())  # freed at once on processes that do not keep it
        return tensor.cpu().clone() if keep else None

    result = tree_map(gather, state)
    return result if keep else {}


def outlined(state: Any) -> Any:
    """Return a state dict whose tensors have a shape and no content."""
    return tree_map_only(Tensor, _outline, state)


def outlined_parts(state: Any) -> Any:
    """Return a state dict whose sharded tensors have their whole shape and no content. The other
    tensors are on the CPU."""

    def outline(tensor: Tensor) -> Tensor:
        return _outline(tensor) if isinstance(tensor, DTensor) else tensor.detach().cpu()

    return tree_map_only(Tensor, outline, state)


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def own_parts(state: Any) -> Any:
    """Return a state dict with CPU copies of this process's shards; other leaves become None."""

    def part(leaf: Any) -> Any:
        # A copy, since torch.save writes the whole memory that a view refers to.
        return local(leaf.detach()).cpu().clone() if isinstance(leaf, DTensor) else None

    return tree_map(part, state)


def bytes_of(state: Any) -> int:
    """Bytes of a state dict's tensors, as whole tensors."""
    tensors = (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rows_of(part: int, parts: int, length: int) -> tuple[int, int]:
    """The first row of a shard, and the row after its last. A tensor is sharded along its first
    dimension into equal shards, except for the last ones, which have the rest."""
    size = -(-length // parts)
    start = min(part * size, length)
    return start, min(start + size, length)


def place_in(mesh: DeviceMesh) -> tuple[int, int, bool]:
    """(this process's shard, the number of shards, whether it belongs to the first replica)."""
    names = mesh.mesh_dim_names
    assert names is not None
    copy = mesh.get_local_rank("replicate") if "replicate" in names else 0
    return mesh.get_local_rank("shard"), mesh.size(names.index("shard")), copy == 0


def own_rows(rows: Callable[[int, int], Tensor], like: Tensor) -> Tensor:
    """Make this process's shard of a tensor that is sharded as ``like``, and of which every process
    can read the rows from a first one up to another."""
    if not isinstance(like, DTensor):
        return rows(0, like.shape[0])
    part, parts, _ = place_in(like.device_mesh)
    rows_here = rows(*rows_of(part, parts, like.shape[0])).to(local(like).device)
    return DTensor.from_local(
        rows_here,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Send a whole tensor from the first process to all, which have one of its shape without
    content, and return this process's shard, on the device of ``like`` and sharded as it is."""
    device = local(like).device
    if tensor.is_meta:
        content = torch.empty_like(tensor, device=device)
    else:
        content = tensor.to(device).contiguous()
    dist.broadcast(content, src=0)
    return own_part(content, like)


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor, which every process has whole, in the same way as ``like``."""
    if not isinstance(like, DTensor):
        return tensor
    device = local(like).device
    return distribute_tensor(
        tensor.to(device), like.device_mesh, like.placements, src_data_rank=None
    )


class Sharded(Tensors):
    """Access to tensors that may be sharded; see the base class."""

    whole, local, own_part = staticmethod(whole), staticmethod(local), staticmethod(own_part)

    def lay_out(self, run: Any) -> None:
        if run.device_mesh is None or is_sharded(run):
            return
        # Heads that are trained one after the other are gathered with the root, because their
        # gradients are computed during a forward pass (mtp/kinds.py).
        in_forward = run.model.mtp.trains_in_forward
        gathered_modules = (run.model.trunk if in_forward else run.model).modules()
        units = [module for module in gathered_modules if isinstance(module, Block)]
        shard(
            run,
            run.device_mesh,
            units,
            # bf16 rounding must not decide which expert a token goes to.
            precise=[router for unit in units for router in routers_of(unit).values()],
            low=torch.bfloat16 if run.trainer.precision == "bf16-mixed" else None,
        )
        run.no_sync = partial(no_sync, run)
        if run.deferred:
            run.model.to_empty(device=run.trainer.strategy.root_device)
            run.model.initialize(run.step.seed)

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
