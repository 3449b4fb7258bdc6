"""By which names a server that listens here may be called."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

_HOST = re.compile(r"(\[[\da-f:.]+\]|[^\[\]:@/\s]+)(:\d*)?")


def is_called(header: str | None, names: Collection[str] = ()) -> bool:
    """Whether a request's Host header is one of this server's.

    A page of a foreign site can let its own name lead to this machine ("DNS rebinding") and would
    then read the answers; a browser names that site in the header. An address is no name, so it is
    taken, and so is a request without the header, which no browser sends.

    Args:
        header: as it came; None for none.
        names: beside localhost, in small letters; ``*`` takes every name.
    """
    if header is None or "*" in names:
        return True
    found = _HOST.fullmatch(header.strip().lower())
    if found is None:
        return False
    name = found[1].strip("[]").removesuffix(".")
    if name == "localhost" or name in names:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
