"""The jobs of a sweep, their folders, how to run them, and ``sweep.json``, which stores all that.

A job is identified by its overrides. It keeps its folder when the sweep is started again with more
values, so folders carry no job numbers.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mtp_lightning.command_line.quote import quoted
from mtp_lightning.command_line.shell import this_program
from mtp_lightning.errors import UserError
from mtp_lightning.paths import app
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.config import PLACES, key_of, lies_in
from mtp_lightning.run.layout import SUMMARY_FILE, SWEEP_FILE
from mtp_lightning.run.status import read_status, state_of
from mtp_lightning.stored import component, read_json
from sweeps import grouped
from sweeps.process import Job

VERSION = 1
TRAIN = "train"
T = TypeVar("T")

_LONGEST = 80  # characters of a folder's name; TensorBoard shows it at every curve


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to run a planned job: everything about it except its folder and its overrides."""

    program: str  # ``train`` for this project's own, else the user's, as it was started
    # Options of its command line before the job's overrides: config and Hydra settings.
    options: tuple[str, ...]
    cwd: str  # where relative paths of its overrides start
    processes: int  # that train together on each machine
    nodes: int  # machines that train together
    max_steps: int | None  # optimizer steps; None if the run chooses them (compare.match=flops)
    on_cpu: bool  # whether it asks for the CPU even if there are GPUs

    def job(
        self,
        folder: Path,
        overrides: Sequence[str],
        *,
        labels: Sequence[str],
        program: Sequence[str],
    ) -> Job:
        """The job that this recipe runs in a folder of the sweep's. ``labels`` are the overrides
        that distinguish it from the other jobs; ``program`` has Python's arguments that start it: a
        script, or ``-m`` and a module."""
        # The sweep's folder is given too: its default holds the time, in which jobs would differ.
        folders = (f"run_dir={quoted(str(folder))}", f"sweep_dir={quoted(str(folder.parent))}")
        return Job(
            folder=folder,
            overrides=tuple(overrides),
            command=(sys.executable, *program, *self.options, *overrides, *folders),
            processes=self.processes,
            nodes=self.nodes,
            max_steps=self.max_steps,
            on_cpu=self.on_cpu,
            labels=tuple(labels),
            cwd=Path(self.cwd),
        )

    @classmethod
    def of(
        cls, settled: dict[str, Any], *, program: str = TRAIN, options: Sequence[str] = ()
    ) -> Recipe:
        """How to run the job of a checked config (:func:`sweeps.compose.settle`) from here; errors
        as in :func:`count_processes`."""
        trainer = settled["trainer"]
        return cls(
            program=program,
            options=tuple(options),
            cwd=str(Path.cwd()),
            processes=count_processes(settled),
            nodes=trainer["num_nodes"],
            # compare.match=flops chooses the steps when the job starts.
            max_steps=None if settled["compare"]["match"] == "flops" else trainer["max_steps"],
            on_cpu=trainer["accelerator"] == "cpu",
        )

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Recipe:
        """A recipe from ``sweep.json``. Raises a KeyError for a missing value, and a ValueError for
        one of another type."""
        values = {field.name: stored[field.name] for field in fields(cls)}
        kinds = {"program": str, "options": list, "cwd": str, "on_cpu": bool}
        for key, value in values.items():
            unknown = key == "max_steps" and value is None
            if type(value) is not kinds.get(key, int) and not unknown:
                raise ValueError(f"{key}: {value!r}")
        for key in ("processes", "nodes"):
            if values[key] < 1:
                raise ValueError(f"{key}: {values[key]}")
        if not all(isinstance(option, str) for option in values["options"]):
            raise ValueError(f"options: {values['options']!r}")
        return cls(**{**values, "options": tuple(values["options"])})


@dataclass
class PlannedJob:
    """One run of a sweep, as ``sweep.json`` has it."""

    folder: str  # the name of its folder in the sweep's folder
    overrides: tuple[str, ...]  # those that determine its results, without housekeeping
    # How to run it; None if the file does not say, as for the jobs of claims.
    recipe: Recipe | None = None


def job_of(
    settled: dict[str, Any],
    folder: Path,
    overrides: Sequence[str],
    *,
    labels: Sequence[str] = (),
    config_dir: Path | None = None,
) -> Job:
    """A run of this project's train app with a checked config, in a folder, started from here.
    ``config_dir`` has more configs, as in :func:`sweeps.compose.compose_run`; errors as in
    :func:`count_processes`."""
    options = ["--config-dir", str(config_dir)] if config_dir else []
    recipe = Recipe.of(settled, options=options)
    return recipe.job(folder, overrides, labels=labels, program=app(TRAIN))


def count_processes(settled: dict[str, Any]) -> int:
    """Number of processes of a job that train together on each of its machines.

    Raises:
        UserError: if they cannot be counted, or would not train together.
    """
    trainer = settled["trainer"]
    devices = trainer["devices"]
    if isinstance(devices, bool) or not str(devices).isdigit() or int(devices) < 1:
        raise UserError(
            f"trainer.devices={devices} in a sweep: give a number, so that jobs can share them."
        )
    for key in ("devices", "num_nodes"):
        if int(trainer[key]) > 1 and trainer["strategy"] == "auto":
            raise UserError(
                f"trainer.{key}={trainer[key]} in a sweep needs trainer.strategy=ddp or fsdp."
            )
    return int(devices)


def name_of_program() -> str:
    """This process's program, as a recipe names it."""
    program = this_program()
    is_train = program in (app(TRAIN), ["-m", "mtp_lightning.apps.train"])
    return TRAIN if is_train else shlex.join(program)


