"""The page at ``/``: one HTML file, sent with a strict content security policy."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

_FILE = Path(__file__).with_name("page.html")


def page() -> Response:
    """The page. Its policy allows only its own style and script, named by their digests, and
    requests to this server; nothing else is executed or loaded."""
    html = _FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "style-src": _digest(html, "style"),
        "script-src": _digest(html, "script"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {of}" for name, of in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(html, media_type="text/html", headers=headers)


def _digest(html: str, element: str) -> str:
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
