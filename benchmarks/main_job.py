"""What should ``python train.py`` train? ``python -m benchmarks.main_job``

Tokenizers, shapes of the trunk and depths at equal time: each is trained for as many steps as so
many CPU seconds of one thread hold, by what two short runs differ in, as many at once as there are
cores. All are evaluated on one text, whatever their tokenizer. One seed: differences of a few
hundredths mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common

# Of the two short runs.
_SPEED_STEPS = (20, 80)


def _shape(width: int, blocks: int, heads: int, d_ff: int) -> list[str]:
    return [
        f"model.d_model={width}",
        f"model.n_layers={blocks}",
        f"model.n_heads={heads}",
        f"model.n_kv_heads={heads // 2 or 1}",
        f"model.d_ff={d_ff}",
    ]


_WIDE = _shape(128, 4, 4, 384)
# name -> overrides of the main job
_ROWS: dict[str, list[str]] = {
    "byte, 128 x 4": ["tokenizer=byte", *_WIDE],
    "4,096 ids, 128 x 4": ["tokenizer.vocab_size=4096", *_WIDE],
    "1,024 ids, 128 x 4": _WIDE,
    "1,024 ids, 128 x 4, 8 windows a step": ["data.batch_size=8", *_WIDE],
    "1,024 ids, 128 x 6": _shape(128, 6, 4, 384),
    "1,024 ids, 96 x 8 (the main job)": [],
    "the same, D = 0": ["mtp=none"],
    "the same, D = 1": ["mtp.depth=1"],
    "the same, D = 3": ["mtp.depth=3"],
}
_COLUMNS = {
    "row": "row",
    "steps": "step|,",
    "bits per byte": "val/bits_per_byte|.3f",
    "agreement, depth 1": "val/agreement_depth_1|.1%",
    "depth 2": "val/agreement_depth_2|.1%",
    "tokens a verify pass": "decode/tokens_per_step|.2f",
    "speed-up by drafts": "decode/speedup|.2f",
}
_KEPT = ("val/bits_per_byte_se", "evaluation", "seconds", "tokens", "parameters")


def train(folder: Path, overrides: list[str], steps: int, *more: str) -> float:
    """A run in a process of its own; the CPU seconds that it took in all."""
    given = [
        *overrides,
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.accelerator=cpu",
        "trainer.num_threads=1",
        f"run_dir={folder}",
        *more,
    ]
    process = subprocess.Popen(
        [sys.executable, "train.py", *given],
        cwd=common.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"train.py {' '.join(given)} failed: see {folder / 'train.log'}")
    return usage.ru_utime + usage.ru_stime


def measure(name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Final metrics of a row after so many CPU seconds of training steps."""
    overrides = _ROWS[name]
    short = ["data.eval_bytes=1", "~callbacks.speculative_eval"]
    # The first also builds the token store, which the others find.
    train(folder / "store", overrides, 1, *short)
    few, many = (train(folder / str(n), overrides, n, *short) for n in _SPEED_STEPS)
    steps = round(seconds * (_SPEED_STEPS[1] - _SPEED_STEPS[0]) / (many - few))
    train(folder / "run", overrides, steps)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    kept = [*_KEPT, *(key.partition("|")[0] for key in _COLUMNS.values())]
    found = {key: summary[key] for key in kept if key in summary}
    common.progress(f"{name}: {found['val/bits_per_byte']:.3f} bits per byte")
    return {"row": name, **found}


def main() -> None:
    """The command."""
    parser = common.parser(__doc__ or "", "main_job")
    parser.add_argument("--seconds", type=float, default=240, help="of training steps, each")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    args = parser.parse_args()
    seconds = 5.0 if args.quick else args.seconds
    names = [name for name in _ROWS if args.only in name]
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as folder:
        places = [Path(folder) / str(i) for i in range(len(names))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(measure, names, [seconds] * len(names), places))
    common.print_table(f"{seconds:.0f} CPU seconds each", _COLUMNS, rows)
    machine = common.machine()
    common.write_json({"rows": rows, "seconds": seconds, "machine": machine}, args.output)


if __name__ == "__main__":
    main()
