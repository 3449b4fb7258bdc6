"""Processes that prepare a run together, here as threads with one store."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from mtp_lightning.distributed import liveness
from mtp_lightning.distributed import rendezvous as module
from mtp_lightning.distributed.liveness import Pulse, errors_of_lost_peers
from mtp_lightning.distributed.rendezvous import Rendezvous, find_peers
from mtp_lightning.errors import UserError

# (rank, rank on its machine, machine)
RANKS = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]


def together(work: Callable[[Rendezvous], Any]) -> list[Any]:
    """The results or errors of four processes on two machines."""
    store = dist.HashStore()
    results: list[Any] = [None] * len(RANKS)

    def run_process(rank: int, local_rank: int, node: int) -> None:
        peers = Rendezvous(rank, len(RANKS), local_rank=local_rank, node=node, store=store)
        try:
            results[rank] = work(peers)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run_process, args=who) for who in RANKS]
    for thread in reversed(threads):  # the first process starts last
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_the_first_process_broadcasts_a_new_value_each_time() -> None:
    def work(peers: Rendezvous) -> tuple[Any, Any]:
        return (
            peers.broadcast("resume", lambda: {"from": peers.rank}),
            peers.broadcast("resume", lambda: None),
        )

    assert together(work) == [({"from": 0}, None)] * 4


def test_in_turn_starts_with_rank_0_and_the_first_of_each_machine() -> None:
    order: list[tuple[str, int]] = []

    def work(peers: Rendezvous) -> None:
        for _ in range(2):  # twice, for two runs in one process
            with peers.in_turn():
                order.append(("in", peers.rank))
                time.sleep(0.05)
                order.append(("out", peers.rank))

    together(work)
    assert order[:2] == [("in", 0), ("out", 0)] and len(order) == 16
    assert order.index(("out", 2)) < order.index(("in", 3))


def test_an_error_of_the_first_process_ends_the_others() -> None:
    def work(peers: Rendezvous) -> None:
        with peers.in_turn():
            if peers.rank == 0:
                raise ValueError("there is no text")

    results = together(work)
    assert str(results[0]) == "there is no text"
    assert {str(error) for error in results[1:]} == {
        "Process 0 could not prepare the run: there is no text"
    }


def test_a_run_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    together(lambda peers: peers.require_shared(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr(module, "_SHOWN_SECONDS", 0.3)

    def work(peers: Rendezvous) -> None:
        peers.require_shared(tmp_path / ("run" if peers.node == 0 else "elsewhere"))

    errors = [str(error) for error in together(work)]
    assert all("process 2, on " in text and "a disk that all machines share" in text
               for text in errors)  # fmt: skip


def test_a_process_that_lightning_starts_gets_the_broadcast_values(tmp_path, monkeypatch):
    parents: list[str] = []
    monkeypatch.setattr(
        module, "end_with_starter", lambda: parents.append(os.environ[module.STARTER]) or True
    )
    first = Rendezvous()
    assert first.broadcast("resume", lambda: "last.ckpt") == "last.ckpt"
    assert first.broadcast("resume", lambda: None) is None  # one process alone stores nothing
    with first.handing_on(tmp_path):
        second = find_peers()
        assert second.broadcast("resume", lambda: "another") is None and not second.leads
        assert parents == [str(os.getpid())], "it ends with its starter"
        monkeypatch.setattr(module, "end_with_starter", lambda: False)
        with pytest.raises(UserError, match="another process of this run has ended"):
            find_peers()
    assert find_peers().broadcast("resume", lambda: "another") == "another"


@pytest.mark.parametrize(
    ("environment", "trainer", "refusal"),
    [
        ({}, {}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, {"devices": 2}, None),  # Lightning starts the other one
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "2 processes were started"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, {"devices": 2}, None),
        ({"WORLD_SIZE": "2", "RANK": "1"}, {"devices": "2"}, None),
        ({"WORLD_SIZE": "2", "RANK": "1"}, {"num_nodes": 2}, None),
        ({"WORLD_SIZE": "4", "RANK": "1"}, {"devices": 2, "num_nodes": 2}, None),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "4"}, {"devices": 2, "num_nodes": 2},
         "4 of them on this machine"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {},
         "4 processes"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, {"devices": 2}, "RANK=x in the environment must be"),
        ({}, {"num_nodes": 2}, "nothing says where the other machines are"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1"}, {"num_nodes": 2}, None),
    ],
)  # fmt: skip
def test_the_number_of_processes_must_be_that_of_the_config(
    environment: dict[str, str],
    trainer: dict[str, Any],
    refusal: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "NODE_RANK", "TORCHELASTIC_RUN_ID"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cfg = OmegaConf.create({"devices": 1, "num_nodes": 1, **trainer})
    if refusal is None:
        Rendezvous().check(cfg)
        return
    with pytest.raises(ValueError, match=refusal):
        Rendezvous().check(cfg)


def test_a_lost_first_process_is_reported(tmp_path: Path) -> None:
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", first.port, timeout=timedelta(seconds=10))
    second = Rendezvous(1, 2, local_rank=1, store=store)
    del first
    with pytest.raises(UserError, match="another process of this run has ended"):
        second.broadcast("run_dir", lambda: None)  # before the folder exists
    gone = pytest.raises(UserError, match="another process of this run has ended")
    with gone, errors_of_lost_peers(tmp_path):
        second.broadcast("resume", lambda: None)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistStoreError("wait timeout"), True),
        (RuntimeError("[..pair.cc] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_errors_of_connections_mean_a_lost_process(tmp_path, error, is_lost):
    raised = pytest.raises(UserError if is_lost else RuntimeError)
    with raised as error_info, errors_of_lost_peers(tmp_path):
        raise error
    assert isinstance(error_info.value, UserError) == is_lost
    assert str(error) in str(error_info.value)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_BEAT", 0.05)
    for place in (liveness, module):
        monkeypatch.setattr(place, "SILENCE", 1.5)
        monkeypatch.setattr(place, "PATIENCE", 2.5)


def with_pulse(rank: int, store: dist.Store) -> Rendezvous:
    peers = Rendezvous(rank, 2, local_rank=rank, store=store)
    peers.pulse = Pulse(store, rank, lambda: peers.size)
    peers.pulse.start()
    return peers


@pytest.mark.parametrize("how", ["dies", "lives", "has met"])
def test_a_silent_process_ends_the_wait(how, impatient, caplog):
    store = dist.HashStore()
    first, second = (with_pulse(rank, store) for rank in range(2))
    assert first.pulse is not None and second.pulse is not None
    time.sleep(0.3)
    if how == "dies":
        second.pulse._store = dist.HashStore()  # the others do not read this one
    elif how == "has met":  # connections replace the signs of life
        second.pulse.met.set()
    else:
        threading.Timer(3.0, lambda: second._set("late", "come")).start()
    if how == "lives":
        assert first._get("late") == "come" and not caplog.messages
    elif how == "dies":
        with pytest.raises(UserError, match="ended .*process 1 has shown no sign of life"):
            first._get("late")
    else:
        time.sleep(2.5)
        assert first.pulse.lost() is None
    first.pulse.met.set()
    second.pulse.met.set()


def test_a_process_that_does_not_come_is_named_during_the_wait(impatient, caplog):
    first = with_pulse(0, dist.HashStore())
    with pytest.raises(UserError, match="ended .*process 1 has not come in"):
        first._get("late")
    (line,) = caplog.messages
    assert line.startswith("waiting for process 1 of 2, which has not come")


def test_an_unreachable_first_process_is_named(impatient, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with caplog.at_level(logging.WARNING):
            with pytest.raises(UserError, match=f"ended .*no answer from 127.0.0.1:{port}"):
                module._reach("127.0.0.1", port)
            assert caplog.text.count("waiting for process 0 at 127.0.0.1") == 1
            threading.Timer(0.5, taken.listen).start()
            module._reach("127.0.0.1", port)
