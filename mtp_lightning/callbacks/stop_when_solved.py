"""Ends a run whose task is solved."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl

from mtp_lightning.callbacks.base import RunCallback, run_callbacks
from mtp_lightning.callbacks.exact_match import ExactMatch
from mtp_lightning.errors import UserError
from mtp_lightning.run.solved import EXACT
from mtp_lightning.settings import require_number, require_whole

log = logging.getLogger(__name__)


class StopWhenSolved(RunCallback):
    """Stops training when ``val/exact_match`` is above a level at some validations in a row.

    ``summary.json`` gets ``solved`` and ``solved_at``: the step, and the tokens, FLOPs and seconds
    of training, before the last one of these validations; null if it did not come to that. A run
    that has been stopped so is finished, and trains no more when it is started again, unless
    ``level`` or ``validations`` have been changed: then it counts anew.

    Args:
        level: of exact match, >= 0, < 1.
        validations: in a row, >= 1.

    Raises:
        UserError: a setting out of range, data without answers, or nobody who judges them.
    """

    def __init__(self, level: float = 0.98, validations: int = 2) -> None:
        group = "callbacks.stop_when_solved"
        self.level = require_number(f"{group}.level", level, least=0, below=1)
        self.validations = require_whole(f"{group}.validations", validations, least=1)
        self._in_a_row = 0
        self._counted_step: int | None = None
        self._solved_at: dict[str, float] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can never be solved."""
        if not trainer.datamodule.answer_sets():  # type: ignore[attr-defined]
            raise UserError(
                "callbacks=stop_when_solved needs a task (data=star_graph, copy, ..), and this "
                "run's data has no answers that could be right: leave it out."
            )
        judges = [c for c in run_callbacks(trainer) if isinstance(c, ExactMatch)]
        if not judges:
            raise UserError(
                "callbacks=stop_when_solved reads val/exact_match, which nobody measures here: add "
                "exact_match to callbacks=[..], or leave ~callbacks.exact_match out."
            )
        self._judge = judges[0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was stopped by this trains no more."""
        trainer.should_stop = trainer.should_stop or self._solved_at is not None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count, and stop; before the checkpoint is written, which holds the count."""
        # A finished run that is started again validates its last step once more.
        step = trainer.global_step
        if trainer.sanity_checking or self._solved_at is not None or step == self._counted_step:
            return
        # One opinion for all processes. What Lightning has logged is rounded to single precision,
        # by which 0.98 is above 0.98.
        right = trainer.strategy.broadcast(self._judge.summary()[EXACT])
        self._counted_step = step
        self._in_a_row = self._in_a_row + 1 if right > self.level else 0
        if self._in_a_row < self.validations:
            return
        spent = {name: getattr(pl_module, name) for name in ("tokens", "flops", "seconds")}
        self._solved_at = {"step": step, **spent}
        trainer.should_stop = True
        log.info(
            "Solved at step %d: exact match above %g at %d validations in a row.",
            step,
            self.level,
            self.validations,
        )

    def summary(self) -> dict[str, Any]:
        """Whether it was solved, and what that took."""
        return {"solved": self._solved_at is not None, "solved_at": self._solved_at}

    def state_dict(self) -> dict[str, Any]:
        """The count and what it means, so that a resumed run stops where the whole one does."""
        return {
            **self._meaning,
            "in_a_row": self._in_a_row,
            "counted_step": self._counted_step,
            "solved_at": self._solved_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        if all(state_dict[key] == value for key, value in self._meaning.items()):
            self._in_a_row = state_dict["in_a_row"]
            self._counted_step = state_dict["counted_step"]
            self._solved_at = state_dict["solved_at"]

    @property
    def _meaning(self) -> dict[str, float]:
        return {"level": self.level, "validations": self.validations}
