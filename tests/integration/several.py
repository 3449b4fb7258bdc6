"""Runs of several processes, one after another in the same ones: starting them takes longest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.helpers import ROOT, config, environment

Runs = dict[str, dict[str, Any]]


def run_all(folder: Path, cache: Path, runs: Runs, *, processes: int) -> None:
    """Train runs, each in a folder of its name.

    Args:
        folder: where those go.
        cache: of token stores.
        runs: the settings of each, on top of the quick run's.
        processes: that torchrun starts for all of them.
    """
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"cache": str(cache), "runs": runs}, default=str))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.integration.several", str(plan)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def main() -> None:
    import torch

    from mtp_lightning.experiment.training import train

    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    plan = json.loads(file.read_text())
    for name, settings in plan["runs"].items():
        print(f"--- {name}", file=sys.stderr, flush=True)
        train(config(file.parent / name, Path(plan["cache"]), settings))


if __name__ == "__main__":
    main()
