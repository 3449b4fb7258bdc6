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

from tests.integration.helpers import config, execute

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


def train_all(file: Path) -> None:
    from mtp_lightning.experiment.training import train

    plan = json.loads(file.read_text())
    for name, settings in plan["runs"].items():
        print(f"--- {name}", file=sys.stderr, flush=True)
        train(config(file.parent / name, Path(plan["cache"]), settings))


def main() -> None:
    """As torchrun's agent, but with forks instead of new Python processes."""
    import torch

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
