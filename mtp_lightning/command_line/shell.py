"""The apps' common command-line behavior: names of programs, error messages, closed pipes."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, TextIO, cast

from mtp_lightning.errors import UserError, lacks_memory
from mtp_lightning.paths import ROOT

_OWN = tuple(
    f"{ROOT / name}/" for name in ("mtp_lightning", "data_modules", "sweeps", "hydra_plugins")
)
_LIBRARIES = tuple(
    f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
# Environment variable: 1 hides progress in this process and those that it starts (--quiet).
QUIET = "MTP_LIGHTNING_QUIET"
# Environment variable: 1 prints every number at the end of a run (--verbose).
VERBOSE = "MTP_LIGHTNING_VERBOSE"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Make a text of a file or a model safe to print: its control characters could change a
    terminal's title, colors or input. They are replaced by Python's notation, except for line ends
    and tabs."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def has_styles() -> bool:
    """Whether standard output is a terminal that has colors and a cursor to move."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Parser(argparse.ArgumentParser):
    """A parser for a tool's options, with the apps' ``--version`` and errors of one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--version", action=_ShowVersion, nargs=0, help="show the version and exit"
        )

    @classmethod
    def of(cls, doc: str | None, *, module: str, program: str) -> Parser:
        """A parser whose help is the docstring of the tool's module, with the command as it was
        typed in place of ``python -m MODULE``."""
        about = (doc or "").replace(f"python -m {module}", program)
        form = argparse.RawDescriptionHelpFormatter
        return cls(prog=program, description=about, formatter_class=form)

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with code 1: 2 has a meaning in some programs."""
        self.exit(1, f"error: {printable(message)}. ({self.prog} --help)\n")


def listed(text: str) -> tuple[str, ...]:
    """The names in a comma-separated option, as the ``type`` of an argument."""
    return tuple(filter(None, map(str.strip, text.split(","))))


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for, which takes milliseconds."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())
        parser.exit()


class Stopped(KeyboardInterrupt):
    """A signal (Ctrl-C, SIGTERM) has ended a run in good order; the message says what was saved."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise :class:`Stopped` at SIGTERM, as Ctrl-C raises KeyboardInterrupt."""

    def stop(signum: int, _: Any) -> None:
        raise Stopped("terminated.", signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main_module() -> str | None:
    """The module that this process runs (``python -m``); None for a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else str(spec.name)


def this_program() -> list[str]:
    """Python's arguments that start this program again."""
    module = main_module()
    return [os.path.abspath(sys.argv[0])] if module is None else ["-m", module]


def program(app: str) -> str:
    """The command that starts an app in the way in which this process was started."""
    return f"python {app}.py" if main_module() is None else f"mtp-lightning {app}"


class _PipeSafe:
    """A standard stream that survives a closed pipe, as of ``| head -1``. If ``ends``, the program
    then exits with the shell's code for SIGPIPE. Otherwise it continues without further output."""

    def __init__(self, stream: TextIO, *, ends: bool = False) -> None:
        self._stream = stream
        self._ends = ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._closed_pipe():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._closed_pipe():
            self._stream.flush()

    @contextmanager
    def _closed_pipe(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # This also covers writes to the descriptor itself, and Python's flush at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._ends:
                sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            if error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode):
                return  # a closed terminal, whose SIGHUP ends the program in good order
            raise OSError(error.errno, error.strerror, self._stream.name) from None


@contextmanager
def _surviving_closed_pipes(*, ends_with_reader: bool) -> Iterator[None]:
    """Handle closed pipes of stdout and stderr; see :class:`_PipeSafe`."""
    if isinstance(sys.stdout, _PipeSafe):
        yield
        return
    _open_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A terminal that is not UTF-8 shows codes instead of letters, as on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    out = cast(TextIO, _PipeSafe(sys.stdout, ends=ends_with_reader))
    err = cast(TextIO, _PipeSafe(sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            with suppress(SystemExit):  # the exit code is already decided
                out.flush()


def _open_closed_streams() -> None:
    """Open the null device as each standard stream that was closed before the start (``>&-``).
    Otherwise Python has no such stream, and the next file to be opened gets its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def version() -> str:
    """The line that ``--version`` prints."""
    from importlib import metadata

    return f"mtp-lightning {metadata.version('mtp-lightning')}"


@contextmanager
def readable_errors(*, ends_with_reader: bool = False) -> Iterator[None]:
    """Print one line, and exit with code 1, for errors that a user can fix.

    These are :class:`UserError`, ``OSError``, and a ``ValueError`` of a user's own code. Any other
    error is a defect of this project or a library, and keeps its traceback. HYDRA_FULL_ERROR=1
    shows all tracebacks. Ctrl-C also prints one line, and exits with the shell's code 130 (SIGTERM:
    143). When the reader of the output closes it (``| head -1``), the program continues its work.

    Args:
        ends_with_reader: whether the program exits quietly instead when nobody reads its output.
    """
    with _surviving_closed_pipes(ends_with_reader=ends_with_reader):
        try:
            yield
        except Exception as error:
            message = _message(error)
            if message is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {printable(message)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt as interrupt:
            print(printable(str(interrupt)) or "interrupted.", file=sys.stderr)
            sys.exit(128 + getattr(interrupt, "signum", signal.SIGINT))


@contextmanager
def composing(overrides: Iterable[str], app: str = "config") -> Iterator[None]:
    """Turn Hydra's errors about overrides of an app's config, as they were typed, into one sentence
    with a remedy.

    Raises:
        UserError: Hydra or OmegaConf refused the overrides.
    """
    try:
        yield
    except Exception as error:
        from mtp_lightning.command_line.hydra_errors import sentence

        message = sentence(error, overrides, app)
        if not message or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise UserError(message) from error


def _message(error: Exception) -> str | None:
    """The message for an error; None for a defect."""
    # Compared by name, since importing OmegaConf takes time.
    classes = {kind.__name__ for kind in type(error).__mro__}
    if "OmegaConfBaseException" in classes:
        key = getattr(error, "full_key", None)
        if {"MissingMandatoryValue", "ConfigAttributeError", "ConfigKeyError"} & classes:
            return f"{key} has no value: give it as {key}=..."
        typed = {"InterpolationResolutionError", "GrammarParseError"} & classes
        return f"{str(error).splitlines()[0]}: check what is typed as ${{...}}." if typed else None
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is None or error.strerror is None:
            return str(error)
        return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): check the path."
    if lacks_memory(error):
        reason = ". ".join(str(error).split(". ")[:2]) or "The memory is full"
        return f"{reason}: take smaller batches, shorter windows or a smaller model."
    if isinstance(error, ValueError) and _is_users(error):
        return f"{error} (HYDRA_FULL_ERROR=1 shows where)"
    return None


def _is_users(error: ValueError) -> bool:
    """Whether code outside this project and the installed libraries raised the error."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    return not (
        file.startswith((*_OWN, *_LIBRARIES, "<frozen "))
        or {"site-packages", "dist-packages"} & set(Path(file).parts)
    )
