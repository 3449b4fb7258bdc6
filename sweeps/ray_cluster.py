"""``hydra/launcher=ray``: the jobs of a sweep on a Ray cluster, or on this machine with Ray.

Each job is one Ray task that starts the run in its own process, as the local pool does; Ray assigns
the cores and GPUs. All machines must see the sweep's folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT
from sweeps.devices import Devices
from sweeps.follow import follow
from sweeps.process import Job, JobProcess


def run_remotely(job: Job, threads: int, grace_seconds: float) -> None:
    """Runs a job in a Ray worker; Ray cancels it with a KeyboardInterrupt."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    name = f"ray:{os.uname().nodename}" + (f":cuda:{gpus}" if gpus else "")
    devices = Devices(gpus=None, threads=threads, name=name)
    process = JobProcess(job, devices, grace_seconds=grace_seconds)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.stop("canceled")
        process.wait()


def run(
    jobs: list[Job],
    *,
    address: str | None,
    cpus_per_process: int,
    gpus_per_process: float,
    grace_seconds: float,
) -> None:
    """Submits jobs to Ray and waits for them; see conf/hydra/launcher/ray.yaml for the settings.

    Raises:
        UserError: if Ray is not installed, or has no cluster at the address.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs were canceled.
    """
    import ray

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        ray.init(
            address=address,
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level="WARNING",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
        )
    except ConnectionError as error:
        raise UserError(f"hydra.launcher.address={address}: {error}") from error
    try:
        # A new worker for every job, and no retry that the status file does not know of.
        remote = ray.remote(max_calls=1, max_retries=0)(run_remotely)
        needs = {}
        for job in jobs:
            cpus = cpus_per_process * job.processes
            gpus = 0 if job.on_cpu else gpus_per_process * job.processes
            _check_room(ray, cpus=cpus, gpus=gpus)
            needs[job] = {"num_cpus": cpus, "num_gpus": gpus}
        refs: dict[Job, Any] = {
            job: remote.options(**need).remote(job, cpus_per_process, grace_seconds)
            for job, need in needs.items()
        }

        ended: dict[Job, str] = {}

        def find_ended() -> dict[Job, str]:
            if unfinished := {ref: job for job, ref in refs.items() if job not in ended}:
                done, _ = ray.wait(list(unfinished), num_returns=len(unfinished), timeout=0)
                ended.update((unfinished[ref], _error(ray, ref)) for ref in done)
            return ended

        def cancel(unfinished: Iterable[Job]) -> None:
            for job in unfinished:
                ray.cancel(refs[job], force=False)

        follow(jobs, find_ended=find_ended, cancel=cancel, grace_seconds=grace_seconds)
    finally:
        ray.shutdown()


def _check_room(ray: Any, *, cpus: float, gpus: float) -> None:
    """Refuses a job that no machine can ever run, which Ray would let wait forever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in machines):
        raise UserError(
            f"A job asks for {cpus} cores and {gpus:g} GPUs, which no machine of the Ray cluster "
            "has: lower hydra.launcher.cpus_per_process or gpus_per_process."
        )


def _error(ray: Any, ref: Any) -> str:
    try:
        ray.get(ref)
    except (ray.exceptions.RayError, OSError) as error:
        lines = str(error).strip().splitlines()
        return f"Ray: {lines[-1] if lines else type(error).__name__}"
    return "Ray ended the job"
