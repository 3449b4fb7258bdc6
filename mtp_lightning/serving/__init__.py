"""An endpoint that speaks OpenAI's HTTP over the one decoding loop.

A request goes this way: ``app`` (HTTP) -> ``schemas`` (the fields of a body) -> ``asked`` (what the
engine is asked for) -> ``worker`` (the thread that owns the engine) -> ``replies`` (objects of
OpenAI's shape) -> ``app``; ``start`` and ``server`` begin and end it.
"""
