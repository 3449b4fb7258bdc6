"""The weights of a stored model: how readers describe them, and how they get into a model.

A reader (:func:`~mtp_lightning.opening.read_model`) returns a :class:`StoredModel`: the model's
config and its weights, which may be unread. :meth:`StoredModel.build` builds the model and loads
them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.nn.weight_scales import WeightScales

log = logging.getLogger(__name__)

# Depths without weights of their own are refused beyond this number: no window is so long.
_FREE_DEPTHS = 4096


class Stored(ABC):
    """A weight that is still on the disk."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The shape in the model."""

    @abstractmethod
    def copy_to(self, target: torch.Tensor) -> None:
        """Read the weight into a tensor of its shape and of any dtype."""

    def scales(self) -> WeightScales | None:
        """The scales of the weight's blocks; None if they can be found from its values."""
        return None

    def numel(self) -> int:
        """The number of values."""
        return self.shape.numel()

    def tensor(self) -> torch.Tensor:
        """Read the weight into a new float32 tensor."""
        tensor = torch.empty(self.shape)
        self.copy_to(tensor)
        return tensor


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that a reader has found and that is not built yet.

    Attributes:
        path: the file or folder with the weights.
        config: the model's config.
        weights: the weights by the model's own names. Those of an imported model are unread.
        tokenizer_state: the tokenizer as plain data; None without a tokenizer.
        brings_trunk: whether a run that starts from this model takes the trunk's shape from here
            rather than from its config: for an imported model, or a run that began with one.
        run_config: the composed config of the training, in plain containers. For an imported model
            it has ``data.seq_len``, and ``objective.draft_vocab`` if the folder names it.
        step: optimizer steps trained.
        threads: CPU threads of the training; None if unknown.
    """

    path: Path
    config: ModelConfig
    weights: Mapping[str, torch.Tensor | Stored]
    tokenizer_state: dict[str, Any] | None
    brings_trunk: bool = False
    run_config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    threads: int | None = None

    def build(
        self, packer_for: Callable[[MTPModel], WeightPacker | None] | None = None
    ) -> MTPModel:
        """Build the model in evaluation mode on the CPU, and load its weights one at a time. With
        float64 weights the model is in float64.

        Args:
            packer_for: ``packer_for`` of ``decoding/fused.py``, called with the model alone.

        Raises:
            UserError: see :func:`load_weights`.
        """
        with torch.device("meta"):
            model = MTPModel(self.config)
        n_parameters = len(list(model.parameters()))
        # Not to_empty, whose empty_like imports sympy for meta tensors, which takes half a second.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        if self.config.trunk.tie_embeddings:
            model.head.weight = model.trunk.embedding.weight  # type: ignore[assignment]
        # Buffers that are not stored must be computed, and other tied parameters tied again.
        computes_buffers = any(name not in self.weights for name, _ in model.named_buffers())
        if computes_buffers or len(list(model.parameters())) != n_parameters:
            model = MTPModel(self.config)
        tensors = (x for x in self.weights.values() if isinstance(x, torch.Tensor))
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            model.double()
        packer = None if packer_for is None else packer_for(model)
        if packer is not None:  # load_weights allocates memory for one weight at a time
            for parameter in model.parameters():
                parameter.data.untyped_storage().resize_(0)
        load_weights(model, self.weights, source=str(self.path), packer=packer)
        if packer is not None:
            packer.remember()
        return model.eval()


class WeightPacker(Protocol):
    """Stores the weights of a decode-only model in packed form only, which takes at most half the
    memory of weights and packed copies together."""

    def pack(self, weight: torch.Tensor, scales: WeightScales | None = None) -> None:
        """Pack a loaded weight of the model, if it can be packed."""

    def restore(self) -> frozenset[str]:
        """Take the weights that an earlier process packed from the same files; return their
        names."""

    def remember(self) -> None:
        """Store the packed weights for later processes, if that saves time."""


def require_held(
    config: ModelConfig, weights: Mapping[str, torch.Tensor | Stored], *, source: str
) -> None:
    """Refuse a config that asks for many more weights than the file holds. Building the model of
    a forged config could take all memory, or hours. Where few are missing, loading names them.

    Raises:
        UserError: the message has both numbers.
    """
    numbers = {
        "layers": config.trunk.n_layers,
        "MTP depths": config.mtp.depth,
        "components": config.mtp.rank,
        "blocks of a module": config.mtp.blocks,
    }
    for name, number in numbers.items():
        # Each has a tensor of its own, except for depths that share one or have none.
        if number > max(len(weights), _FREE_DEPTHS):
            raise UserError(
                f"{source} is damaged or forged: its config asks for {number:,} {name}, and it "
                f"holds {len(weights):,} tensors."
            )
    n_stored = sum(tensor.numel() for tensor in weights.values())
    if config.num_params() > 2 * n_stored:
        raise UserError(
            f"{source} is damaged or forged: its config asks for {config.num_params():,} weights, "
            f"and it holds {n_stored:,}."
        )


def require_fitting(
    shapes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Any],
    *,
    optional: Collection[str] = (),
    message: str,
) -> None:
    """Refuse tensors, by name, that do not have the needed ``shapes``: unknown ones, those of
    another shape, and missing ones that are not ``optional``.

    Raises:
        UserError: it names the tensors, after ``message``, which names the file.
    """
    known = {*tensors, *optional}
    problems = [f"{name} is missing" for name in shapes if name not in known]
    problems += [
        f"{name} has the shape {list(tensors[name].shape)} where {list(shape)} is needed"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [f"{name} is unknown" for name in tensors if name not in shapes]
    if problems:
        listed = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise UserError(f"{message}: {listed}.")


@torch.no_grad()
def load_weights(
    model: MTPModel,
    weights: Mapping[str, torch.Tensor | Stored],
    *,
    source: str,
    packer: WeightPacker | None = None,
) -> None:
    """Load all weights, one at a time. Wrong names or shapes are refused before the first is
    loaded, NaN and infinity after the last.

    Args:
        weights: the weights by the model's names. For bf16 parameters they are rounded, and a
            warning says so.
        source: the weights' origin, for messages.
        packer: packs the loaded parameters, and restores those that are packed already.

    Raises:
        UserError: names or shapes differ, or values are not finite; the message names them.
    """
    state, parameters = model.state_dict(), dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in state.items()}
    require_fitting(shapes, weights, message=f"The weights in {source} do not fit the model")
    loaded = {"head.weight"} if model.config.trunk.tie_embeddings else set()
    loaded |= frozenset() if packer is None else packer.restore()
    n_rounded, broken = 0, []
    for name in [name for name in state if name not in loaded]:
        weight, target = weights[name], state[name]
        if target.numel() and not (storage := target.untyped_storage()).nbytes():
            storage.resize_(target.nbytes)
        if isinstance(weight, Stored) and target.dtype != torch.bfloat16:
            weight.copy_to(target)
        else:
            numbers = weight.tensor() if isinstance(weight, Stored) else weight
            target.copy_(numbers)
            n_rounded += target.dtype == torch.bfloat16 and not torch.equal(target.float(), numbers)
        if not _is_finite(target):
            broken.append(name)
        if packer is not None and name in parameters:
            packer.pack(parameters[name], weight.scales() if isinstance(weight, Stored) else None)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"{source} holds NaN or infinity in {broken[0]}{more}: the model is unusable; use an "
            "earlier checkpoint, or fetch the file again."
        )
    if model.mtp.own_head is not None:
        model.mtp.own_head.require_sound(source)
    if n_rounded:
        message = "%d matrices of %s are rounded to bf16: the model uses the rounded values."
        log.warning(message, n_rounded, source)


def _is_finite(x: torch.Tensor) -> bool:
    """Whether all values are finite. The sum is checked first, which is much faster; it may also
    overflow for finite values."""
    return not x.is_floating_point() or bool(x.sum().isfinite()) or bool(x.isfinite().all())
