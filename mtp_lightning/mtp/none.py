"""No further token: plain next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.kinds import Targets
from mtp_lightning.nn.config import TrunkConfig


@dataclass(frozen=True, kw_only=True)
class NoMTPConfig(MTPConfig, variant="none"):
    """``mtp=none``: depth 0, no parameters, no cost.

    Raises:
        UserError: a depth other than 0.
    """

    depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth:
            raise UserError(f"mtp=none predicts one token, but mtp.depth={self.depth}: set it 0.")

    def build(self, trunk: TrunkConfig) -> Targets:
        return Targets(self)
