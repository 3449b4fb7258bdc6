"""``precision=bf16`` or ``int8``: half of the bytes to read in a pass of decoding, or a quarter.

Every matrix is rounded, to bf16 or to 255 steps a row; sums, gains, states and caches stay fp32.
What is decoded is the rounded model: drafts give its plain text, token for token. Weights that are
bf16 already, as most published ones, lose nothing in bf16; in int8 a text may well become another.
"""

from __future__ import annotations

from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.kernels import native
from mtp_lightning.nn.kernels.few_rows import round_weights
from mtp_lightning.settings import require_choice


def check_precision(precision: str, *, compile: bool = False) -> None:
    """Refuse, before a model is read, what no model can be decoded in here.

    Args:
        precision: as the user gave it.
        compile: whether compiled passes are asked for.

    Raises:
        UserError: an unknown precision, or a rounded one that nothing here would read faster.
    """
    if require_choice("precision", precision, ("fp32", "bf16", "int8")) == "fp32":
        return
    if compile:
        raise UserError(
            f"precision={precision} does not go together with compile=true, whose programs "
            "read fp32: leave one of them out."
        )
    if native.library is None:
        raise _nothing_faster(precision, native.NEEDED)


def use_precision(model: MTPModel, precision: str) -> None:
    """Make ``model``, in place, one of ``precision``: ``fp32``, ``bf16`` or ``int8``.

    Raises:
        UserError: none of them, or a rounded one where nothing would read it faster.
    """
    check_precision(precision)
    if precision == "fp32":
        return
    if not native.fits(model.head.weight):
        raise _nothing_faster(precision, "an fp32 model on a CPU")
    round_weights(model, "bf16" if precision == "bf16" else "int8")


def _nothing_faster(precision: str, missing: str) -> UserError:
    return UserError(
        f"precision={precision} needs {missing}: without, nothing would be read faster; leave "
        "precision=fp32."
    )
