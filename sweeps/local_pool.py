"""``hydra/launcher=local_pool``: the jobs of a sweep on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sweeps.devices import DeviceQueue, choose_gpus
from sweeps.display import make_display
from sweeps.pool import Pool
from sweeps.process import Task


def run(
    tasks: list[Task],
    *,
    devices: str | Sequence[int | str],
    devices_per_job: int | None,
    n_jobs: int | None,
    grace_seconds: float,
) -> None:
    """Run tasks, as many at once as there are devices.

    Args:
        tasks: to run.
        devices: auto, cpu, or the GPUs.
        devices_per_job: that each job gets; by default what its ``trainer.devices`` asks for.
        n_jobs: most jobs at once.
        grace_seconds: that jobs have to save after Ctrl-C.

    Raises:
        ValueError: a job that can never have its devices.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs have ended.
    """
    gpus = [] if all(task.on_cpu for task in tasks) else choose_gpus(devices)
    tasks = [_with_devices(task, gpus, devices_per_job) for task in tasks]
    queue = DeviceQueue(gpus=gpus, n_jobs=n_jobs, n_tasks=len(tasks))
    Pool(queue=queue, display=make_display(len(tasks)), grace_seconds=grace_seconds).run(tasks)


def _with_devices(task: Task, gpus: Sequence[str], devices_per_job: int | None) -> Task:
    wanted = task.processes if devices_per_job is None else devices_per_job
    if wanted < task.processes:
        raise ValueError(
            f"hydra.launcher.devices_per_job={devices_per_job} is less than what {task.label} "
            f"asks for, trainer.devices={task.processes}."
        )
    if gpus and wanted > len(gpus):
        raise ValueError(f"{task.label} needs {wanted} GPUs, and the sweep has {len(gpus)}.")
    return replace(task, processes=wanted)
