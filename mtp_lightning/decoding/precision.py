"""``precision=bf16``, ``int8`` or ``int4``: decoding reads a half to a sixth of the bytes.

Every matrix is rounded: to bf16, to 255 levels per row, or to 16 levels per 32 inputs. Norm gains,
biases, hidden states, caches and sums stay fp32. The rounded model is then decoded: with or without
drafts, its greedy text is the same token for token. Weights stored in bf16, as most published ones
are, lose nothing in bf16; the others can change a text. ``fp32`` leaves the numbers as they are:
those of a quantized GGUF file are still read in the file's bits (``cpu/packed.py``).

``activations=int8`` multiplies such blocks of 4 or 8 bits as integers, as llama.cpp does: the
activations that meet a block are rounded to 8 bits and a scale. It is another arithmetic of the
same weights, again the same for drafts and plain decoding.

``head_precision`` is that of the MTP modules alone, which changes drafts and no greedy text.
``auto`` reads them in int8 where a CPU decodes from packed weights (in int4 with
``precision=int4``): a draft then costs less, and is accepted as often.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.fused import multiply_integers, packer_for, rounded_weights_need
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.weight_scales import WeightScales
from mtp_lightning.settings import require_choice
from mtp_lightning.weights import WeightPacker

AUTO = "auto"
# The function that rounds a weight, by the weight's ``id()``.
Roundings = dict[int, Callable[[Tensor], Tensor]]


def split_precision(precision: str) -> tuple[str, str]:
    """Split ``WEIGHTS/ACTIVATIONS`` (``int4/int8``); activations default to fp32."""
    weights, _, activations = precision.partition("/")
    return weights, activations or "fp32"


def check_precision(
    precision: str, heads: str | None = None, *, activations: str = "fp32", compile: bool = False
) -> None:
    """Refuse a precision, ``head_precision`` or activations that this machine cannot decode in,
    before a model is read.

    Raises:
        UserError: a precision is unknown, or rounded weights would not be faster here.
    """
    require_choice("activations", activations, ACTIVATIONS)
    settings = {"precision": precision, "activations": activations}
    if heads not in (None, AUTO):
        settings["head_precision"] = heads
    for key, value in settings.items():
        if require_choice(key, value, PRECISIONS) == "fp32":
            continue
        if compile:
            raise UserError(
                f"{key}={value} does not go together with compile=true, whose programs "
                "read fp32: leave one of them out."
            )
        if missing := rounded_weights_need():
            raise _nothing_faster(f"{key}={value}", missing)


def use_activations(model: MTPModel, activations: str) -> None:
    """Multiply weights in blocks as integers with ``int8``; ``fp32`` changes nothing.

    Raises:
        UserError: the value is unknown, or the model or the machine cannot.
    """
    if require_choice("activations", activations, ACTIVATIONS) == "fp32":
        return
    if missing := multiply_integers(model):
        raise UserError(f"activations={activations} needs {missing}; leave it at fp32.")


def use_precision(model: MTPModel, precision: str, heads: str | None = None) -> None:
    """Round the matrices of ``model`` in place to ``precision``; ``fp32`` changes nothing. Those of
    its MTP stack are rounded to ``heads`` instead, if that is not None; ``auto`` is int8 where that
    is read faster.

    Raises:
        UserError: a precision is unknown, rounded weights would not be faster here, or there are no
            matrices to round.
    """
    check_precision(precision, heads)
    round_weights(model, _roundings(model, precision, _settled(model, precision, heads)))


def packer_after_rounding(
    precision: str, heads: str | None
) -> Callable[[MTPModel, Path | None], WeightPacker | None]:
    """``packer_for`` of ``decoding/fused.py`` for a model whose weights :func:`use_precision` would
    round: each is rounded when it is read, and then packed.

    Raises:
        UserError: as :func:`use_precision`, here and when the packer is made.
    """
    check_precision(precision, heads)

    def packer(model: MTPModel, path: Path | None = None) -> WeightPacker | None:
        own = _settled(model, precision, heads)
        roundings = _roundings(model, precision, own)
        inner = packer_for(model, path, f"{precision} {own}" if roundings else "")
        return _AfterRounding(inner, roundings) if inner is not None and roundings else inner

    return packer


class _AfterRounding:
    """Rounds weights before a packer packs them."""

    def __init__(self, packer: WeightPacker, roundings: Roundings) -> None:
        self._packer, self._roundings = packer, roundings

    def pack(self, weight: Tensor, scales: WeightScales | None = None) -> None:
        self._packer.pack(weight, None if _round(weight, self._roundings) else scales)

    def restore(self) -> frozenset[str]:
        return self._packer.restore()

    def remember(self) -> None:
        self._packer.remember()


def _nothing_faster(setting: str, missing: str) -> UserError:
    return UserError(
        f"{setting} needs {missing}: without it, weights would not be read faster; leave it at "
        "fp32."
    )


def _settled(model: MTPModel, precision: str, heads: str | None) -> str | None:
    """The precision of the MTP stack's own matrices, with ``auto`` replaced."""
    if heads != AUTO:
        return heads
    faster = _can_round(model) and rounded_weights_need() is None
    return "int8" if faster and precision in ("fp32", "bf16") and _matrices(model.mtp) else None


