"""No further token: plain next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.kinds import NoModules
from mtp_lightning.nn.config import TrunkConfig


@dataclass(frozen=True, kw_only=True)
class NoMTPConfig(MTPConfig, variant="none"):
    """``mtp=none``: no parameters, no cost."""

    fixed_depth: ClassVar[int] = 0

    depth: int = 0

    def build(self, trunk: TrunkConfig) -> NoModules:
        return NoModules(self)
