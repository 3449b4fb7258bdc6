"""``hydra/launcher=local_pool``: jobs on this machine, as many at once as there are devices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mtp_lightning.errors import UserError, counted
from mtp_lightning.run.status import state_of, write_status
from sweeps.devices import DeviceQueue, Devices, choose_gpus
from sweeps.display import Display, make_display
from sweeps.interrupts import Interrupted, interrupts
from sweeps.machine import MemoryUse
from sweeps.process import Job, JobProcess, refuse_several_machines

_LOOK_SECONDS = 0.1
_MEASURE_SECONDS = 2.0

Ended = Callable[[Job], object]

LOST = "another worker has it"  # a watcher's reason: the job is no longer this pool's


def _ignore(job: Job) -> None:
    """Does nothing: the default watcher of running jobs, and of their ends."""


@dataclass(kw_only=True)
class Pool:
    """Runs jobs, each in its own process; no job affects another."""

    queue: DeviceQueue
    display: Display
    grace_seconds: float  # for jobs to save and end when asked to, before they are killed
    memory: MemoryUse | None = None  # bounds the jobs at once, but allows one; None for no bound
    _check: Callable[[], None] = field(init=False)  # raises if Ctrl-C or a similar signal has come
    _running: list[JobProcess] = field(default_factory=list, init=False)
    _last_measured: float = field(default=-math.inf, init=False)
    _memory_reported: bool = field(default=False, init=False)

    def run(
        self,
        jobs: Iterable[Job | None],
        *,
        watch: Callable[[Job], str | None] = _ignore,
        ended: Ended = _ignore,
    ) -> None:
        """Runs all jobs; their status files say how they ended.

        Args:
            jobs: taken one by one, each when there is room for it; None says that there is none
                now, but perhaps later.
            watch: called now and then for each running job; a text stops it, and is the reason.
                At ``LOST`` it is killed and its status left unchanged.
            ended: called for each job that has ended.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, after all jobs have ended.
        """
        waiting: Job | None = None
        source = iter(jobs)
        with self.display, interrupts() as self._check:
            try:
                while True:
                    self._check()
                    waiting = self._fill(source, waiting, ended)
                    if not self._running:
                        return
                    self.display.refresh()
                    time.sleep(_LOOK_SECONDS)
                    self._collect(ended)
                    self._measure()
                    for process in self._running:
                        reason = watch(process.job)
                        if reason is not None and process.stopping is None:
                            process.abandon() if reason is LOST else process.stop(reason)
            except BaseException as error:
                told = isinstance(error, (Interrupted, UserError))
                self._stop_all(str(error) if told else repr(error))
                raise

    def _fill(self, source: Iterator[Job | None], waiting: Job | None, ended: Ended) -> Job | None:
        """Starts jobs while there is room; returns the next job if it has to wait."""
        while True:
            if waiting is None and self.queue.has_room and self._has_memory(1):
                waiting = next(source, None)
            if waiting is None or not self._has_memory(waiting.processes):
                return waiting
            devices = self.queue.take(waiting.processes, on_cpu=waiting.on_cpu)
            if devices is None:
                # No job overtakes it: a job for two devices would wait forever.
                return waiting
            self._start(waiting, devices, ended)
            waiting = None

    def _start(self, job: Job, devices: Devices, ended: Ended) -> None:
        self.display.started(job, devices.name)
        try:
            process = JobProcess(job, devices, grace_seconds=self.grace_seconds, check=self._check)
            self._running.append(process)
            if self.memory is not None:
                self.memory.begin(process.group, job.processes)
        except OSError as error:  # the other jobs continue
            # A process of an earlier start may still finish it; otherwise the next start does.
            state = "interrupted" if isinstance(error, BlockingIOError) else "failed"
            with suppress(OSError):  # its folder cannot be written
                write_status(job.folder, job.overrides, state, reason=f"not started: {error}")
            self.display.say(f"{job.label} not started: {error}")
            self.queue.give_back(devices)
            self.display.ended(job)
            ended(job)

    def _collect(self, ended: Ended) -> None:
        for process in list(self._running):
            try:
                has_ended = process.ended()
            except OSError:  # it has ended, and its status cannot be written
                self._running.remove(process)
                raise
            if has_ended:
                self._running.remove(process)
                if self.memory is not None:
                    self.memory.end(process.group, succeeded=state_of(process.job.folder) == "done")
                self.queue.give_back(process.devices)
                (self.display.left if process.abandoned else self.display.ended)(process.job)
                ended(process.job)

    def _measure(self) -> None:
        if self.memory is not None and time.monotonic() - self._last_measured > _MEASURE_SECONDS:
            self._last_measured = time.monotonic()
            self.memory.look()

    def _has_memory(self, processes: int) -> bool:
        """Whether there is memory for a job of some processes; always if no other job runs."""
        if self.memory is None or not self._running:
            return True
        reason = self.memory.missing(processes)
        if reason is not None and not self._memory_reported:
            self._memory_reported = True
            self.display.say(
                f"To fit in memory, at most {counted(len(self._running), 'job')} at once: {reason}"
            )
        return reason is None

    def _stop_all(self, reason: str) -> None:
        """Lets every job save and end; kills them at a second Ctrl-C or when their time is up."""
        if not self._running:
            return
        self.display.say(f"stopping {counted(len(self._running), 'job')} (Ctrl-C again: at once)")
        for process in self._running:
            process.stop(reason)
        while self._running:
            try:
                with suppress(OSError):  # a status that cannot be written
                    self._collect(_ignore)
                time.sleep(_LOOK_SECONDS)
            except KeyboardInterrupt:
                for process in self._running:
                    process.kill()


def make_pool(
    jobs: Sequence[Job],
    *,
    devices: str | Sequence[int | str] = "auto",
    n_jobs: int | None = None,
    threads_per_process: int | str | None = None,
    grace_seconds: float = 60.0,
) -> Pool:
    """A pool over this machine's devices, shown on the terminal. The settings are those of
    conf/hydra/launcher/local_pool.yaml.

    Args:
        jobs: the jobs that it must be able to run; if all ask for the CPU, no GPU is used.

    Raises:
        UserError: for a job that can never get its devices.
    """
    gpus = choose_gpus("cpu" if all(job.on_cpu for job in jobs) else devices)
    queue = DeviceQueue(gpus=gpus, n_jobs=n_jobs, threads=threads_per_process)
    for job in jobs:
        refuse_several_machines(job)
        queue.check(0 if job.on_cpu else job.processes)
    memory = MemoryUse() if n_jobs is None else None
    display = make_display(len(jobs))
    return Pool(queue=queue, display=display, grace_seconds=grace_seconds, memory=memory)


def run(jobs: Sequence[Job], **settings: Any) -> None:
    """Runs jobs; settings and errors as in :func:`make_pool` and :meth:`Pool.run`."""
    make_pool(jobs, **settings).run(jobs)
