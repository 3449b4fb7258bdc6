"""Runs of several processes, one after another in the same processes, to start these only once."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.helpers import config, execute, rows, train_here, weights

Runs = dict[str, dict[str, Any]]


def run_all(folder: Path, cache: Path, runs: Runs, *, processes: int) -> None:
    """Train runs, each in a folder of its name.

    Args:
        folder: of the runs' folders.
        cache: of token stores.
        runs: each run's settings in addition to the quick run's.
        processes: how many train each run; they find each other as torchrun's do.
    """
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"cache": str(cache), "runs": runs}, default=str))
    arguments = [sys.executable, "-m", "tests.integration.several", str(plan), str(processes)]
    execute(arguments, seconds=1200, code=0)


def assert_two_train_as_one(folder: Path, cache: Path, runs: Runs) -> None:
    """Train runs by two processes with two micro-batches each, and by one process: the logged
    values and the weights are the same, in float64. The documents have about 50 bytes, so that the
    counts of ranks and micro-batches differ."""
    common = {
        "data.document_mask": "true",
        "data.source.documents": 1200,
        "trainer.max_steps": 6,
        "trainer.precision": "64-true",
    }
    two = {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "data.batch_size": 2,
        "trainer.accumulate_grad_batches": 2,
    }
    both, one = folder / "two", folder / "one"
    both.mkdir()
    run_all(both, cache, {name: run | common | two for name, run in runs.items()}, processes=2)
    for name, run in runs.items():
        train_here(one / name, cache, run | common | {"data.batch_size": 8})
        assert [row["step"] for row in rows(both / name)] == list(range(1, 7))
        for logged in zip(rows(both / name), rows(one / name), strict=True):
            shared, alone = (
                {t: v for t, v in row.items() if t.startswith(("train/", "balance/", "grad/"))}
                for row in logged
            )
            assert any(tag.startswith("train/loss_depth_") for tag in alone), name
            assert shared == pytest.approx(alone, rel=1e-5), name
        expected = weights(one / name)
        for key, tensor in weights(both / name).items():
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-4, atol=1e-6, msg=f"{name}, {key}"
            )


def train_all(file: Path) -> None:
    from mtp_lightning.experiment.training import train

    plan = json.loads(file.read_text())
    for name, settings in plan["runs"].items():
        print(f"--- {name}", file=sys.stderr, flush=True)
        train(config(file.parent / name, Path(plan["cache"]), settings))


def main() -> None:
    """As torchrun's agent, but with forks instead of new Python processes."""
    torch.set_num_threads(1)
    file, processes = Path(sys.argv[1]), int(sys.argv[2])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = set()
    for rank in range(processes):
        if (child := os.fork()) == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            try:
                train_all(file)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        ranks.add(child)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    failed = False
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status and not failed:
            failed = True
            for other in ranks:  # which would wait for it
                os.kill(other, signal.SIGKILL)
    del store
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
