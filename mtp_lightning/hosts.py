"""Checks the Host header of requests to this machine's servers."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

_HOST = re.compile(r"(\[[\da-f:.]+\]|[^\[\]:@/\s]+)(:\d*)?")


def is_called(header: str | None, names: Collection[str] = ()) -> bool:
    """Whether a request's Host header is allowed.

    A foreign web page can make its own host name resolve to this machine ("DNS rebinding"), and
    could then read the answers. The browser sends that name in the header, so that unknown names
    are refused. Addresses are accepted, and so is a request without the header, since no browser
    sends one. ``names`` are allowed besides localhost, in lower case; ``*`` allows every name.
    """
    if header is None or "*" in names:
        return True
    match = _HOST.fullmatch(header.strip().lower())
    if match is None:
        return False
    name = match[1].strip("[]").removesuffix(".")
    if name == "localhost" or name in names:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
