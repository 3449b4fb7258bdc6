"""``precision=bf16``, ``int8`` or ``int4``: decoding reads a half to a sixth of the bytes.

Every matrix is rounded: to bf16, to 255 levels per row, or to 16 levels per 32 inputs. Norm gains,
biases, hidden states, caches and sums stay fp32. The rounded model is then decoded: with or without
drafts, its greedy text is the same token for token. Weights stored in bf16, as most published ones
are, lose nothing in bf16; the others can change a text. ``fp32`` leaves the numbers as they are:
those of a quantized GGUF file are still read in the file's bits (``cpu/packed.py``).

``activations=int8`` multiplies such blocks of 4 or 8 bits as integers, as llama.cpp does: the
activations that meet a block are rounded to 8 bits and a scale. It is another arithmetic of the
same weights, again the same for drafts and plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.fused import multiply_integers, rounded_weights_need
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.head import Head
from mtp_lightning.settings import require_choice


def split(precision: str) -> tuple[str, str]:
    """Split ``WEIGHTS/ACTIVATIONS`` (``int4/int8``); activations default to fp32."""
    weights, _, activations = precision.partition("/")
    return weights, activations or "fp32"


def check_precision(
    precision: str, heads: str | None = None, *, activations: str = "fp32", compile: bool = False
) -> None:
    """Refuse a precision that this machine cannot decode in, before a model is read.

    Args:
        precision: as the user gave it.
        heads: ``head_precision``, as the user gave it.
        activations: as the user gave it.
        compile: whether compiled passes are asked for.

    Raises:
        UserError: a precision is unknown, or rounded weights would not be faster here.
    """
    require_choice("activations", activations, ACTIVATIONS)
    settings = {"precision": precision, "activations": activations}
    if heads is not None:
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
    """Round ``model`` in place to ``precision``; ``fp32`` changes nothing.

    Args:
        model: the model.
        precision: of all matrices.
        heads: of the MTP stack's own matrices instead, which changes the drafts and no text; None
            for ``precision``.

    Raises:
        UserError: a precision is unknown, rounded weights would not be faster here, or there are no
            matrices to round.
    """
    check_precision(precision, heads)
    if heads is not None and not any(p.dim() > 1 for p in model.mtp.parameters()):
        raise UserError(
            f"head_precision={heads} is of the MTP modules' matrices, and this model has none: "
            "leave it out."
        )
    if {precision, heads} <= {"fp32", None}:
        return
    weight = model.head.weight
    if not weight.is_cpu or weight.dtype != torch.float32:
        setting = f"head_precision={heads}" if precision == "fp32" else f"precision={precision}"
        raise _nothing_faster(setting, "an fp32 model on a CPU")
    if heads is None:
        round_weights(model, precision)
    else:
        round_weights(model, precision, but=model.mtp)
        round_weights(model.mtp, heads)


def _nothing_faster(setting: str, missing: str) -> UserError:
    return UserError(
        f"{setting} needs {missing}: without it, weights would not be read faster; leave it at "
        "fp32."
    )


@torch.no_grad()
def round_weights(model: nn.Module, precision: str, *, but: nn.Module | None = None) -> None:
    """Round every matrix of a model in place, in its own dtype; gains and biases stay unchanged,
    and so do the parameters of ``but``. In fp32 nothing changes.

    In int8, the numbers of a row become integer multiples, -127 to 127, of a step: its largest
    absolute value / 127. The step is rounded up to 16 significant bits, so that fp32 represents the
    multiples exactly. A row with a NaN or an infinity becomes NaN.

    In int4, every 32 inputs of an output have 16 levels from their smallest to their largest
    number, with a step and an offset in fp16, as in GGUF's Q4_1. As in GGUF files, the embedding
    and the head keep 8 bits: they are rounded to int8, and so are matrices whose inputs are not a
    multiple of 32.
    """
    if precision == "fp32":
        return
    eight_bit = {id(m.weight) for m in model.modules() if isinstance(m, Head | nn.Embedding)}
    excluded = {id(parameter) for parameter in but.parameters()} if but is not None else set()
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in excluded:
            in_bytes = precision == "int4" and id(parameter) in eight_bit
            parameter.copy_(_ROUNDED["int8" if in_bytes else precision](parameter))


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
