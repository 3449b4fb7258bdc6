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


def use_precision(model: MTPModel, precision: str) -> None:
    """Make ``model``, in place, one of ``precision``: ``fp32``, ``bf16`` or ``int8``.

    Raises:
        UserError: none of them, or a rounded one where nothing would read it faster.
    """
    if require_choice("precision", precision, ("fp32", "bf16", "int8")) == "fp32":
        return
    weight = model.head.weight
    if not native.fits(weight):
        missing = "an fp32 model on a CPU" if native.library is not None else native.NEEDED
        raise UserError(
            f"precision={precision} needs {missing}: without, nothing would be read faster; leave "
            "precision=fp32."
        )
    round_weights(model, "bf16" if precision == "bf16" else "int8")
