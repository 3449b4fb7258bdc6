"""How the apps speak to people: what they are called, and what they say when something is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT

_OWN = tuple(
    f"{ROOT / name}/" for name in ("mtp_lightning", "data_modules", "sweeps", "hydra_plugins")
)
_LIBRARIES = tuple(
    f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
# Set to 1, a process and those that it starts show no progress (--quiet).
QUIET = "MTP_LIGHTNING_QUIET"
# Set to 1, runs end with every number (--verbose).
VERBOSE = "MTP_LIGHTNING_VERBOSE"


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """A text that no terminal obeys: of a file or a model, it may hold codes that retitle, recolour
    or type. Line ends and tabs stay; other control characters are shown as Python writes them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def require_package(name: str, *, what: str, extra: str) -> None:
    """Say what is missing before anything is done, not behind hours of it.

    Args:
        name: of a package.
        what: needs it.
        extra: that has it.

    Raises:
        UserError: it is not installed; with the command that installs it.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs the package {name}: pip install -e '.[{extra}]'.")


class Parser(argparse.ArgumentParser):
    """Of a tool's options: a wrong one is told in a line, as the apps tell theirs."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with code 2."""
        self.exit(2, f"error: {printable(message)}. ({self.prog} --help)\n")


class Stopped(KeyboardInterrupt):
    """A run that a signal (Ctrl-C, SIGTERM) ended in good order; the message says what was saved.

    Args:
        message: one line.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


def main_module() -> str | None:
    """The module that this process was started as (``python -m``); None for a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else str(spec.name)


def this_program() -> list[str]:
    """What Python is given to start this program again."""
    module = main_module()
    return [os.path.abspath(sys.argv[0])] if module is None else ["-m", module]


def program(app: str) -> str:
    """How a person starts another app (or this one) in the way this process was started."""
    return f"python {app}.py" if main_module() is None else f"mtp-lightning {app}"


class _Heard:
    """A standard stream whose reader may go before the program ends, as that of ``| head -1``.

    Args:
        stream: the stream.
        ends: whether the program ends then, by the shell's code of SIGPIPE; else it goes on, and
            what nobody reads is dropped.
    """

    def __init__(self, stream: TextIO, *, ends: bool = False) -> None:
        self._stream = stream
        self._ends = ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unread():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unread():
            self._stream.flush()

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # Also for what writes to the file itself, and for what Python flushes at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._ends:
                sys.exit(128 + signal.SIGPIPE)


@contextmanager
def _outliving_readers(*, but_of_stdout: bool) -> Iterator[None]:
    """Let no closed pipe end a program; see :class:`_Heard`."""
    if sys.stdout is None or sys.stderr is None or isinstance(sys.stdout, _Heard):
        yield
        return
    out = cast(TextIO, _Heard(sys.stdout, ends=but_of_stdout))
    told = cast(TextIO, _Heard(sys.stderr))
    with redirect_stdout(out), redirect_stderr(told):
        try:
            yield
        finally:
            with suppress(SystemExit):  # the code is decided
                out.flush()


@contextmanager
def readable_errors(*, ends_with_reader: bool = False) -> Iterator[None]:
    """One line and exit code 1 for what a user can mend.

    That is a :class:`UserError` or an ``OSError``, or a ``ValueError`` of a user's own code.
    Anything else is a defect, of this project or of a library, and keeps its traceback;
    HYDRA_FULL_ERROR=1 shows the tracebacks of all. Ctrl-C ends with one line, too, and with the
    shell's code for it, 130 (SIGTERM: 143). A reader of the output that goes (``| head -1``) ends
    nothing, unless the output is all that there is to do: work goes on to its end.

    Args:
        ends_with_reader: whether the program ends, quietly, when nobody reads its output.
    """
    with _outliving_readers(but_of_stdout=ends_with_reader), _as_lines():
        yield


@contextmanager
def _as_lines() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        told = _told(error)
        if told is None:
            raise
        print(f"error: {printable(told)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(printable(str(interrupt)) or "interrupted.", file=sys.stderr)
        sys.exit(128 + getattr(interrupt, "signum", signal.SIGINT))


def _told(error: Exception) -> str | None:
    """What is said of an error; None of a defect."""
    omegaconf = {kind.__name__ for kind in type(error).__mro__}  # importing it would take time
    if "OmegaConfBaseException" in omegaconf:
        key = getattr(error, "full_key", None)
        if "MissingMandatoryValue" in omegaconf:
            return f"{key} has no value: give it as {key}=..."
        typed = {"InterpolationResolutionError", "GrammarParseError"} & omegaconf
        return f"{str(error).splitlines()[0]}: check what is typed as ${{...}}." if typed else None
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is None or error.strerror is None:
            return str(error)
        return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): check the path."
    if isinstance(error, ValueError) and _is_users(error):
        return f"{error} (HYDRA_FULL_ERROR=1 shows where)"
    return None


def _is_users(error: ValueError) -> bool:
    """Whether it was raised by code that is neither this project's nor a library's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = "" if trace is None else trace.tb_frame.f_code.co_filename
    return not (
        file.startswith((*_OWN, *_LIBRARIES, "<frozen "))
        or {"site-packages", "dist-packages"} & set(Path(file).parts)
    )
