"""How to run a job of a sweep, as ``sweep.json`` stores it for workers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mtp_lightning.cli import this_program
from mtp_lightning.paths import app
from sweeps.process import Task, python_command

TRAIN = "train"
_KINDS = {
    **dict.fromkeys(("program", "cwd"), str),
    **dict.fromkeys(("processes", "nodes", "max_steps"), int),
    **{"options": list, "on_cpu": bool},
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a job except its folder and its overrides.

    Attributes:
        program: ``train`` for this project's own, else the user's, as it was started.
        options: options of its command line before the job's overrides: config and Hydra settings.
        cwd: where relative paths of its overrides start.
        processes: processes that train together on each machine.
        nodes: machines that train together.
        max_steps: optimizer steps.
        on_cpu: whether it asks for the CPU even if there are GPUs.
    """

    program: str
    options: tuple[str, ...]
    cwd: str
    processes: int
    nodes: int
    max_steps: int
    on_cpu: bool

    def task(
        self,
        folder: Path,
        overrides: Sequence[str],
        *,
        labels: Sequence[str] = (),
        program: Sequence[str] | None = None,
    ) -> Task:
        """The job as a task.

        Args:
            folder: folder of the run, absolute.
            overrides: overrides of the job.
            labels: the overrides that distinguish it from the others.
            program: Python's arguments that start it; by default this project's train app.
        """
        arguments = [*self.options, *overrides]
        own = app(TRAIN)
        # ``cwd`` is where relative paths start, but Python must not look for modules there.
        own = ["-P", *own] if own[0] == "-m" else own
        return Task(
            folder=folder,
            overrides=tuple(overrides),
            command=python_command(program or own, arguments, folder),
            processes=self.processes,
            nodes=self.nodes,
            max_steps=self.max_steps,
            on_cpu=self.on_cpu,
            labels=tuple(labels),
            cwd=Path(self.cwd),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the file."""
        return {**asdict(self), "options": list(self.options)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError: if a value is missing.
            ValueError: if a value has another type.
        """
        values = {field.name: stored[field.name] for field in fields(cls)}
        for key, kind in _KINDS.items():
            if type(values[key]) is not kind:
                raise ValueError(f"{key}: {values[key]!r}")
        if not all(isinstance(option, str) for option in values["options"]):
            raise ValueError(f"options: {values['options']!r}")
        return cls(**{**values, "options": tuple(values["options"])})


def name_of_program() -> str:
    """This process's program, as a recipe names it."""
    program = this_program()
    own = program in (app(TRAIN), ["-m", "mtp_lightning.apps.train"])
    return TRAIN if own else shlex.join(program)
