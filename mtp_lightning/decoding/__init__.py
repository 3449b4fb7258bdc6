"""Decoding: plain and self-speculative, one draft-verify loop for every variant."""

from mtp_lightning.decoding.generate import generate
from mtp_lightning.decoding.sequence import Generation

__all__ = ["Generation", "generate"]
