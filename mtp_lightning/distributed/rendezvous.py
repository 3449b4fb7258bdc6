"""The rendezvous of the processes that prepare one run: they share the first one's decisions.

The processes are started in one of three ways:

- torchrun, or srun with one task per device: all of them run the whole program;
- one process per machine, by hand (``MASTER_ADDR``, ``MASTER_PORT``, ``NODE_RANK``);
- Lightning starts a machine's other processes after the first one has prepared the run, and passes
  the decisions in their environment.

They communicate through a key-value store, because there is no process group yet: the decision
whether a run continues, and the corpus, come before the model.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mtp_lightning.distributed.liveness import (
    PATIENCE,
    SILENCE,
    Pulse,
    errors_of_lost_peers,
    gone_peer,
    looking_after_children,
)
from mtp_lightning.errors import UserError
from mtp_lightning.processes import DECISIONS, Peers
from mtp_lightning.system import STARTER, end_with_starter

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
# A network disk may show a new file with a delay of some seconds.
_SHOWN_SECONDS = 10.0


@dataclass(eq=False)
class Rendezvous(Peers):
    """This process and the others, before training."""

    rank: int = 0
    size: int = 1  # the number of processes that prepare the run
    _: KW_ONLY
    local_rank: int = 0  # the rank of this process on its machine
    node: int = 0  # the number of this machine
    store: dist.Store | None = None  # shared by all processes; None for a single one

    def __post_init__(self) -> None:
        # The decisions of the process that started this one.
        self._received: dict[str, Any] = json.loads(os.environ.get(DECISIONS, "{}"))
        self.leads = self.rank == 0 and not self._received
        self._decided: dict[str, Any] = {}
        # The uses of each key so far, since a process may train one run after another.
        self._uses: Counter[str] = Counter()
        self.pulse: Pulse | None = None

    def broadcast(self, key: str, decide: Callable[[], Any]) -> Any:
        """Return the first process's decision in all processes; within :meth:`handing_on`, also in
        those that Lightning starts. If the first process failed, the others raise a UserError."""
        if key in self._received:
            return self._received[key]
        unique = self._unique(key)
        if self.rank == 0:
            with self._failing_for_all():
                value = decide()
            self._set(unique, json.dumps(value))
        else:
            value = json.loads(self._get(unique))
        self._decided[key] = value
        return value

    @contextmanager
    def handing_on(self, folder: Path) -> Iterator[None]:
        """Pass the decisions so far to the processes that Lightning starts during a block. All
        processes connect in this block."""
        os.environ[DECISIONS] = json.dumps({**self._received, **self._decided})
        os.environ[STARTER] = str(os.getpid())
        if self.pulse is not None:
            self.pulse.waits_in = folder
        try:
            with looking_after_children(folder):
                yield
        finally:
            del os.environ[DECISIONS], os.environ[STARTER]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run a block in the first process before the others, which then find its files. The first
        process of each machine runs next, because the disk may be local to a machine. If an earlier
        process failed, the others raise a UserError."""
        done = self._unique("done")
        if self.rank > 0:
            self._get(done if self.local_rank == 0 else f"{done} on {self.node}")
        with self._failing_for_all():
            yield
        if self.local_rank == 0:
            self._set(f"{done} on {self.node}", "")
        if self.rank == 0:
            self._set(done, "")

    def require_shared(self, folder: Path) -> None:
        """Check that all processes see the same run folder; otherwise all raise a UserError."""
        if self.store is None:
            return
        name = self.broadcast("witness", lambda: f".seen_by_all_{uuid.uuid4().hex}")
        if self.rank == 0:
            with self._failing_for_all():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            self._set(f"{name} is there", "")
        self._get(f"{name} is there")
        until = time.monotonic() + _SHOWN_SECONDS
        while not (is_visible := folder.is_dir() and name in os.listdir(folder)):
            if time.monotonic() > until:
                break
            time.sleep(_POLL_SECONDS)
        self._set(f"{name} by {self.rank}", "" if is_visible else socket.gethostname())
        try:
            hosts = [self._get(f"{name} by {rank}") for rank in range(self.size)]
        finally:
            if self.rank == 0:
                (folder / name).unlink()
        for rank, host in enumerate(hosts):
            if host:
                raise UserError(
                    f"run_dir={folder} is not one folder for all processes: process {rank}, on "
                    f"{host}, does not see what process 0 writes there. Give a run_dir on a disk "
                    "that all machines share."
                )

    def watched(self, folder: Path) -> AbstractContextManager[None]:
        return errors_of_lost_peers(folder)

    def check(self, trainer: Mapping[str, Any]) -> None:
        """Check the number of processes against the config.

        Raises:
            UserError: the numbers differ, or the address of the other machines is unknown.
        """
        devices = _whole(trainer["devices"])
        nodes = trainer["num_nodes"]
        _, started, _, _ = _launched_ranks() or (0, 1, 0, 0)
        if started > 1 or dist.is_torchelastic_launched():
            local_size = _whole(os.environ.get("LOCAL_WORLD_SIZE"))
            if devices is not None and (
                started != devices * nodes or (local_size is not None and local_size != devices)
            ):
                local_part = "" if local_size is None else f", {local_size} of them on this machine"
                raise UserError(
                    f"{started} processes were started{local_part}, and trainer.devices={devices} "
                    f"with trainer.num_nodes={nodes} asks for {devices * nodes}: set "
                    "trainer.devices to the processes of a machine, trainer.num_nodes to the "
                    "machines, and trainer.strategy=ddp or fsdp."
                )
        elif nodes > 1 and not (
            _started_by_hand() or DECISIONS in os.environ or "LOCAL_RANK" in os.environ
        ):
            raise UserError(
                f"trainer.num_nodes={nodes}, and nothing says where the other machines are: start "
                "it by torchrun or srun, or on every machine with MASTER_ADDR, MASTER_PORT and "
                "NODE_RANK in the environment (docs/scale.md)."
            )
        if self.size == 0:  # started by hand: only the config has the number of machines
            self.size = nodes

    @contextmanager
    def _failing_for_all(self) -> Iterator[None]:
        """Send an error to the other processes, which would otherwise wait for this one forever."""
        try:
            yield
        except BaseException as error:
            self._set("failed", f"{self.rank}: {error}")
            raise

    def _unique(self, key: str) -> str:
        """The key in the store for the next use of ``key``."""
        self._uses[key] += 1
        return f"{key} {self._uses[key]}"

    def _set(self, key: str, value: str) -> None:
        if self.store is not None:
            with errors_of_lost_peers():
                self.store.set(key, f"{value} ")  # some stores do not keep an empty value

    def _get(self, key: str) -> str:
        """Wait for a value and return it. Polling lets signals be handled meanwhile."""
        assert self.store is not None
        with errors_of_lost_peers():
            while not self.store.check([key]):
                if self.store.check(["failed"]):
                    rank, _, reason = self._read("failed").partition(": ")
                    raise UserError(f"Process {rank} could not prepare the run: {reason}")
                if self.pulse is not None and (lost := self.pulse.lost()) is not None:
                    raise gone_peer(lost)
                time.sleep(_POLL_SECONDS)
            return self._read(key)

    def _read(self, key: str) -> str:
        assert self.store is not None
        return self.store.get(key).decode()[:-1]


