"""Ends a run once its task is solved."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from mtp_lightning.callbacks.base import RunCallback, run_callbacks
from mtp_lightning.callbacks.exact_match import ExactMatch
from mtp_lightning.errors import UserError
from mtp_lightning.run.solved import EXACT, is_above

log = logging.getLogger(__name__)


@dataclass(eq=False)
class StopWhenSolved(RunCallback):
    """Stops training when ``val/exact_match`` is above a level at several validations in a row.

    ``summary.json`` gets ``solved`` and ``solved_at``: the step, and the tokens, FLOPs and seconds
    of training, before the last of these validations; null if the task was not solved. A run that
    was stopped this way is finished, and does not train when it is started again, unless ``level``
    or ``validations`` has changed: then it counts again.

    Raises:
        UserError: for data without answers, or no callback that checks them.
    """

    level: float = 0.98
    validations: int = 2
    _in_a_row: int = field(default=0, init=False)
    _counted_step: int | None = field(default=None, init=False)
    _solved_at: dict[str, float] | None = field(default=None, init=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a run that can never be solved."""
        if not trainer.datamodule.answer_sets:  # type: ignore[attr-defined]
            raise UserError(
                "callbacks=stop_when_solved needs a task (data=star_graph, copy, ..), and this "
                "run's data has no answers to check: leave it out."
            )
        judges = [c for c in run_callbacks(trainer) if isinstance(c, ExactMatch)]
        if not judges:
            raise UserError(
                "callbacks=stop_when_solved reads val/exact_match, which no callback logs here: "
                "add exact_match to callbacks=[..], or remove ~callbacks.exact_match."
            )
        self._judge = judges[0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops a run that is already solved."""
        trainer.should_stop = trainer.should_stop or self._solved_at is not None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts, and stops the run; this comes before the checkpoint, which stores the count."""
        # A finished run that is started again repeats the validation of its last step.
        step = trainer.global_step
        if self._solved_at is not None or step == self._counted_step:
            return
        # Rank 0 decides for all processes.
        exact_match = trainer.strategy.broadcast(self._judge.newest[EXACT])
        self._counted_step = step
        self._in_a_row = self._in_a_row + 1 if is_above(exact_match, self.level) else 0
        if self._in_a_row < self.validations:
            return
        cost = {name: getattr(pl_module, name) for name in ("tokens", "flops", "seconds")}
        self._solved_at = {"step": step, **cost}
        trainer.should_stop = True
        log.info(
            "Solved at step %d: exact match above %g at %d validations in a row.",
            step,
            self.level,
            self.validations,
        )

    def summary(self) -> dict[str, Any]:
        return {"solved": self._solved_at is not None, "solved_at": self._solved_at}

    def state_dict(self) -> dict[str, Any]:
        """The count and its settings, so that a resumed run stops where the whole run does."""
        return {
            **self._meaning,
            "in_a_row": self._in_a_row,
            "counted_step": self._counted_step,
            "solved_at": self._solved_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if all(state_dict[key] == value for key, value in self._meaning.items()):
            self._in_a_row = state_dict["in_a_row"]
            self._counted_step = state_dict["counted_step"]
            self._solved_at = state_dict["solved_at"]

    @property
    def _meaning(self) -> dict[str, float]:
        return {"level": self.level, "validations": self.validations}
