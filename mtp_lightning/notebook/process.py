"""A program of the platform in its own process, with its output shown as it comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

from mtp_lightning.system import STARTER

# A run's progress line, which replaces the one before.
_PROGRESS = re.compile(r"step \d+/")
# Lines that are kept for an error that is not the user's.
_LAST_LINES = 30


def start(command: Sequence[str], *, quiet: bool = False) -> None:
    """Runs ``python COMMAND`` to its end, and shows its output unless ``quiet``. An interrupt is
    passed on to the program, which then ends cleanly; the rest of its output is shown.

    Raises:
        RuntimeError: if the program failed, with its last sentence.
        KeyboardInterrupt: if it was interrupted.
    """
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, STARTER: str(os.getpid())},  # it ends with the notebook's kernel
        start_new_session=True,  # so that an interrupt reaches it only from here, and once
    ) as process:
        last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        interrupted = False
        while True:
            try:
                _show(process, last_lines, quiet=quiet)
                break
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt(last_lines[-1] if last_lines else "interrupted")
    if process.returncode:
        raise RuntimeError(_reason(last_lines))


def _show(process: subprocess.Popen[str], last_lines: deque[str], *, quiet: bool) -> None:
    assert process.stdout is not None
    on_progress = False
    for line in process.stdout:
        line = line.rstrip("\n")
        last_lines.append(line)
        if quiet:
            continue
        progress = _PROGRESS.match(line) is not None
        if on_progress and not progress:
            print()
        # Padded, so that nothing of a longer line remains.
        print(f"\r{line:<100}" if progress else line, end="" if progress else "\n", flush=True)
        on_progress = progress
    if on_progress:
        print()


def _reason(last_lines: Sequence[str]) -> str:
    """The sentence for the user; for a defect, the end of the output."""
    for line in reversed(last_lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return "\n".join(last_lines)
