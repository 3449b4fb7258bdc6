"""A worker: runs the jobs of a planned sweep one after another, until all have ended.

    python train.py -m +sweeps=depth sweep_dir=runs/depth hydra/launcher=plan
    python -m sweeps.work runs/depth        # once per machine, on any number of them

Workers know of each other only through the folder (``lease.py``). If a worker dies, others take
over its jobs after two minutes, and continue from their checkpoints.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.errors import UserError, counted
from mtp_lightning.paths import app
from mtp_lightning.run.lock import Lock
from mtp_lightning.run.status import describe_failure, state_of
from sweeps.devices import DeviceQueue, choose_gpus, typed_devices
from sweeps.display import Display
from sweeps.interrupts import continued_by, interrupts
from sweeps.lease import STALE_SECONDS, Leases, this_process
from sweeps.machine import MemoryUse
from sweeps.plan import TRAIN, PlannedJob, SweepPlan, must_run, varied_labels
from sweeps.pool import LOST, Pool
from sweeps.process import Job
from sweeps.trust import require_harmless


class SweepWorker:
    """The jobs that this worker can get.

    Args:
        program: command that starts a user's own program; empty for this project's train app.
        allow: what the plan may name besides this project's own code (``trust.py``).

    Raises:
        UserError: if the folder has no plan, or one whose jobs cannot be run from it.
    """

    def __init__(
        self,
        plan: SweepPlan,
        *,
        leases: Leases,
        queue: DeviceQueue,
        program: Sequence[str] = (),
        allow: Collection[str] = (),
    ) -> None:
        self.leases = leases
        labels = varied_labels(plan.jobs)
        self.jobs = {
            planned.folder: _job(plan.folder, planned, labels[planned.folder], program, allow)
            for planned in plan.jobs
        }
        if program and all(job.recipe and job.recipe.program == TRAIN for job in plan.jobs):
            raise UserError(
                f"The jobs in {plan.folder} run this project's {TRAIN}.py: leave --program out."
            )
        self.too_large = {name: job for name, job in self.jobs.items() if not _fits(job, queue)}
        self._unfinished = [name for name in self.jobs if name not in self.too_large]

    def __iter__(self) -> Iterator[Job | None]:
        """Jobs that this worker has taken; None while it can take none."""
        while True:
            next_look = time.monotonic() + self.leases.beat_seconds
            newest, own_jobs = self.leases.look(), set(self.leases.held)
            for name in self._unfinished:
                lease = newest.get(name)
                if name in own_jobs or not self.leases.free(lease):
                    continue
                # A job that was free may be taken by now: only ``take`` decides.
                job = self.jobs[name]
                if must_run(job.folder) and self.leases.take(name, lease):
                    # Checked again: its previous worker may have ended it just before.
                    if must_run(job.folder):
                        yield job
                    else:
                        self.leases.release(name)
            yield None
            while time.monotonic() < next_look:
                yield None

    def drop_ended(self) -> int:
        """Forgets the jobs that have ended, whoever ran them; returns how many are left."""
        self._unfinished = [n for n in self._unfinished if must_run(self.jobs[n].folder)]
        return len(self._unfinished)

    def watch(self, job: Job) -> str | None:
        """Whether a job has to be stopped because another worker has it."""
        return None if job.name in self.leases.held else LOST

    def ended(self, job: Job) -> None:
        self.leases.release(job.name)


def work(worker: SweepWorker, pool: Pool, *, wait: bool = True) -> None:
    """Runs the jobs of a worker until every job of the sweep has ended; without ``wait``, until no
    job is free.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; this worker's jobs have ended.
    """
    finished, beat_seconds = threading.Event(), worker.leases.beat_seconds

    def beat() -> None:
        while not finished.wait(beat_seconds):
            worker.leases.beat()  # shows the others that this worker lives

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        while worker.drop_ended():
            pool.run(worker, watch=worker.watch, ended=worker.ended)
            if not wait:
                return
            with interrupts() as check:
                deadline = time.monotonic() + beat_seconds
                while time.monotonic() < deadline:
                    check()
                    time.sleep(0.1)
    finally:
        finished.set()
        thread.join()


def _job(
    sweep: Path,
    planned: PlannedJob,
    labels: Sequence[str],
    program: Sequence[str],
    allow: Collection[str],
) -> Job:
    """A planned job, checked, as this worker runs it."""
    recipe = planned.recipe
    if recipe is None:
        raise UserError(
            f"{sweep}/sweep.json does not say how to run {planned.folder}: start the sweep's own "
            "command on it, with hydra/launcher=plan."
        )
    if recipe.program != TRAIN and not program:
        raise UserError(
            f"The jobs in {sweep} run another program: start this with "
            f"--program {shlex.quote(recipe.program)}."
        )
    if not Path(recipe.cwd).is_dir():
        raise UserError(
            f"The sweep was planned in {recipe.cwd}, where the relative paths of its jobs start, "
            "but this machine has no such folder."
        )
    require_harmless(sweep, planned, recipe, allow=allow)
    if recipe.program == TRAIN:
        program = app(TRAIN)
        # ``cwd`` is where relative paths start, but Python must not look for modules there.
        program = ["-P", *program] if program[0] == "-m" else program
    return recipe.job(sweep / planned.folder, planned.overrides, labels=labels, program=program)


def _fits(job: Job, queue: DeviceQueue) -> bool:
    """Whether this machine can run it at all; otherwise it is left to a larger machine."""
    return job.nodes == 1 and (not queue.gpus or job.on_cpu or job.processes <= len(queue.gpus))


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m sweeps.work") -> None:
    args = _parser(program).parse_args(arguments)
    with readable_errors():
        if not 0 < args.stale < math.inf:
            raise UserError(f"--stale must be above 0 seconds, not {args.stale}.")
        if not 0 <= args.grace_seconds < math.inf:
            raise UserError(f"--grace-seconds must be at least 0, not {args.grace_seconds}.")
        folder = Path(args.folder).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}: give that of a planned sweep.")
        lock = Lock(folder / ".lock")
        if not lock.wait(seconds=60):  # the sweep is being planned
            raise BlockingIOError(f"A sweep is at work in {folder}: wait for it, or stop it.")
        lock.release()
        plan = SweepPlan(folder)
        if not plan.jobs:
            raise UserError(f"{folder} holds no planned sweep: add hydra/launcher=plan to its -m.")
        on_cpu = all(job.recipe.on_cpu for job in plan.jobs if job.recipe)
        queue = DeviceQueue(
            gpus=choose_gpus("cpu" if on_cpu else args.devices),
            n_jobs=args.n_jobs,
            threads=int(args.threads) if str(args.threads).isdecimal() else args.threads,
            host=os.uname().nodename,
        )
        leases = Leases(folder, owner=this_process(), stale_seconds=args.stale)
        try:
            command = shlex.split(args.program)
        except ValueError as error:
            raise UserError(f"--program {args.program}: {error}.") from error
        worker = SweepWorker(plan, leases=leases, queue=queue, program=command, allow=args.allow)
        for name, job in worker.too_large.items():
            print(
                f"{name} needs {job.processes} GPUs, more than this worker has: start a worker on "
                "a larger machine",
                flush=True,
            )
        left = worker.drop_ended
        display = Display(left(), estimates=False, count_left=left)
        memory = MemoryUse() if args.n_jobs is None else None
        pool = Pool(queue=queue, display=display, grace_seconds=args.grace_seconds, memory=memory)
        try:
            with continued_by("Unfinished jobs are free for other workers."):
                work(worker, pool, wait=not args.no_wait)
        finally:
            leases.release_all()
        _say_end(worker)


def _say_end(worker: SweepWorker) -> None:
    """Prints the states of all jobs, whoever ran them. Failed jobs do not fail the worker, since
    its launcher might then start it again."""
    states = [state_of(job.folder) for job in worker.jobs.values()]
    print(f"{states.count('done')} of {counted(len(states), 'job')} done", flush=True)
    for job in worker.jobs.values():
        if state_of(job.folder) == "failed":
            print(describe_failure(job.folder), flush=True)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser.of(__doc__, module="sweeps.work", program=program)
    parser.add_argument("folder", help="folder of a sweep that was planned or started")
    gpus = "auto, cpu or GPUs: 0,1"
    parser.add_argument("--devices", type=typed_devices, default="auto", help=gpus)
    parser.add_argument("--n-jobs", type=int, help="most jobs at once, as hydra.launcher.n_jobs")
    parser.add_argument(
        "--threads", help="threads of each process: a number, or auto (threads_per_process)"
    )
    parser.add_argument(
        "--stale",
        type=float,
        default=STALE_SECONDS,
        help="seconds without a sign of life after which a job is taken over (default 120); the "
        "same for all workers",
    )
    parser.add_argument(
        "--grace-seconds", type=float, default=60.0, help="seconds for jobs to save (default 60)"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="end when no job is free, though others run some"
    )
    parser.add_argument("--program", default="", help="command of a training script of your own")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        help="what the plan may name besides this project's own: a package, a folder of configs "
        "(--config-dir), a URL, or huggingface, wandb, mlflow, trackio; may be repeated",
    )
    return parser


if __name__ == "__main__":
    main()