def _can_round(model: MTPModel) -> bool:
    weight = model.head.weight
    return weight.device.type in ("cpu", "meta") and weight.dtype == torch.float32


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() > 1]


def _roundings(model: MTPModel, precision: str, heads: str | None) -> Roundings:
    """The roundings of a model in two precisions, without ``auto``.

    Raises:
        UserError: as :func:`use_precision`.
    """
    own = set(map(id, _matrices(model.mtp)))
    if heads is not None and not own:
        raise UserError(
            f"head_precision={heads} is of the MTP modules' matrices, and this model has none: "
            "leave it out."
        )
    roundings = roundings_of(model, precision)
    if heads is not None:
        of_heads = roundings_of(model.mtp, heads)
        roundings = {i: f for i, f in roundings.items() if i not in own} | of_heads
    if roundings and not _can_round(model):
        setting = f"head_precision={heads}" if precision == "fp32" else f"precision={precision}"
        raise _nothing_faster(setting, "an fp32 model on a CPU")
    return roundings


def roundings_of(model: nn.Module, precision: str) -> Roundings:
    """The rounding of every matrix of a model, by its id; none in fp32. Gains and biases stay as
    they are.

    In int8, the numbers of a row become integer multiples, -127 to 127, of a step: its largest
    absolute value / 127. The step is rounded up to 16 significant bits, so that fp32 represents the
    multiples exactly. A row with a NaN or an infinity becomes NaN.

    In int4, every 32 inputs of an output have 16 levels from their smallest to their largest
    number, with a step and an offset in fp16, as in GGUF's Q4_1. As in GGUF files, the embedding
    and the head keep 8 bits: they are rounded to int8, and so are matrices whose inputs are not a
    multiple of 32.
    """
    if precision == "fp32":
        return {}
    roundings = {id(matrix): _ROUNDED[precision] for matrix in _matrices(model)}
    if precision == "int4":
        heads = [m.weight for m in model.modules() if isinstance(m, Head | nn.Embedding)]
        roundings |= {id(weight): _ROUNDED["int8"] for weight in heads}
    return roundings


def round_weights(model: nn.Module, roundings: Roundings) -> None:
    """Round weights of a model in place, each in its own dtype."""
    for weight in model.parameters():
        _round(weight, roundings)


@torch.no_grad()
def _round(weight: Tensor, roundings: Roundings) -> bool:
    """Round a weight in place, if it is one of those; returns whether it is."""
    rounding = roundings.get(id(weight))
    if rounding is not None:
        weight.copy_(rounding(weight))
    return rounding is not None


def _rounded_to_bytes(weight: Tensor) -> Tensor:
    weight = weight.float()
    mantissa, exponent = torch.frexp(weight.abs().amax(-1, keepdim=True) / 127)
    # Rounded up, so that no multiple exceeds 127.
    step = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return torch.where(step == 0, 0.0, (weight / step).round() * step)


def _rounded_to_blocks(weight: Tensor) -> Tensor:
    if weight.shape[-1] % _BLOCK:
        return _rounded_to_bytes(weight)
    blocks = weight.float().unflatten(-1, (-1, _BLOCK))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step, offset = ((high - low) / 15).half().double(), low.half().double()
    level = torch.where(step == 0, 0.0, (blocks - offset) / step).round().clamp(0, 15)
    # The sum is rounded to fp32 once.
    return (step * level + offset).float().flatten(-2)


# Inputs that share a step and an offset in int4.
_BLOCK = 32
_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": Tensor.bfloat16,
    "int8": _rounded_to_bytes,
    "int4": _rounded_to_blocks,
}
PRECISIONS = ("fp32", *_ROUNDED)
ACTIVATIONS = ("fp32", "int8")
