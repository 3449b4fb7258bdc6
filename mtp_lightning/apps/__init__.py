"""The Hydra apps: each composes its config from the command line and calls one function with it.

Arguments are quoted for Hydra (``quote.py``), Hydra composes the config, and ``check_config.py``
checks it. Only then is the app's function called, which imports torch. Hydra's errors become one
sentence with this project's remedy (``hydra_errors.py``).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils
from hydra._internal.hydra import Hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mtp_lightning import parts
from mtp_lightning.command_line.quote import literal, require_utf8
from mtp_lightning.command_line.shell import (
    QUIET,
    VERBOSE,
    composing,
    program,
    readable_errors,
    version,
)
from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF

_FORMAT_GROUPS = Hydra.format_config_groups
_QUIET, _VERBOSE, _DRY_RUN = "--quiet", "--verbose", "--dry-run"

# Help texts use ${program:train}, which becomes the command that starts the app.
OmegaConf.register_new_resolver("program", program, replace=True)


def start(
    config_name: str,
    task: Callable[[DictConfig], Any],
    *,
    ends_with_reader: bool = False,
    trains: bool = False,
) -> None:
    """Run an app on this process's command line.

    ``--help WORD`` explains a group of conf/, an option (``GROUP=NAME``) or a key.
    ``--quiet`` hides progress and lowers the priority, and ``--verbose`` shows every number.

    Args:
        config_name: the app's config in conf/.
        task: the app's function. Hydra takes the app's name from the module that defines it.
        ends_with_reader: see :func:`~mtp_lightning.command_line.shell.readable_errors`.
        trains: whether the app has ``--verbose``, and sweeps with ``--dry-run``, which lists jobs.
    """
    # A traceback of logging, for example on a full disk, would hide the message itself.
    logging.raiseExceptions = False

    @wraps(task)
    def run(cfg: DictConfig) -> Any:
        with readable_errors():  # Hydra would show an error of the task its own way
            return task(cfg)

    errors = readable_errors(ends_with_reader=ends_with_reader)
    with errors, _hydra_as_ours(sys.argv[1:], config_name):
        words = ["--help" if word == "help" else word for word in sys.argv[1:]]
        _explain(words, config_name)
        if _QUIET in words:
            words.remove(_QUIET)
            # Inherited by all processes of a run, and by the jobs of a sweep.
            os.environ[QUIET] = "1"
            os.nice(19)
        if trains and _VERBOSE in words:
            words.remove(_VERBOSE)
            os.environ[VERBOSE] = "1"
        sweeps = {"-m", "--multirun"} & set(words)
        if trains and _DRY_RUN in words:
            if not sweeps:
                raise UserError("--dry-run lists the jobs of a sweep: add -m, or use --cfg job.")
            words[words.index(_DRY_RUN)] = "++hydra.launcher.dry_run=true"
        if sweeps and not trains:
            raise UserError(
                f"-m is an option of {program('train')}: start {program(config_name)} once for "
                "each value."
            )
        require_utf8(words)
        sys.argv[1:] = _options_first(literal(words))
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)()


def app(
    name: str, work: str, *, part: str = "", ends_with_reader: bool = False
) -> Callable[[], None]:
    """The command line of an app.

    Args:
        name: the app and its config in conf/.
        work: the dotted name of the function that is called with the config. It is imported only
            then, so that --help does not wait for torch.
        part: the part that has the function; empty for the core.
        ends_with_reader: see :func:`start`.
    """

    def task(cfg: DictConfig) -> None:
        module, _, function = work.rpartition(".")
        with imports():
            home = parts.need(part, program(name)) if part else importlib.import_module(module)
        getattr(home, function)(cfg)

    task.__module__ = f"{__name__}.{name}"  # from which Hydra takes the job's name
    return lambda: start(name, task, ends_with_reader=ends_with_reader)


@contextmanager
def imports() -> Iterator[None]:
    """For a task's imports: no garbage is collected meanwhile, and later collections leave out what
    they made. Looking through torch's objects took an eighth of the time to a first token."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@atexit.register
def _unfreeze() -> None:
    """At the end, Triton's libraries report what is still frozen as leaked."""
    if "triton" in sys.modules:
        gc.unfreeze()


