"""Heads that leap: depth k predicts ``x_{t+1+sk}`` (Liu et al. 2025, arXiv 2505.17505).

The windows then reach s D tokens beyond the next one; what a head computes is the same.
"""

from __future__ import annotations

from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole


class StrideSwitch:
    """The field of a config whose heads may leap.

    Attributes:
        stride: s.
    """

    stride: int
    correction: str

    def check_stride(self) -> None:
        """Refuse a stride that is none, or that leaves tokens out which the heads are to read.

        Raises:
            UserError: naming the switch and its value.
        """
        require_whole("mtp.stride", self.stride, least=1)
        if self.stride > 1 and self.correction != "none":
            raise UserError(
                f"mtp.stride={self.stride} leaves tokens out between the heads' targets, which "
                f"mtp.correction={self.correction} would have to read: set one of the two to its "
                "default."
            )
