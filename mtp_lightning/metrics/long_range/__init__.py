"""How far back a model looks: see docs/long_range.md."""

from mtp_lightning.metrics.long_range.measure import LongRange

__all__ = ["LongRange"]
