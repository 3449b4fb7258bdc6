"""``precision=bf16`` or ``int8``: half of the bytes to read in a pass of decoding, or a quarter.

Every matrix is rounded, to bf16 or to 255 steps a row; sums, gains, states and caches stay fp32.
The rounded model is decoded, and drafts give its plain text token for token. Weights that are bf16
already, as most published ones are, lose nothing in bf16; in int8 a text may become another.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.fused import rounded_weights_need
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.settings import require_choice


def check_precision(precision: str, *, compile: bool = False) -> None:
    """Refuse, before a model is read, a precision that no model can be decoded in on this machine.

    Args:
        precision: as the user gave it.
        compile: whether compiled passes are asked for.

    Raises:
        UserError: an unknown precision, or a rounded one that would not be faster here.
    """
    if require_choice("precision", precision, ("fp32", "bf16", "int8")) == "fp32":
        return
    if compile:
        raise UserError(
            f"precision={precision} does not go together with compile=true, whose programs "
            "read fp32: leave one of them out."
        )
    if missing := rounded_weights_need("cpu"):
        raise _nothing_faster(precision, missing)


def use_precision(model: MTPModel, precision: str) -> None:
    """Round ``model``, in place, to ``precision``: ``fp32`` (leaves it), ``bf16`` or ``int8``.

    Raises:
        UserError: another precision, or a rounded one that would not be faster here.
    """
    check_precision(precision)
    if precision == "fp32":
        return
    weight = model.head.weight
    if not weight.is_cpu or weight.dtype != torch.float32:
        raise _nothing_faster(precision, "an fp32 model on a CPU")
    round_weights(model, "bf16" if precision == "bf16" else "int8")


def _nothing_faster(precision: str, missing: str) -> UserError:
    return UserError(
        f"precision={precision} needs {missing}: without, nothing would be read faster; leave "
        "precision=fp32."
    )


@torch.no_grad()
def round_weights(model: nn.Module, precision: Literal["bf16", "int8"]) -> None:
    """Round every matrix of a model, in place and in its own dtype. Gains, biases and other vectors
    stay as they are.

    In int8 a row becomes multiples, up to 127, of a step that is a 127th of its largest number. The
    step has 16 binary digits, so that the multiples are numbers of fp32. A row with a number that
    is not finite becomes NaN.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(
                parameter.bfloat16() if precision == "bf16" else _rounded_to_bytes(parameter)
            )


def _rounded_to_bytes(weight: Tensor) -> Tensor:
    weight = weight.float()
    mantissa, exponent = torch.frexp(weight.abs().amax(-1, keepdim=True) / 127)
    # Up, so that no number is above 127.
    step = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return torch.where(step == 0, 0.0, (weight / step).round() * step)
