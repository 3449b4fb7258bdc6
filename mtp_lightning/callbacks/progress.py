"""The progress bar: optimizer steps of the whole run, and the loss of every depth."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mtp_lightning.callbacks.base import RunCallback, run_callbacks
from mtp_lightning.command_line.shell import QUIET

_WIDE = 120  # columns of a terminal in which the bar has room for a schedule's name
_TIMED_FROM = 10  # steps of this process before the remaining time is estimated
# Short, so that all of it and some bar fit into 100 columns.
_TIMED = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
_UNTIMED = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def with_bar(batches: Iterable[Any], doing: str) -> Iterable[Any]:
    """The batches, counted by a bar on a terminal."""
    quiet = os.environ.get(QUIET) == "1" or None  # None hides the bar off a terminal
    return tqdm(batches, doing, leave=False, bar_format=_TIMED, disable=quiet)


@dataclass(eq=False)
class StepProgressBar(RunCallback, ProgressBar):
    """A bar of `max_steps` optimizer steps with every depth's loss, the lambdas and tokens per
    second.

    On a terminal it is one line that is rewritten; elsewhere (a file, a pipe) it prints plain
    lines. A resumed run starts at the step it resumes from. The losses are read from the device
    only when something is shown.

    It reads the training step's `losses` (tensor [D+1]), `computed` (D+1 bool) and `factors` (D
    numbers), the module's `schedule`, if it has one, and the other callbacks' `RunCallback.shown`.
    The remaining time is estimated from the 10th step on: the first ones are slower.
    """

    refresh_seconds: float = 0.5
    line_seconds: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ProgressBar.__init__(self)
        self._enabled = os.environ.get(QUIET) != "1"
        self._bar: tqdm | None = None
        self._text = ""

    def disable(self) -> None:
        """Shows nothing; Lightning calls this on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._enabled:
            tqdm.write(sep.join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar at the step that the run starts or resumes from."""
        self._shown_at = -math.inf
        # The step and time at which this process started to train.
        self._began = (trainer.global_step, time.monotonic())
        schedule = getattr(pl_module, "schedule", None)
        self._schedule = schedule.name if schedule is not None and schedule.moves else ""
        if not self._enabled or not sys.stderr.isatty():
            return
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="train",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format=_UNTIMED,
            mininterval=self.refresh_seconds,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if not self._enabled:
            return
        step, now = trainer.global_step, time.monotonic()
        last = step == trainer.max_steps
        if self._bar is not None:
            if last or now - self._shown_at >= self.refresh_seconds:
                self._text = self._describe(trainer, outputs)
                self._bar.set_postfix_str(self._text, refresh=False)
                if step - self._began[0] >= _TIMED_FROM:
                    self._bar.bar_format = _TIMED
                self._bar.update(step - self._bar.n)
                self._bar.refresh()
                self._shown_at = now
            return
        if last or now - self._shown_at >= self.line_seconds:
            text = f"step {step}/{trainer.max_steps}  {self._describe(trainer, outputs)}"
            self.print(f"{text}  {self._remaining_time(step, trainer.max_steps, now)}".rstrip())
            self._shown_at = now

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Shows the number of validation batches instead of the losses."""
        now = time.monotonic()
        if self._bar is None or now - self._shown_at < self.refresh_seconds:
            return
        self._bar.set_postfix_str(f"validating {batch_idx + 1}/{sum(trainer.num_val_batches):g}")
        self._shown_at = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the validation loss of every depth."""
        if not self._enabled or trainer.state.fn != "fit":
            return
        losses = {}
        for tag, value in trainer.callback_metrics.items():
            if match := re.fullmatch(r"val/loss_depth_(\d+)", tag):
                losses[int(match[1])] = float(value)
        text = "  ".join(f"L{k} {losses[k]:.3f}" for k in sorted(losses))
        self.print(f"step {trainer.global_step}  validation  {text}".rstrip())
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error message begins on its own line."""
        self._close(trainer)

    def _close(self, trainer: pl.Trainer) -> None:
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.close()
            self._bar = None

    def _remaining_time(self, step: int, max_steps: int, now: float) -> str:
        """The remaining time at the speed so far, validations included."""
        first, began = self._began
        if not first + _TIMED_FROM <= step < max_steps:
            return ""
        seconds = (now - began) / (step - first) * (max_steps - step)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def _describe(self, trainer: pl.Trainer, outputs: Any) -> str:
        losses = zip(outputs["losses"].tolist(), outputs["computed"], strict=True)
        parts = [f"L{k} {loss:.2f}" if on else f"L{k} -" for k, (loss, on) in enumerate(losses)]
        lambdas = ",".join(f"{float(value):.3g}" for value in outputs["factors"])
        if lambdas:
            # A bar is cut off at the terminal's edge.
            fits = self._bar is None or shutil.get_terminal_size().columns >= _WIDE
            name = f" ({self._schedule})" if self._schedule and fits else ""
            parts.append(f"lambda {lambdas}{name}")
        parts += [callback.shown() for callback in run_callbacks(trainer)]
        return "  ".join(filter(None, parts))
