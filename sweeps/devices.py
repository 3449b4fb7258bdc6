"""Devices of jobs: sets of GPUs from a queue, or shares of the cores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from mtp_lightning.errors import UserError
from mtp_lightning.system import cores

# Variables that a launcher, another job or a cluster's step may leave in the environment. A run
# that sees them takes itself for a process of another run (Lightning issue 11300).
_LEAKS = re.compile(
    r"((LOCAL|GLOBAL|NODE|GROUP)_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    r"|PL_(GLOBAL_SEED|SEED_WORKERS)|SLURM_(NTASKS|PROCID|LOCALID|NODEID)"
)


@dataclass(frozen=True)
class Devices:
    """The devices of one job."""

    name: str
    slot: int = 0  # the number of the job among the jobs at once
    gpus: tuple[str, ...] | None = ()  # empty for the CPU; None for all that the job finds
    threads: int = 1  # of each of its processes
    cores: int = 0  # taken from a queue that counts them

    def environment(self) -> dict[str, str]:
        """This process's environment with these devices, without variables that would mislead a
        run."""
        clean = {name: value for name, value in os.environ.items() if not _LEAKS.fullmatch(name)}
        clean["PYTHONUNBUFFERED"] = "1"
        # Matrix products follow OMP_NUM_THREADS; trainer.num_threads takes precedence.
        clean |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        if self.gpus is not None:
            clean["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return clean


def find_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    It asks the driver's own tool, since torch takes seconds to import.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = map(str.strip, visible.split(","))
        return list(takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads them
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []


def choose_gpus(devices: str | Sequence[int | str]) -> list[str]:
    """The GPUs of ``hydra.launcher.devices``; an empty list is the CPU.

    Raises:
        UserError: for a word other than auto and cpu, or a GPU that does not exist.
    """
    if devices == "cpu":
        return []
    available = find_gpus()
    if devices == "auto":
        return available
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise UserError(f"devices={devices}: give auto, cpu or a list of GPUs.")
    wanted = [str(device) for device in devices]
    missing = [name for name in wanted if name not in available]
    if missing or len(set(wanted)) < len(wanted):
        gpus = f"the GPUs {', '.join(available)}" if available else "no GPU"
        raise UserError(f"devices={wanted}: this machine has {gpus}, and each can be named once.")
    return wanted


def typed_devices(text: str) -> str | list[str]:
    """The value of ``--devices``: auto, cpu, or the GPUs that are typed as ``0,1``."""
    return text if text in ("auto", "cpu") else text.split(",")


class DeviceQueue:
    """Assigns GPUs, or cores.

    Args:
        gpus: names of the GPUs; none for the CPU.
        n_jobs: most jobs at once; by default one per GPU, or on a CPU as many as there are cores
            for. More jobs share the cores, which slows all of them down.
        threads: threads of each process. The default on a CPU is one, which has the best throughput
            alone and next to other jobs (``python -m benchmarks.runs threads``). ``auto`` divides
            the cores among the jobs at once (by default one) and their processes, and is the
            default with GPUs, where each process has its GPU's share. The number of threads, and so
            the bits of a job, does not depend on how many jobs there are or remain.
        host: name of this machine, if there are several.

    Raises:
        UserError: for less than one job at once, or less than one thread.
    """

    def __init__(
        self,
        *,
        gpus: Sequence[str] = (),
        n_jobs: int | None = None,
        threads: int | str | None = None,
        host: str = "",
    ) -> None:
        if n_jobs is not None and not 1 <= n_jobs <= 1024:
            raise UserError(f"n_jobs={n_jobs} must be a whole number from 1 to 1024.")
        if not (threads in (None, "auto") or isinstance(threads, int) and 1 <= threads <= 1024):
            raise UserError(
                f"threads_per_process={threads}: give a number from 1 to 1024, auto or null."
            )
        self.gpus = list(gpus)
        self._host = f"{host}:" if host else ""
        threads = threads or ("auto" if self.gpus else 1)
        # Number of jobs that the cores are divided among; None with a fixed number of threads.
        self._shares = (len(self.gpus) or n_jobs or 1) if threads == "auto" else None
        self._threads = threads if isinstance(threads, int) else 1
        jobs_by_cores = 1 if self._shares else max(1, cores() // self._threads)
        self.n_jobs = n_jobs or len(self.gpus) or jobs_by_cores
        # Cores are only counted if each thread has one.
        self._all_cores = max(cores(), self.n_jobs * self._threads)
        self._free_cores = self._all_cores
        self._free_gpus = list(self.gpus)
        self._free_slots = list(range(self.n_jobs))

    def check(self, n: int) -> None:
        """Checks that ``n`` processes, one per GPU, can ever get their devices.

        Raises:
            UserError: if they cannot.
        """
        if self.gpus and n > len(self.gpus):
            raise UserError(
                f"A job needs {n} GPUs, and there are {len(self.gpus)} ({', '.join(self.gpus)}): "
                "lower trainer.devices, or give the sweep more."
            )

    @property
    def has_room(self) -> bool:
        """Whether one more job may start, if it gets its devices."""
        free = self._free_gpus if self.gpus else self._free_cores >= self._threads
        return bool(self._free_slots) and bool(free)

    def take(self, n: int, *, on_cpu: bool = False) -> Devices | None:
        """Devices for a job of ``n`` processes; no GPU if it is ``on_cpu``, and None if it has to
        wait.

        Raises:
            UserError: if it would wait forever.
        """
        gpus = n if self.gpus and not on_cpu else 0
        self.check(gpus)
        if not self._free_slots or len(self._free_gpus) < gpus:
            return None
        threads, n_cores = self._threads, 0
        if self._shares is not None:
            threads = max(1, cores() // self._shares // (1 if gpus else n))
        elif not self.gpus:
            # A job with more processes than cores gets the machine for itself.
            n_cores = min(n * threads, self._all_cores)
        if self._free_cores < n_cores:
            return None
        self._free_cores -= n_cores
        taken = [self._free_gpus.pop(0) for _ in range(gpus)]
        slot = self._free_slots.pop(0)
        name = self._host + (f"cuda:{','.join(taken)}" if taken else f"cpu:{slot}")
        return Devices(slot=slot, gpus=tuple(taken), threads=threads, cores=n_cores, name=name)

    def give_back(self, devices: Devices) -> None:
        self._free_slots = sorted([*self._free_slots, devices.slot])
        self._free_cores += devices.cores
        free = {*self._free_gpus, *(devices.gpus or ())}
        self._free_gpus = [name for name in self.gpus if name in free]
