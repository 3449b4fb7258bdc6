"""Checkpoints of a run: `last.ckpt` every N optimizer steps, `best.ckpt`, and `previous.ckpt` as a
reserve."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mtp_lightning.callbacks.base import RunCallback, WritesBeside, monitored, run_callbacks
from mtp_lightning.callbacks.termination import termination_of
from mtp_lightning.run import checkpoints
from mtp_lightning.run.checkpoints import intact, link_or_copy, load, save, stored_step
from mtp_lightning.run.layout import BEST, CHECKPOINTS, LAST, PREVIOUS, kept_at
from mtp_lightning.settings import require_whole

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves and loads through `mtp_lightning.run.checkpoints`: atomically, plain values only, and
    checked for damage. Lightning's further options change nothing."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        checkpoints.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return checkpoints.load(path)


@dataclass(eq=False)
class Checkpoints(RunCallback, Checkpoint):
    """Writes the run's checkpoints so that a resumed run continues exactly.

    * `last.ckpt`: every `every_n_steps` optimizer steps, at the last step, and when the run is
      asked to stop (first Ctrl-C, SIGTERM). One batch is one optimizer step. If a validation is due
      after the step, the file is written after it: a run resumed from an earlier file would never
      do that validation.
    * `best.ckpt`: when `monitor` is as good as ever or better: the main prediction of a frozen
      trunk is equally good at every step, while its heads learn. It is a hard link to the
      `last.ckpt` of that moment (a copy if the file system has no links), so nothing is written
      twice.
    * `previous.ckpt`: the `last.ckpt` before the newest, also a link, so that an intact file
      remains if the newest is damaged.
    * `step_N.ckpt`: for every N of `keep_steps`, a link to the `last.ckpt` of that step, from which
      other runs can branch (`branch_from=RUN@N`).

    An exception in the middle of a step leaves the model between two states, so nothing is saved
    then, and the newest file stays. With several processes, Ctrl-C ends each one immediately, and
    SIGTERM to any of them ends all of them after the same step (``termination.py``).

    A large checkpoint of a sharded model may be written while training continues: it gets its name
    some steps later, and before the next save begins.

    Raises:
        UserError: if no validation logged `monitor`.
    """

    folder: Path = Path(CHECKPOINTS)  # a relative path begins at the run's folder
    every_n_steps: int = 200
    monitor: str | None = "val/loss_depth_0"
    mode: str = "min"
    keep: str = "all"
    keep_steps: Collection[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        key, steps = "callbacks.checkpoints.keep_steps", self.keep_steps
        self.keep_steps = frozenset(require_whole(key, step, least=1) for step in steps)
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._old_handler: Any = None

    @property
    def last_path(self) -> Path:
        """The newest checkpoint, which may not exist yet."""
        return self.folder / LAST

    @property
    def best_path(self) -> Path:
        """The best checkpoint, which may not exist yet."""
        return self.folder / BEST

    @property
    def _best_by(self) -> str:
        # A new string at each call: pickle writes an object that it has already written as a
        # reference, so a stored string would make a checkpoint's bytes depend on whether the run
        # was resumed.
        return f"{self.mode} {self.monitor}"

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, so that a resumed run does not overwrite a better file."""
        score, step = self.best_score, self.best_step
        return {"best_score": score, "best_step": step, "best_by": self._best_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score, unless the run now monitors something else."""
        if state_dict.get("best_by", self._best_by) == self._best_by:
            self.best_score = state_dict["best_score"]
            self.best_step = state_dict["best_step"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Here, since Lightning does not start the training of a run that has finished before.
        self.folder = Path(trainer.default_root_dir).absolute() / self.folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over Ctrl-C: the first one stops with a checkpoint after the step, the second one
        stops at once."""
        step = trainer.global_step
        self._last_is_good = self._interrupted = self._terminated = False
        self._saved_step = step or None
        # Further names that the newest save gets once it has its own. A run that was killed right
        # after a save has not given them.
        self._links = self._kept_names(step) | ({BEST} if self.best_step == step else set())
        if self._links:
            is_newest = trainer.is_global_zero and stored_step(self.last_path) == step
            if not trainer.strategy.broadcast(is_newest):
                self._links = set()
        outside = (n for n in sorted(self.keep_steps) if not step < n <= trainer.max_steps)
        names = self._links | {path.name for path in self.folder.glob(kept_at("*"))}
        if missed := [str(n) for n in outside if kept_at(n) not in names]:
            log.warning(
                "callbacks.checkpoints.keep_steps: no checkpoint is kept of %s, since this run has "
                "done %d of its %d steps.",
                *(", ".join(missed), step, trainer.max_steps),
            )
        if BEST not in self._links and not trainer.strategy.broadcast(self.best_path.exists()):
            # The best file is in the folder of the run that this one branched from.
            self.best_score = self.best_step = None
        if isinstance(trainer.strategy, WritesBeside):
            trainer.strategy.writes_beside = True
        termination_of(trainer).saves = True
        # Only if nobody else has a handler, and only in the main thread, where Python allows it.
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        is_main = threading.current_thread() is threading.main_thread()
        if trainer.world_size == 1 and is_default and is_main:
            self._old_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Stops here on Ctrl-C: the previous step is saved, validated and logged, and the next one
        has not begun.

        A Ctrl-C that came after the previous step was due to be saved waits for one more step.
        Saved here, that step would be stored with this step's batch as consumed.
        """
        if self._interrupted and self._saved_step == trainer.global_step:
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Saves, unless a validation follows: then `on_validation_end` saves."""
        self._add_links(trainer, wait=False)
        self._check_sigterm(trainer)
        if self._due(trainer) and not self._validation_follows(trainer):
            self._save(trainer)
            self._end_if_terminated(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves when due or when the monitored value is the best so far."""
        if trainer.state.fn == "validate":
            self._mark_last_as_best(trainer)
        if trainer.state.fn != "fit":
            return
        self._check_sigterm(trainer)  # it may have come during the validation
        improved = self._update_best(trainer)
        if improved or self._due(trainer):
            self._save(trainer)
        if improved:
            self._links.add(BEST)
            self._add_links(trainer, wait=False)
        self._end_if_terminated(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves a run that ended before its last step (a time limit, an early stop)."""
        if trainer.global_step > 0:
            self._save(trainer)
        self._add_links(trainer, wait=True)
        self._restore_handler()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restores the handler of Ctrl-C. Nothing is saved: see the class."""
        self._restore_handler()

    def on_run_end(self) -> None:
        checkpoints.keep(self.folder, self.keep)

    def _check_sigterm(self, trainer: pl.Trainer) -> None:
        """Notes whether any process was asked to end. All processes call this at the same points,
        or they would stop at different steps. A validation is finished first: Lightning would skip
        it, and the resumed run would miss it."""
        self._terminated |= termination_of(trainer).agreed()

    def _end_if_terminated(self, trainer: pl.Trainer) -> None:
        if self._terminated:
            self._add_links(trainer, wait=True)
            termination_of(trainer).end()

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return (
            step >= trainer.max_steps
            or _stops(trainer)
            or self._interrupted
            or self._terminated
            or step % self.every_n_steps == 0
            or step in self.keep_steps
        )

    def _validation_follows(self, trainer: pl.Trainer) -> bool:
        if not trainer.enable_validation:
            return False
        if _stops(trainer):  # Lightning validates again before it stops
            return True
        interval = trainer.val_check_batch
        return interval is not None and trainer.global_step % interval == 0

    def _update_best(self, trainer: pl.Trainer) -> bool:
        if self.monitor is None:
            return False
        # Rank 0 decides for all processes: in a save of its own, a process would wait forever.
        score = monitored(trainer, "callbacks.checkpoints", self.monitor)
        if not math.isfinite(score):
            return False
        sign = 1.0 if self.mode == "min" else -1.0
        if self.best_score is not None and sign * score > sign * self.best_score:
            return False
        # Set before the save, which stores them.
        self.best_score, self.best_step = score, trainer.global_step
        return True

    def _mark_last_as_best(self, trainer: pl.Trainer) -> None:
        """Handles the validation after training, if the last step had none of its own: `last.ckpt`,
        which is the validated model, may be the best."""
        step = trainer.global_step
        # A value of training is not one of this validation.
        validates = self.monitor is not None and not self.monitor.startswith("train/")
        is_new = self.best_step != step
        may_be_best = validates and is_new and stored_step(self.last_path) == step
        # All processes do the same, also where one sees an older file.
        if not trainer.strategy.broadcast(may_be_best) or not self._update_best(trainer):
            return
        if trainer.is_global_zero:
            content = load(self.last_path, mapped=True)
            content["callbacks"][self.state_key] = self.state_dict()
            save(content, self.last_path)
            link_or_copy(self.last_path, self.best_path)

    def _save(self, trainer: pl.Trainer) -> None:
        if self._saved_step == trainer.global_step:
            return
        self._add_links(trainer, wait=True)
        with ExitStack() as stack:
            for callback in run_callbacks(trainer):
                stack.enter_context(callback.paused())
            # A damaged last.ckpt of an earlier process must not replace an intact previous.ckpt.
            if trainer.is_global_zero and (self._last_is_good or intact(self.last_path)):
                link_or_copy(self.last_path, self.folder / PREVIOUS)
            trainer.save_checkpoint(self.last_path, weights_only=False)
        self._last_is_good = True
        self._saved_step = trainer.global_step
        self._links = self._kept_names(trainer.global_step)
        self._add_links(trainer, wait=False)

    def _add_links(self, trainer: pl.Trainer, *, wait: bool) -> None:
        """Gives the newest save its other names once it has its own. All processes call this at the
        same point."""
        strategy = trainer.strategy
        if isinstance(strategy, WritesBeside) and not strategy.settled(wait=wait):
            return
        for name in self._links if trainer.is_global_zero else ():
            link_or_copy(self.last_path, self.folder / name)
        self._links = set()

    def _kept_names(self, step: int) -> set[str]:
        return {kept_at(step)} if step in self.keep_steps else set()

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _restore_handler(self) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None


def _stops(trainer: pl.Trainer) -> bool:
    """Whether training ends after this step, which ``trainer.min_steps`` can delay."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early
