"""What does saving a sharded model cost the training? ``python -m benchmarks.checkpoints``

Two processes (gloo) with half a model and half of AdamW's state each save it as one file, which the
first gathers, and in parts. Measured are how long the training waits, when the checkpoint has its
name, what the first process needs besides its half, and the rate of matrix products meanwhile over
that without. Both ways take turns, each in processes of its own; figures are medians.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

_PROCESSES = 2


def save_once(way: str, megabytes: int, folder: Path) -> dict[str, float]:
    """One save, in one of two processes (gloo) with half a model and half of AdamW's state each.

    Args:
        way: ``file``, which the first process gathers, or ``parts``.
        megabytes: of the checkpoint.
        folder: for it.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    from mtp_lightning.distributed.shard_writing import ShardWriting
    from mtp_lightning.distributed.sharding import build_mesh, gathered
    from mtp_lightning.run import checkpoints as files

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = build_mesh("cpu", _PROCESSES, None)
    width = 1024
    rows = megabytes * 1_000_000 // (4 * width * 3 * 8)

    def sharded() -> torch.Tensor:
        return distribute_tensor(torch.randn(rows, width), mesh, [Shard(0)])

    moments = {i: {"exp_avg": sharded(), "exp_avg_sq": sharded()} for i in range(8)}
    state: dict[str, Any] = {
        "global_step": 1,
        "state_dict": {f"w{i}": sharded() for i in range(8)},
        "optimizer_states": [{"state": moments, "param_groups": []}],
    }
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def products(over: Callable[[], bool]) -> float:
        """Matrix products a second, until something holds."""
        done, began = 0, time.perf_counter()
        while not over():
            for _ in range(10):
                left @ right
            done += 10
        return done / (time.perf_counter() - began)

    end = time.perf_counter() + 2.0
    alone = products(lambda: time.perf_counter() > end)
    dist.barrier()
    path, result = folder / "last.ckpt", {}
    with peak_beside() as peak:
        began = time.perf_counter()
        if way == "file":
            parts = ("state_dict", "optimizer_states")
            whole = {**state, **{key: gathered(state[key]) for key in parts}}
            if dist.get_rank() == 0:
                files.save(whole, path)
            dist.barrier()
            result["waits_s"] = result["named_s"] = time.perf_counter() - began
        else:
            writing = ShardWriting(state, path, mesh, dist.group.WORLD)
            result["waits_s"] = time.perf_counter() - began
            meanwhile = products(lambda: writing.ended(wait=False))
            result["named_s"] = time.perf_counter() - began
            result["steps_meanwhile"] = meanwhile / alone
    assert files.intact(path)
    dist.destroy_process_group()
    return {**result, "beside_bytes": peak[0]}


@contextmanager
def peak_beside() -> Iterator[list[int]]:
    """The most bytes of its own that this process had inside, beyond those at first."""
    before, over = harness.private_rss(), threading.Event()
    most = [0]

    def look() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], harness.private_rss() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def one_round(way: str, megabytes: int) -> Row:
    """A save by processes of its own, on the disk of temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_PROCESSES}"]
        program = ["-m", "benchmarks.checkpoints", "save", way, str(megabytes), folder]
        harness.usage_of([sys.executable, *launch, *program], environment={"OMP_NUM_THREADS": "1"})
        found: Row = json.loads((Path(folder) / "result.json").read_text())
    return found


@cli.command(quick={"rounds": 1})
def checkpoints(megabytes: int = 600, rounds: int = 5) -> Row:
    """Saving a sharded model as one file and in parts.

    Args:
        megabytes: of the checkpoint.
    """
    ways = {way: partial(one_round, way, megabytes) for way in ("file", "parts")}
    found = harness.take_turns(ways, rounds, say=f"{megabytes} MB")
    result = {way: harness.medians(own) for way, own in found.items()}
    cli.print_table(
        f"Saving {megabytes} MB from {_PROCESSES} processes",
        "as: way; training waits, s: waits_s .2f; named after, s: named_s .2f; "
        "rate meanwhile: steps_meanwhile .2f; besides its half, bytes: beside_bytes ,.0f",
        [{"way": way, **own} for way, own in result.items()],
    )
    return result


main = cli.program("checkpoints", __doc__, checkpoints)


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:  # by one_round's processes
        way, megabytes, folder = sys.argv[2:]
        saved = save_once(way, int(megabytes), Path(folder))
        if os.environ["RANK"] == "0":
            (Path(folder) / "result.json").write_text(json.dumps(saved))
    else:
        main()
