"""An HTTP server with OpenAI's API on top of the decoding engine.

A request passes through ``app`` (HTTP), ``schemas`` (the fields of a body), ``parsing`` (the
request to the engine), ``worker`` (the thread that owns the engine) and ``responses`` (objects of
OpenAI's shape), back to ``app``. ``start`` and ``server`` start and stop the server.

This folder is optional: ``generate.py`` works without it.
"""

from __future__ import annotations

from mtp_lightning.serving.start import serve

__all__ = ["serve"]
