"""``hydra/launcher=slurm``: the jobs of a sweep in a Slurm queue, by submitit.

Each is one Slurm task that starts the run as a process of its own, as the local pool does:
Lightning sees no Slurm, and starts the processes of data-parallel training itself. When Slurm is
about to end a job (its time, a preemption), it sends SIGUSR2 first: the run saves, the job is
queued again, and the run continues from its checkpoint.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mtp_lightning.paths import ROOT
from sweeps.devices import Devices
from sweeps.follow import follow
from sweeps.process import JobProcess, Task

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


class SlurmRun:
    """What a Slurm job does; submitit stores it in a file, and again when it is requeued.

    Args:
        task: the run.
        threads: of each of its processes.
    """

    def __init__(self, task: Task, threads: int) -> None:
        self.task = task
        self.threads = threads

    def __call__(self) -> None:
        number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "?"))
        index = os.environ.get("SLURM_ARRAY_TASK_ID")
        name = f"slurm:{number}" if index is None else f"slurm:{number}_{index}"
        devices = Devices(gpus=None, threads=self.threads, name=name)
        # Slurm sends its signals to all processes of a job.
        self._process = JobProcess(self.task, devices, deaf_to=(signal.SIGUSR2,))
        while not self._process.ended():
            time.sleep(0.2)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit at SIGUSR2: let the run save and end, and ask for another go."""
        from submitit.helpers import DelayedSubmission

        self._process.stop("Slurm ends the job; it is queued again")
        while not self._process.ended():
            time.sleep(0.1)
        return DelayedSubmission(SlurmRun(self.task, self.threads))


def run(
    tasks: list[Task],
    *,
    partition: str | None,
    account: str | None,
    timeout_min: int,
    cpus_per_process: int,
    gpus_per_process: int,
    mem_gb: float | None,
    n_jobs: int,
    signal_delay_s: int,
    max_requeues: int,
    additional: dict[str, Any] | None,
) -> None:
    """Queue tasks and wait for them; see conf/hydra/launcher/slurm.yaml for the settings.

    Raises:
        ValueError: submitit or Slurm is not there, or Slurm refuses the settings.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs were cancelled.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ValueError("hydra/launcher=slurm needs submitit: pip install -e '.[slurm]'") from None

    folder = tasks[0].folder.parent / ".slurm"
    ids: dict[Task, str] = {}
    # One array a number of processes: what a job asks for is the array's.
    by_processes = sorted(tasks, key=lambda task: (task.processes, task.on_cpu))
    for (n, on_cpu), group in itertools.groupby(by_processes, lambda t: (t.processes, t.on_cpu)):
        try:
            executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=max_requeues)
        except RuntimeError as error:
            raise ValueError(f"hydra/launcher=slurm: {error}.") from error
        settings: dict[str, Any] = {
            "job_name": tasks[0].folder.parent.name,
            "partition": partition,
            "account": account,
            "time": timeout_min,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": cpus_per_process * n,
            "gpus_per_node": 0 if on_cpu else gpus_per_process * n,
            "mem": None if mem_gb is None else f"{round(mem_gb * 1024)}M",
            "array_parallelism": n_jobs,
            "signal_delay_s": signal_delay_s,
            "stderr_to_stdout": True,
            "additional_parameters": dict(additional or {}),
            "setup": [f"export PYTHONPATH={ROOT}:$PYTHONPATH"],
        }
        executor.update_parameters(**{k: v for k, v in settings.items() if v not in (None, 0)})
        same = list(group)
        try:
            with executor.batch():
                jobs = [executor.submit(SlurmRun(task, cpus_per_process)) for task in same]
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"Slurm refuses the job: {error}.") from error
        ids |= {task: job.job_id for task, job in zip(same, jobs, strict=True)}

    queue = _Queue(ids)
    # Slurm kills what has not ended 30 s after it was cancelled, by default.
    follow(tasks, over=queue.over, cancel=queue.cancel, grace_seconds=60.0)


class _Queue:
    """What ``squeue`` says; accounting (``sacct``) is not there on every cluster."""

    def __init__(self, ids: dict[Task, str]) -> None:
        self._ids = ids
        self._missed: dict[Task, int] = dict.fromkeys(ids, 0)

    def over(self) -> dict[Task, str]:
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            queued = set(done.stdout.split())
            for task, number in self._ids.items():
                self._missed[task] = 0 if number in queued else self._missed[task] + 1
        # Seen missing twice: a job that is just being requeued or submitted is not over.
        return {
            task: f"Slurm ended job {self._ids[task]} (its output: {task.folder.parent}/.slurm)"
            for task, missed in self._missed.items()
            if missed >= 2
        }

    def cancel(self, tasks: Iterable[Task]) -> None:
        subprocess.run(["scancel", *(self._ids[task] for task in tasks)], check=False)
