"""Programs that start as forks of a process that has imported their packages once.

The imports of Hydra, torch and Lightning take seconds, most of the time of a small program.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

# The modules that every app imports before it has checked its config, and those of a run.
LIGHT = ("mtp_lightning.apps", "mtp_lightning.command_line.check_config", "mtp_lightning.console")
HEAVY = (
    *LIGHT,
    *(f"mtp_lightning.experiment.{name}" for name in ("training", "evaluating", "generating")),
)


class Done(subprocess.CompletedProcess[str]):
    """A program that has ended.

    Attributes:
        seconds: its CPU time, with that of the imports before it started.
    """

    seconds: float


class Warm:
    """A process that has imported some modules, to be forked."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._imports: float = self._answer(480)

    def run(self, args: list[str], *, cwd: Path, env: dict[str, str], seconds: float = 480) -> Done:
        """``python FILE ..``, ``python -m MODULE ..`` or ``python -c CODE ..``, to its end."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = [args[1:], str(cwd), env, str(out), str(err)]
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code, used = self._answer(seconds)
            done = Done(args, code, out.read_text("utf-8"), err.read_text("utf-8"))
        done.seconds = used + self._imports
        return done

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            self._process.kill()
            warm.cache_clear()
            raise subprocess.TimeoutExpired(self._process.args, seconds)
        return json.loads(self._process.stdout.readline())


@functools.cache
def warm(modules: tuple[str, ...]) -> Warm:
    """The process with these modules, of this process."""
    return Warm(modules)


def main() -> None:
    before = set(os.environ)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    added = {key: value for key, value in os.environ.items() if key not in before}
    gc.freeze()  # a collection in a fork would copy every page
    used = os.times()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps(used.user + used.system), file=answers, flush=True)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            args, cwd, env, *files = json.loads(line)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(added | env)
            paths = env.get("PYTHONPATH", "").split(os.pathsep)
            sys.path[1:1] = [path for path in paths if path and path not in sys.path[1:]]
            for number, name in enumerate((os.devnull, *files)):
                flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
                os.dup2(os.open(name, flags), number)
            faulthandler.enable()  # a crash in C++ prints its place, also in forks of this one
            os._exit(code_of(args))
        _, status, usage = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps([code, usage.ru_utime + usage.ru_stime]), file=answers, flush=True)


def code_of(args: list[str]) -> int:
    """Run a program to its end as Python does, but do not take its modules apart; its exit code."""
    code = 0
    try:
        try:
            _run(args)
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run(args: list[str]) -> None:
    if args[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *args[2:]], ""
        exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
    elif args[0] == "-m":
        sys.argv, sys.path[0] = args[1:], ""
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
        runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    main()
