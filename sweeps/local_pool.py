"""``hydra/launcher=local_pool``: the jobs of a sweep on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtp_lightning.errors import UserError
from sweeps.devices import DeviceQueue, choose_gpus
from sweeps.display import make_display
from sweeps.memory import MemoryUse
from sweeps.pool import Pool
from sweeps.process import Task, refuse_several_machines


def make_pool(
    n_tasks: int,
    *,
    devices: str | Sequence[int | str] = "auto",
    n_jobs: int | None = None,
    threads_per_process: int | str | None = None,
    grace_seconds: float = 60.0,
) -> Pool:
    """A pool over this machine's devices, shown on the terminal.

    Args:
        n_tasks: number of jobs.
        devices: auto, cpu, or the GPUs.
        n_jobs: most jobs at once, whatever memory they take; None lets memory limit them too.
        threads_per_process: a number, auto, or None for one on a CPU and auto with GPUs.
        grace_seconds: seconds for jobs to save after Ctrl-C.
    """
    queue = DeviceQueue(gpus=choose_gpus(devices), n_jobs=n_jobs, threads=threads_per_process)
    return Pool(
        queue=queue,
        display=make_display(n_tasks),
        grace_seconds=grace_seconds,
        memory=MemoryUse() if n_jobs is None else None,
    )


def run(
    tasks: list[Task],
    *,
    devices: str | Sequence[int | str],
    devices_per_job: int | None,
    n_jobs: int | None,
    threads_per_process: int | str | None,
    grace_seconds: float,
) -> None:
    """Runs tasks, as many at once as there are devices.

    Args:
        tasks: the tasks.
        devices: auto, cpu, or the GPUs.
        devices_per_job: devices of each job; by default its ``trainer.devices``.
        n_jobs: most jobs at once.
        threads_per_process: a number, auto, or None for one on a CPU and auto with GPUs.
        grace_seconds: seconds for jobs to save after Ctrl-C.

    Raises:
        UserError: for a job that can never get its devices.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs have ended.
    """
    if all(task.on_cpu for task in tasks):
        devices = "cpu"
    pool = make_pool(
        len(tasks),
        devices=devices,
        n_jobs=n_jobs,
        threads_per_process=threads_per_process,
        grace_seconds=grace_seconds,
    )
    pool.run([_with_devices(task, pool.queue, devices_per_job) for task in tasks])


def _with_devices(task: Task, queue: DeviceQueue, devices_per_job: int | None) -> Task:
    refuse_several_machines(task)
    wanted = task.processes if devices_per_job is None else devices_per_job
    if wanted < task.processes:
        raise UserError(
            f"hydra.launcher.devices_per_job={devices_per_job} is less than {task.label} asks for "
            f"with trainer.devices={task.processes}."
        )
    queue.check(wanted)
    return replace(task, devices=wanted)
