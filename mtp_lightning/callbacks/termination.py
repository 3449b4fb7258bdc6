"""Ends all processes of a run before the same step when one of them gets SIGTERM, SIGHUP (a closed
terminal) or Slurm's warning."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Termination(_SignalConnector):
    """Lightning's handler of SIGTERM, without its broadcast.

    A handler runs wherever the signal finds the process. During a backward pass, Lightning's
    handler waits for the other processes, which wait for this one's gradients, so all hang forever
    (Lightning issue 20806). This handler sets a flag and passes the signal on to the processes that
    this one has started, and :meth:`agreed` compares the flags after every step.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.noted = False
        # Whether a callback checks after every step, saves, and ends the run.
        self.saves = False
        self._group: Any = None

    def register_signal_handlers(self) -> None:
        super().register_signal_handlers()
        # Slurm's warning before its time limit (#SBATCH --signal=USR1@120) ends a run as SIGTERM
        # does.
        if "SLURM_JOB_ID" in os.environ and not self._has_already_handler(signal.SIGUSR1):
            self._register_signal(signal.SIGUSR1, self._sigterm_notifier_fn)
        # nohup ignores SIGHUP, which counts as a handler.
        if not self._has_already_handler(signal.SIGHUP):
            self._register_signal(signal.SIGHUP, self._sigterm_notifier_fn)

    def _sigterm_notifier_fn(self, signum: Any, _: FrameType) -> None:
        launcher = self.trainer.strategy.launcher
        if launcher is not None and not self.noted:
            launcher.kill(signum)
        self.noted = True
        if self.trainer.world_size == 1 and not self.saves:
            self.received_sigterm = True

    def agreed(self) -> bool:
        """Whether any process was asked to end; all processes call this at the same point.

        The flags are compared on the CPU, so that no device is waited for.
        """
        if self.trainer.world_size == 1:
            return self.noted
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        flag = torch.tensor(int(self.noted))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def end(self) -> None:
        """Let Lightning end the run at its next check."""
        self.received_sigterm = True

    def before_step(self) -> None:
        """Replaces Lightning's broadcast before every step, which waits for the device."""
        if not self.saves and self.agreed():
            self.end()
            raise SIGTERMException


def termination_of(trainer: pl.Trainer) -> Termination:
    """The handling that :func:`stop_together` gave a trainer."""
    connector = trainer._signal_connector
    assert isinstance(connector, Termination)
    return connector


def stop_together(trainer: pl.Trainer) -> None:
    """Replaces a trainer's handling of SIGTERM by :class:`Termination`."""
    connector = trainer._signal_connector = Termination(trainer)
    loop = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = connector.before_step  # type: ignore[method-assign]
