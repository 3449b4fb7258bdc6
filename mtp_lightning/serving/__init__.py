"""An endpoint that speaks OpenAI's HTTP over the one decoding loop.

A request goes this way: ``app`` (HTTP) -> ``schemas`` (the fields of a body) -> ``asked`` (what the
engine is asked for) -> ``worker`` (the thread that owns the engine) -> ``replies`` (objects of
OpenAI's shape) -> ``app``; ``start`` and ``server`` begin and end it.

This folder comes off: ``generate.py`` writes without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from mtp_lightning.serving.start import serve

__getattr__ = on_demand(__name__)

__all__ = ["serve"]
