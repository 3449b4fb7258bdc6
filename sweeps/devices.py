"""What jobs run on: sets of GPUs from a queue, or shares of the cores."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

# Left by a launcher, another job or a cluster's step, these make a run take itself for a part of
# something else (Lightning 11300).
_LEAKS = (
    "LOCAL_RANK",
    "GLOBAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "TORCHELASTIC_",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    The driver's own tool is asked, because torch takes seconds to import.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def choose_gpus(devices: str | Sequence[int | str]) -> list[str]:
    """The GPUs that ``hydra.launcher.devices`` means; none means the CPU.

    Raises:
        ValueError: another word than auto and cpu, or a GPU that is not there.
    """
    if devices == "cpu":
        return []
    there = find_gpus()
    if devices == "auto":
        return there
    if isinstance(devices, str) or not devices:
        raise ValueError(f"hydra.launcher.devices={devices}: give auto, cpu or a list of GPUs.")
    wanted = [str(device) for device in devices]
    missing = [name for name in wanted if name not in there]
    if missing or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"hydra.launcher.devices={wanted}: this machine has the GPUs {there or 'none'}, "
            "and each can be named once."
        )
    return wanted


class DeviceQueue:
    """Hands out GPUs, or shares of the cores.

    Args:
        gpus: names of the GPUs; none for the CPU.
        n_jobs: most jobs at once; by default one a GPU, or on a CPU as many as have a core for each
            of their processes, which then have one thread. That does most work, alone and beside
            neighbours (``python -m benchmarks.threads``), and gives a job the same threads, and so
            the same bits, however many others there are. Jobs of a given number share the cores.
        n_tasks: jobs there are.

    Raises:
        ValueError: less than one job at once.
    """

    def __init__(
        self, *, gpus: Sequence[str] = (), n_jobs: int | None = None, n_tasks: int = 1
    ) -> None:
        if n_jobs is not None and n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs must be at least 1, not {n_jobs}.")
        self.gpus = list(gpus)
        self._by_core = n_jobs is None and not self.gpus
        self._free_cores = cores()
        self.n_jobs = min(n_jobs or len(self.gpus) or cores(), max(n_tasks, 1))
        self._free_gpus = list(self.gpus)
        self._free_slots = list(range(self.n_jobs))

    def check(self, n: int) -> None:
        """Whether ``n`` processes can ever have their devices.

        Raises:
            ValueError: they cannot.
        """
        if self.gpus and n > len(self.gpus):
            raise ValueError(
                f"A job needs {n} GPUs, and there are {len(self.gpus)} "
                f"({', '.join(self.gpus)}): lower trainer.devices, or give the sweep more."
            )

    @property
    def has_room(self) -> bool:
        """Whether one more job may start, if it gets its devices."""
        free = self._free_gpus if self.gpus else self._free_cores > 0 or not self._by_core
        return bool(self._free_slots) and bool(free)

    def take(self, n: int) -> Devices | None:
        """Devices for a job of ``n`` processes; None when it has to wait.

        Raises:
            ValueError: it would wait for ever.
        """
        self.check(n)
        if not self._free_slots or (self.gpus and len(self._free_gpus) < n):
            return None
        # More processes than cores have the machine for themselves.
        wanted = min(n, cores()) if self._by_core else 0
        if self._free_cores < wanted:
            return None
        self._free_cores -= wanted
        taken = [self._free_gpus.pop(0) for _ in range(n)] if self.gpus else []
        share = 1 if self._by_core else max(1, cores() // self.n_jobs // n)
        slot = self._free_slots.pop(0)
        return Devices(slot=slot, gpus=tuple(taken), threads=share, cores=wanted)

    def give_back(self, devices: Devices) -> None:
        """Let the next job have them."""
        self._free_slots = sorted([*self._free_slots, devices.slot])
        self._free_cores += devices.cores
        free = {*self._free_gpus, *(devices.gpus or ())}
        self._free_gpus = [name for name in self.gpus if name in free]


class Devices:
    """What one job may use.

    Args:
        slot: which of the jobs at once this is.
        gpus: names of its GPUs; empty for the CPU; None for those that it finds.
        threads: of each of its processes.
        cores: that it has taken from a queue that counts them.
        name: what to call them, where neither GPUs nor the slot says it.
    """

    def __init__(
        self,
        *,
        slot: int = 0,
        gpus: tuple[str, ...] | None = (),
        threads: int = 1,
        cores: int = 0,
        name: str | None = None,
    ) -> None:
        self.slot = slot
        self.name = name
        self.gpus = gpus
        self.threads = threads
        self.cores = cores

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        return f"cuda:{','.join(self.gpus)}" if self.gpus else f"cpu:{self.slot}"

    def environment(self) -> dict[str, str]:
        """The environment of its process."""
        clean = clean_environment()
        # Products of matrices follow OMP_NUM_THREADS; trainer.num_threads goes before it.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            clean[name] = str(self.threads)
        if self.gpus is not None:
            clean["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return clean


def clean_environment() -> dict[str, str]:
    """This process's environment without what would mislead a run."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(name == leak or leak[-1] == "_" and name.startswith(leak) for leak in _LEAKS)
    }
    return {**kept, "PYTHONUNBUFFERED": "1"}