def find_peers() -> Rendezvous:
    """Connect to the processes that the environment names.

    Raises:
        UserError: another process has ended, or has not started in time.
    """
    if DECISIONS in os.environ:
        if not end_with_starter():
            raise gone_peer("the process that started this one")
    elif (ranks := _launched_ranks()) is not None:
        if ranks[1] > 1:
            return _connected(*ranks)
    elif _started_by_hand():  # one process per machine
        node = _number_in("NODE_RANK")
        return _connected(node, 0, 0, node)
    return Rendezvous()


@cache
def _connected(rank: int, size: int, local_rank: int, node: int) -> Rendezvous:
    env = os.environ
    has_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = _main_address()
    hosts_store = rank == 0 and not has_agent
    if not hosts_store:
        _reach(host, port)
    tcp = dist.TCPStore(
        host,
        port,
        is_master=hosts_store,
        timeout=timedelta(minutes=1),
        wait_for_workers=False,
        # The process group's own store will use the same port.
        multi_tenant=True,
    )
    start = f"{env.get('TORCHELASTIC_RUN_ID')}/{env.get('TORCHELASTIC_RESTART_COUNT')}"
    store = dist.PrefixStore(f"mtp-lightning/{start}", tcp)
    peers = Rendezvous(rank, size, local_rank=local_rank, node=node, store=store)
    peers.pulse = Pulse(store, rank, lambda: peers.size)
    peers.pulse.start()
    return peers


def _reach(host: str, port: int) -> None:
    """Wait for the first process, which may start late. Raises a :class:`UserError` if it does
    not."""
    began, reported = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=SILENCE).close()
            return
        except OSError as error:
            waited = time.monotonic() - began
            if waited > PATIENCE:
                raise gone_peer(f"no answer from {host}:{port}: {error}") from error
            if waited > SILENCE and not reported:
                reported = True
                log.warning(
                    "waiting for process 0 at %s:%d (MASTER_ADDR, MASTER_PORT), which has not "
                    "come in %.0f s; this one ends after %.0f minutes",
                    *(host, port, SILENCE, PATIENCE / 60),
                )
        time.sleep(0.2)


def _whole(value: Any) -> int | None:
    return int(value) if str(value).isdecimal() else None


def _launched_ranks() -> tuple[int, int, int, int] | None:
    """(rank, processes, rank on this machine, machine) under torchrun or srun; otherwise None."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env and not dist.is_torchelastic_launched():
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
    if not all(name in env for name in names[:2]):
        return None
    rank, size, local_rank, node = (_number_in(name) if name in env else 0 for name in names)
    return rank, size, local_rank, node


def _started_by_hand() -> bool:
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    return all(name in os.environ for name in names) and "LOCAL_RANK" not in os.environ


def _number_in(name: str) -> int:
    number = _whole(os.environ[name])
    if number is None:
        raise UserError(f"{name}={os.environ[name]} in the environment must be a whole number.")
    return number


def _main_address() -> tuple[str, int]:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], _number_in("MASTER_PORT")
    slurm = SLURMEnvironment()
    return slurm.main_address, slurm.main_port