class Check(Callback):
    """Checks the composed config before Hydra creates a folder and torch is imported."""

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        """Check the folders of configs; Hydra calls this before a sweep, and we before a run."""
        with readable_errors():
            from mtp_lightning.command_line.check_config import require_new_names

            for source in config.hydra.runtime.config_sources:
                if source.schema == "file":
                    require_new_names(Path(source.path))

    def on_run_start(self, config: DictConfig, **more: Any) -> None:
        """Check the config; Hydra calls this before the app's task."""
        self.on_multirun_start(config)
        with readable_errors():
            from mtp_lightning.command_line import check_config

            plain, typed = OmegaConf.to_container(config), list(config.hydra.overrides.task)
            if plain.get("run_dir", "") is None:  # type: ignore[union-attr]
                raise UserError("run_dir=null is not a folder: give its name, or leave it out.")
            # A sweep's own job types a value of each of its keys, and both folders.
            chosen = {override.lstrip("+").partition("=")[0] for override in typed}
            if swept := (config.hydra.sweeper.get("params") or {}).keys() - chosen:
                keys = ", ".join(sorted(swept))
                raise UserError(f"+sweeps=... varies {keys}: add -m for a run with each value.")
            of_sweep = [o for o in typed if o.lstrip("+").startswith(("sweep.", "sweep_dir="))]
            if of_sweep and "run_dir" not in chosen:
                raise UserError(f"{of_sweep[0]} is of a sweep: add -m, or leave it out.")
            name, folder = str(config.hydra.job.config_name), str(config.hydra.run.dir)
            check_config.check(plain, name, typed, folder=folder)  # type: ignore[arg-type]


def _explain(arguments: list[str], app: str) -> None:
    """Answer ``--version``, or ``--help WORD`` [``--config-dir FOLDER``], and exit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", dest="word", nargs="?")
    parser.add_argument("--config-dir", "-cd", type=Path, nargs="?")
    parser.add_argument("--version", action="store_true")
    args, _ = parser.parse_known_args(arguments)
    if args.word or args.version:
        from mtp_lightning.command_line.conf_comments import help_for

        print(version() if args.version else help_for(args.word, args.config_dir, app))
        sys.exit(0)


@contextmanager
def _hydra_as_ours(arguments: list[str], app: str) -> Iterator[None]:
    """Let Hydra raise its errors as a :class:`UserError` of one sentence, and compose only once.

    Hydra composes every config twice, the first time to see whether it sets ``hydra.mode``. Only
    the command line or a config from elsewhere can do that.
    """
    foreign = any(word.startswith(("hydra.mode=", "--config-", "-cd", "-cn")) for word in arguments)
    originals = utils.run_and_report, Hydra.get_mode
    utils.run_and_report = lambda func: func()
    Hydra.format_config_groups = _without_parts  # type: ignore[assignment,method-assign]
    if not foreign:
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        with composing(arguments, app):
            yield
    finally:
        utils.run_and_report, Hydra.get_mode = originals  # type: ignore[method-assign]
        Hydra.format_config_groups = _FORMAT_GROUPS  # type: ignore[method-assign]


def _without_parts(hydra: Hydra, *args: Any) -> str:
    """Hydra's list of groups for ``--help``, without files that are only parts of options."""
    from mtp_lightning.command_line.conf_comments import PARTS

    return re.sub(rf"\b({'|'.join(PARTS)}), ", "", _FORMAT_GROUPS(hydra, *args))


def _options_first(arguments: list[str]) -> list[str]:
    """Move the options before the overrides, as Hydra wants them; refuse an unknown one."""
    parser = utils.get_args_parser()

    def refuse(message: str) -> NoReturn:
        print(f"error: {message}. (--help)", file=sys.stderr)
        sys.exit(1)

    parser.error = refuse  # type: ignore[method-assign]
    options = list(arguments)
    args, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        words = " ".join(word for word in unknown if word.startswith("-"))
        refuse(f"unrecognized arguments: {words}; a setting is KEY=VALUE, without dashes")
    overrides = args.overrides
    for override in overrides:
        options.remove(override)
    return [*options, *overrides]
