"""What a task's run spends on its validations: ``python -m benchmarks.validation --cpu-time``

A preset's run is shortened to three validations; the first, which makes the examples, is left out.
From the seconds of a step and of a validation follows what the preset's whole run spends on each.
Further arguments are overrides: ``python -m benchmarks.validation --cpu-time mtp=sequential``.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import mean
from typing import Any
from unittest.mock import patch

from benchmarks import common

_COLUMNS = {"what": "what", "seconds each": "seconds|.3f", "of the whole run": "share|.1%"}


@contextmanager
def timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Note what every call of a method takes."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = common.clock()
        result = method(*args, **kwargs)
        common.synchronize()
        seconds.append(common.clock() - began)
        return result

    with patch.object(owner, name, wrapped):
        yield


def measure(overrides: Sequence[str], *, steps: int) -> list[dict[str, Any]]:
    """Seconds of a step and of every part of a validation, and their shares of the whole run.

    Args:
        overrides: of the config.
        steps: between two validations.
    """
    from mtp_lightning.callbacks.exact_match import ExactMatch
    from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
    from mtp_lightning.experiment.training import train
    from mtp_lightning.module import MTPModule

    whole = common.compose_config(overrides).trainer
    parts = {
        "a training step": (MTPModule, "training_step"),
        "a validation's losses": (MTPModule, "validation_step"),
        "its answers (exact_match)": (ExactMatch, "on_validation_epoch_end"),
        "its drafts (speculative_eval)": (SpeculativeEval, "on_validation_epoch_end"),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as folder, ExitStack() as stack:
        for what, (owner, name) in parts.items():
            stack.enter_context(timed(owner, name, seconds[what]))
        short = {
            "trainer.max_steps": 3 * steps,
            "trainer.val_check_interval": steps,
        }
        given = {**short, "logger": "csv", "paths.output_dir": folder}
        train(common.compose_config([*overrides, *(f"{k}={v}" for k, v in given.items())]))
    validations = whole.max_steps // whole.val_check_interval
    rows = []
    for what, took in seconds.items():
        is_step = what == "a training step"
        # The first of three validations, with all of its batches, and the first steps are left out.
        once = mean(took[steps:]) if is_step else sum(took[len(took) // 3 :]) / 2
        rows.append({"what": what, "seconds": once})
        rows[-1]["total"] = once * (whole.max_steps if is_step else validations)
    total = sum(row["total"] for row in rows)
    return [{**row, "share": row["total"] / total} for row in rows]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = common.parser(__doc__ or "", "validation")
    common.add_cpu_time(parser)
    parser.add_argument("--experiment", default="star_graph", help="the preset")
    args, overrides = parser.parse_known_args(argv)
    if args.cpu_time:
        common.use_cpu_time()
    given = [f"experiment={args.experiment}", *overrides]
    rows = measure(given, steps=2 if args.quick else 20)
    common.print_table(f"experiment={args.experiment}", _COLUMNS, rows)
    result = {"rows": rows, "experiment": args.experiment, "machine": common.machine()}
    common.write_json(result, args.output)
    return result


if __name__ == "__main__":
    main()
