"""How a job of a sweep is run, as ``sweep.json`` keeps it for whoever runs it."""

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
    """All of a job but its folder and what it computes.

    Attributes:
        program: ``train`` for this project's own, else the user's, as it was started.
        options: of its command line before the job's overrides: config and Hydra settings.
        cwd: where relative paths of its overrides start.
        processes: that train together on each machine.
        nodes: machines that train together.
        max_steps: optimizer steps.
        on_cpu: whether it asks for the CPU, whatever else there is.
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
            folder: of the run, absolute.
            overrides: of the job.
            labels: those that tell it from the others.
            program: what Python is given to start it; by default this project's train app.
        """
        arguments = [*self.options, *overrides]
        own = app(TRAIN)
        # A plan says where relative paths start, which is not where Python finds modules.
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
        """From that.

        Raises:
            KeyError: one of its values is not there.
            ValueError: one is of another kind.
        """
        values = {field.name: stored[field.name] for field in fields(cls)}
        for key, kind in _KINDS.items():
            if type(values[key]) is not kind:
                raise ValueError(f"{key}: {values[key]!r}")
        if not all(isinstance(option, str) for option in values["options"]):
            raise ValueError(f"options: {values['options']!r}")
        return cls(**{**values, "options": tuple(values["options"])})


def name_of_program() -> str:
    """What this process runs, as a recipe names it."""
    program = this_program()
    own = program in (app(TRAIN), ["-m", "mtp_lightning.apps.train"])
    return TRAIN if own else shlex.join(program)