def _jobs(stored: dict[str, Any]) -> list[PlannedJob]:
    """The jobs from the content of ``sweep.json``; errors as in :meth:`Recipe.from_dict`, also a
    ValueError for a folder outside the sweep's."""
    jobs = []
    for job in stored["jobs"]:
        folder, overrides = job["folder"], job["overrides"]
        if not component(folder):
            raise ValueError(f"{folder!r} is not a job's folder")
        if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
            raise ValueError(f"{folder} has no list of overrides")
        recipe = Recipe.from_dict(job["run"]) if "run" in job else None
        jobs.append(PlannedJob(folder, tuple(overrides), recipe))
    return jobs


def must_run(folder: Path, *, retry_failed: bool = False) -> bool:
    """Whether a job is still to be run to its end; a failed one only if ``retry_failed``."""
    state = state_of(folder)
    if state == "done":
        return not (folder / SUMMARY_FILE).is_file()
    return retry_failed or state != "failed"


def refuse_run_folder(overrides: Iterable[str], remedy: str) -> None:
    """Raises a UserError for an override of a folder that every job has by itself."""
    folders = ("run_dir", "paths.output_dir", "logger.csv.folder", "logger.tensorboard.folder")
    for override in overrides:
        if key_of(override) in folders:
            raise UserError(f"{override} is the folder of one run: {remedy}.")


def varied_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys that do not have the same override in every job, in order of appearance."""
    by_key = grouped((key_of(override), override) for overrides in jobs for override in overrides)
    return [key for key, group in by_key.items() if len(set(group)) > 1 or len(group) < len(jobs)]


def varied_labels(jobs: Sequence[PlannedJob]) -> dict[str, tuple[str, ...]]:
    """By folder, the overrides that distinguish each job from the others."""
    varied = set(varied_keys([job.overrides for job in jobs]))
    return {job.folder: tuple(o for o in job.overrides if key_of(o) in varied) for job in jobs}


def overrides_digest(overrides: Sequence[str]) -> str:
    """Eight hexadecimal digits for a job, for any order of its overrides."""
    return hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]


def folder_name(overrides: Sequence[str], varied: Sequence[str]) -> str:
    """A readable name that is safe in paths and, unquoted, in Hydra overrides.

    It holds the varied overrides, or all if none is varied; if they are long, their beginning and a
    digest of all.
    """
    parts = [o for o in overrides if key_of(o) in varied] or overrides
    name = "_".join(map(_item, parts)) or "default"
    if len(name) <= _LONGEST:
        return name
    name = name[: _LONGEST - 9].rstrip("_-.")
    return "_".join(filter(None, (name, overrides_digest(overrides))))


def _item(override: str) -> str:
    text = override.lstrip("+~").replace("=", "-", 1).replace("'", "").replace('"', "")
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._")


def read_versioned(
    file: Path, version: int, parse: Callable[[dict[str, Any]], T], *, remedy: str
) -> T | None:
    """Read and parse a JSON file that has a version; None if it does not exist.

    Raises:
        UserError: the file is damaged or of another version; ends in the remedy.
    """
    if not file.exists():
        return None
    try:
        content = read_json(file)
        if content["version"] != version:
            raise UserError(f"version {content['version']}")
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as version {version} of this file ({error}): {remedy}."
        ) from error


class SweepPlan:
    """The jobs of a sweep's folder, which need not exist, read from and written to ``sweep.json``.

    Raises:
        UserError: if its ``sweep.json`` is damaged or has another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remedy = "give the sweep another folder"
        self.jobs = read_versioned(folder / SWEEP_FILE, VERSION, _jobs, remedy=remedy) or []

    def add(
        self, batch: Sequence[Sequence[str]], *, varied: Sequence[str] | None = None
    ) -> list[PlannedJob]:
        """The jobs of a call; known jobs keep their folders.

        Args:
            batch: each job's overrides; the same job twice counts once.
            varied: keys to name new folders by; by default those that differ in the batch.
        """
        by_overrides = {frozenset(job.overrides): job for job in self.jobs}
        taken = {job.folder for job in self.jobs}
        # Those that determine a job's results.
        batch_overrides = [
            tuple(o for o in overrides if not lies_in(key_of(o), PLACES)) for overrides in batch
        ]
        varied = varied_keys(batch_overrides) if varied is None else varied
        planned: dict[str, PlannedJob] = {}
        for overrides in batch_overrides:
            job = by_overrides.get(frozenset(overrides))
            if job is None:
                job = PlannedJob(self._free_name(overrides, varied, taken), overrides)
                taken.add(job.folder)
                by_overrides[frozenset(overrides)] = job
                self.jobs.append(job)
            planned[job.folder] = job
        return list(planned.values())

    def write(self, command: Sequence[str]) -> None:
        """Stores all jobs, including those of earlier calls, and this call's command line."""
        content = {
            "version": VERSION,
            "command": list(command),
            "varied": varied_keys([job.overrides for job in self.jobs]),
            "jobs": [
                {"folder": job.folder, "overrides": list(job.overrides)}
                | ({"run": asdict(job.recipe)} if job.recipe else {})
                for job in self.jobs
            ],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(content, self.folder / SWEEP_FILE)

    def _free_name(self, overrides: tuple[str, ...], varied: Sequence[str], taken: set[str]) -> str:
        name = folder_name(overrides, varied)
        status = read_status(self.folder / name)
        foreign = bool(status) and set(status["overrides"]) != set(overrides)
        # Two values may become the same name in a path.
        return f"{name}_{overrides_digest(overrides)}" if foreign or name in taken else name
