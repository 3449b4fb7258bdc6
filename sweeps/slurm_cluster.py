"""``hydra/launcher=slurm``: the jobs of a sweep in a Slurm queue, through submitit.

Each job is one Slurm task that starts the run in its own process, as the local pool does: Lightning
does not see Slurm, and starts the processes of data-parallel training itself. A run on several
machines is one Slurm task on each, which starts torchrun. Before Slurm ends a job (its time is up,
or it is preempted), it sends SIGUSR2: the run saves, the job is queued again, and the run continues
from its checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT
from sweeps import grouped
from sweeps.devices import Devices
from sweeps.follow import follow
from sweeps.process import Job, JobProcess, ignore_signal

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


_QUERY_SECONDS = 15.0  # the queue is shared


@dataclass
class SlurmRun:
    """A Slurm job's work on each of its machines. submitit stores it in a file, and again when the
    job is requeued."""

    job: Job
    threads: int  # of each of its processes

    def __call__(self) -> None:
        number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "?"))
        index = os.environ.get("SLURM_ARRAY_TASK_ID")
        name = f"slurm:{number}" if index is None else f"slurm:{number}_{index}"
        devices = Devices(gpus=None, threads=self.threads, name=name)
        job, node = self.job, int(os.environ.get("SLURM_NODEID", 0))
        if job.nodes > 1:
            job = replace(job, command=torchrun(job, node=node))
        if node > 0:  # the first machine's process has the run's lock, log and status
            subprocess.run(
                job.command,
                stdin=subprocess.DEVNULL,
                env=devices.environment(),
                cwd=job.cwd,
                preexec_fn=ignore_signal,
                check=True,
            )
            return
        # Slurm ends jobs that exceed their time.
        self._process = JobProcess(job, devices, ignore_usr2=True, grace_seconds=3600)
        self._process.wait()

    def checkpoint(self) -> DelayedSubmission:
        """Lets the run save and end, and requeues the job; submitit calls this at SIGUSR2."""
        from submitit.helpers import DelayedSubmission

        process: JobProcess | None = getattr(self, "_process", None)
        if process is not None:  # else it still waits for a process of an earlier start
            process.stop("Slurm ends the job; it is queued again, as far as max_requeues allows")
            process.wait()
        return DelayedSubmission(SlurmRun(self.job, self.threads))


def torchrun(job: Job, *, node: int) -> tuple[str, ...]:
    """The command line of a run's processes on one of its machines, which have numbers from 0; the
    first machine is the rendezvous."""
    node_list = os.environ["SLURM_JOB_NODELIST"]
    command = ["scontrol", "show", "hostnames", node_list]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # Each job has its own port, since machines may be shared.
    port = 20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000
    return (
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={job.nodes}", f"--node-rank={node}", f"--nproc-per-node={job.processes}"),
        *(f"--master-addr={hosts[0]}", f"--master-port={port}", "--max-restarts=0"),
        *job.command[1:],
    )


def in_arrays(jobs: Sequence[Job], limit: int) -> list[list[Job]]:
    """Groups jobs that need the same resources into arrays of at most ``limit`` jobs."""
    sizes = sorted(grouped(((job.processes, job.nodes, job.on_cpu), job) for job in jobs).items())
    return [alike[i : i + limit] for _, alike in sizes for i in range(0, len(alike), limit)]


def export_paths(root: Path) -> str:
    """The line of a job's shell script that lets Python find this project."""
    return f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"'


def max_array_size() -> int:
    """Most jobs of an array on this cluster; Slurm's default if the cluster does not say."""
    try:
        command = ["scontrol", "show", "config"]
        config = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        config = ""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    # The largest index is one less than this, and the first is 0.
    return max(1, int(match[1])) if match else 1001


def run(
    jobs: list[Job],
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
    """Queues jobs and waits for them; see conf/hydra/launcher/slurm.yaml for the settings.

    Raises:
        UserError: if submitit or Slurm is not installed, or Slurm refuses the settings.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs were canceled.
    """
    arrays = in_arrays(jobs, max_array_size())
    if len(arrays) > n_jobs:
        raise UserError(
            f"hydra.launcher.n_jobs={n_jobs} is less than the {len(arrays)} job arrays of this "
            f"sweep: give at least {len(arrays)}, or sweep jobs of different sizes one by one."
        )
    import submitit

    folder = jobs[0].folder.parent / ".slurm"
    ids: dict[Job, str] = {}
    for array in arrays:
        n, nodes, on_cpu = array[0].processes, array[0].nodes, array[0].on_cpu
        try:
            executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=max_requeues)
        except RuntimeError as error:
            raise UserError(f"hydra/launcher=slurm: {error}.") from error
        settings: dict[str, Any] = {
            "job_name": jobs[0].folder.parent.name,
            "partition": partition,
            "account": account,
            "time": timeout_min,
            "nodes": nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": cpus_per_process * n,
            # From Slurm 22.05 on, srun does not inherit the number of cores from sbatch.
            "srun_args": [f"--cpus-per-task={cpus_per_process * n}"],
            "gpus_per_node": None if on_cpu else gpus_per_process * n or None,
            "mem": None if mem_gb is None else f"{round(mem_gb * 1024)}M",
            # Of this array: one job, and a part of the rest.
            "array_parallelism": 1 + (n_jobs - len(arrays)) * len(array) // len(jobs),
            "signal_delay_s": signal_delay_s,
            "stderr_to_stdout": True,
            "additional_parameters": dict(additional or {}),
            "setup": [export_paths(ROOT)],
        }
        executor.update_parameters(**{k: v for k, v in settings.items() if v is not None})
        try:
            with executor.batch():
                submitted = [executor.submit(SlurmRun(job, cpus_per_process)) for job in array]
        except BaseException as error:  # the next command queues all jobs again
            if ids:
                _Queue(ids).cancel(ids)
            if isinstance(error, submitit.core.utils.FailedJobError):
                raise UserError(f"Slurm refuses the job: {error}.") from error
            raise
        ids |= {job: submission.job_id for job, submission in zip(array, submitted, strict=True)}

    queue = _Queue(ids)
    # By default Slurm kills a canceled job after 30 s.
    follow(jobs, find_ended=queue.find_ended, cancel=queue.cancel, grace_seconds=60.0)


class _Queue:
    """The state of ``squeue``; not every cluster has accounting (``sacct``)."""

    def __init__(self, ids: dict[Job, str]) -> None:
        self._ids = ids
        self._missed: dict[Job, int] = dict.fromkeys(ids, 0)
        self._last_query = -float("inf")

    def find_ended(self) -> dict[Job, str]:
        if time.monotonic() - self._last_query >= _QUERY_SECONDS:
            self._last_query = time.monotonic()
            command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                queued = set(result.stdout.split())
                for job, number in self._ids.items():
                    self._missed[job] = 0 if number in queued else self._missed[job] + 1
        # Missing twice in a row: a job that is just being requeued or submitted is not over.
        return {
            job: f"Slurm ended job {self._ids[job]} (its output: {job.folder.parent}/.slurm)"
            for job, missed in self._missed.items()
            if missed >= 2
        }

    def cancel(self, jobs: Iterable[Job]) -> None:
        subprocess.run(["scancel", *(self._ids[job] for job in jobs)], check=False)
