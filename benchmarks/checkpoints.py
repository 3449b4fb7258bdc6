"""What does saving a sharded model cost the training? ``python -m benchmarks.checkpoints``

Two processes (gloo) that have the halves of a model and of AdamW's state save it as one file, which
the first gathers, and in parts. Measured are how long the training waits, when the checkpoint has
its name, what the first process needs beside its half, and the rate of work (products of matrices)
meanwhile against that without. Both ways have their turn in every round, each in processes of its
own; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common

_PROCESSES = 2
_WAYS = ("file", "parts")


def measure(way: str, megabytes: int, folder: Path) -> dict[str, float]:
    """One save, in one of the processes; what the first one measures is the result."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    from mtp_lightning.distributed.shard_writing import ShardWriting
    from mtp_lightning.distributed.sharding import build_mesh, gathered
    from mtp_lightning.run import checkpoints

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = build_mesh("cpu", _PROCESSES, None)
    width = 1024
    rows = megabytes * 1_000_000 // (4 * width * 3 * 8)

    def sharded() -> torch.Tensor:
        return distribute_tensor(torch.randn(rows, width), mesh, [Shard(0)])

    weights = {f"w{i}": sharded() for i in range(8)}
    moments = {i: {"exp_avg": sharded(), "exp_avg_sq": sharded()} for i in range(8)}
    state: dict[str, Any] = {
        "global_step": 1,
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": []}],
    }
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def steps(until: Any) -> float:
        """A second, until something holds for all processes."""
        done, began = 0, time.perf_counter()
        while not until():
            for _ in range(10):
                left @ right
            done += 10
        return done / (time.perf_counter() - began)

    end = time.perf_counter() + 2.0
    alone = steps(lambda: time.perf_counter() > end)
    dist.barrier()
    path = folder / "last.ckpt"
    memory = _Peak()
    began = time.perf_counter()
    result: dict[str, float] = {}
    if way == "file":
        whole = {
            **state,
            **{key: gathered(state[key]) for key in ("state_dict", "optimizer_states")},
        }
        if dist.get_rank() == 0:
            checkpoints.save(whole, path)
        dist.barrier()
        result["waits_s"] = result["named_s"] = time.perf_counter() - began
    else:
        writing = ShardWriting(state, path, mesh, dist.group.WORLD)
        result["waits_s"] = time.perf_counter() - began
        meanwhile = steps(lambda: writing.ended(wait=False))
        result["named_s"] = time.perf_counter() - began
        result["steps_meanwhile"] = meanwhile / alone
    result["beside_bytes"] = memory.end()
    assert checkpoints.intact(path)
    dist.destroy_process_group()
    return result


class _Peak:
    """The most that this process has of its own, beside what it had at first."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._before = self._most = self._now()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/self/status does not say RssAnon")

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most - self._before


def one_round(way: str, megabytes: int) -> dict[str, float]:
    """A save by processes of its own, on the disk of temporary files."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        done = subprocess.run(
            [
                *torchrun,
                f"--nproc-per-node={_PROCESSES}",
                *("-m", "benchmarks.checkpoints", "--child", way, str(output)),
                *("--megabytes", str(megabytes)),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        found: dict[str, float] = json.loads(output.read_text())
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """The command line; the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=600, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child is not None:
        way, output = args.child
        found = measure(way, args.megabytes, Path(output).parent)
        if os.environ["RANK"] == "0":
            Path(output).write_text(json.dumps(found))
        return {}
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    for turn in range(args.rounds):
        for way in _WAYS:
            rounds[way].append(one_round(way, args.megabytes))
            common.progress(f"round {turn + 1} of {args.rounds}, {way}: {rounds[way][-1]}")
    medians = {
        way: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for way, found in rounds.items()
    }
    result = {"megabytes": args.megabytes, "rounds": args.rounds, **medians}
    print(json.dumps(result, indent=2))
    if args.output is not None:
        common.write_json(result, args.output)
    return result


if __name__ == "__main__":
    main()
