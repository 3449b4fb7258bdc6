"""``precision=bf16`` or ``int8``: a pass of decoding reads half or a quarter of the bytes.

Every matrix is rounded, to bf16 or to 255 levels per row. Norm gains, biases, hidden states, caches
and sums stay fp32. The rounded model is then decoded: with or without drafts, its greedy text is
the same token for token. Weights stored in bf16, as most published ones are, lose nothing in bf16;
int8 can change a text.
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
    """Refuse a precision that this machine cannot decode in, before a model is read.

    Args:
        precision: as the user gave it.
        compile: whether compiled passes are asked for.

    Raises:
        UserError: the precision is unknown, or rounded weights would not be faster here.
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
    """Round ``model`` in place to ``precision``: ``fp32`` (no change), ``bf16`` or ``int8``.

    Raises:
        UserError: the precision is unknown, or rounded weights would not be faster here.
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
        f"precision={precision} needs {missing}: without it, weights would not be read faster; "
        "leave precision=fp32."
    )


@torch.no_grad()
def round_weights(model: nn.Module, precision: Literal["bf16", "int8"]) -> None:
    """Round every matrix of a model in place, in its own dtype; gains and biases stay unchanged.

    In int8, the numbers of a row become integer multiples, -127 to 127, of a step: its largest
    absolute value / 127. The step is rounded up to 16 significant bits, so that fp32 represents the
    multiples exactly. A row with a NaN or an infinity becomes NaN.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(
                parameter.bfloat16() if precision == "bf16" else _rounded_to_bytes(parameter)
            )


def _rounded_to_bytes(weight: Tensor) -> Tensor:
    weight = weight.float()
    mantissa, exponent = torch.frexp(weight.abs().amax(-1, keepdim=True) / 127)
    # Rounded up, so that no multiple exceeds 127.
    step = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return torch.where(step == 0, 0.0, (weight / step).round() * step)
