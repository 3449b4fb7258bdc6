"""How the apps speak to people when something is wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A run that a signal (Ctrl-C, SIGTERM) ended in good order; the message says what was saved.

    Args:
        message: one line.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def readable_errors() -> Iterator[None]:
    """One line and exit code 1 for what a user can mend: ``ValueError`` and ``OSError``.

    Ctrl-C ends with one line, too, and with the shell's code for it, 130 (SIGTERM: 143).
    Anything else is a defect and keeps its traceback; HYDRA_FULL_ERROR=1 shows all of them.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        # omegaconf's, by name: importing it here would take it out of the apps and experiment/.
        if type(error).__name__ != "MissingMandatoryValue":
            raise
        key = getattr(error, "full_key", None)
        print(f"error: {key} has no value: give it as {key}=...", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted.", file=sys.stderr)
        sys.exit(128 + getattr(interrupt, "signum", signal.SIGINT))
