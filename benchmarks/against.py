"""Compares the speed and the memory of the working tree with those of a commit.

    python -m benchmarks.against --base COMMIT

Optimizer steps, decoding and start-up run by the commit's code and by the working tree's. Each side
has one process of one thread, and the two take turns. The table has CPU seconds, peak memory, and
the ratio of the working tree to the base: the median over turns, the lowest and the highest.
``same`` says whether both sides computed the same losses, to the last bit, or decoded the same ids.
Weights and prompts are random. A commit older than ``benchmarks/workloads.py`` is measured by the
oldest version of that file. The built base is kept in the cache folder (``trees/``).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import cli, harness
from benchmarks.harness import ROOT, Row
from benchmarks.same_bits import built_tree, commit_of

VOCAB_SIZES = (4096, 32768)
STEPS: dict[str, Row] = {
    "pico": {"mtp": "parallel", "depth": 3, "batch_size": 64, "seq_len": 24, "steps": 4},
    "nano": {"depth": 2, "batch_size": 4, "seq_len": 256, "steps": 2},
    "micro": {"depth": 2, "batch_size": 4, "seq_len": 256, "steps": 1},
}
_MAIN_JOB: Row = {"vocab_size": 1024, "depth": 2, "prompt_tokens": 32, "new_tokens": 128}
_SMOLLM2: Row = {"vocab_size": 49152, "depth": 0, "prompt_tokens": 32, "new_tokens": 16, "batch": 1}
_SMOLLM2_SHAPE = {"d_model": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "d_ff": 1536}
COMMANDS = {
    "import mtp_lightning": ["-c", "import mtp_lightning"],
    "train.py --help": ["train.py", "--help"],
    "train.py debug=fast": ["train.py", "debug=fast", "trainer.accelerator=cpu"],
}
# The files of this folder that a worker in the base's tree needs.
_WORKER_FILES = ("harness.py", "workloads.py")


def workloads() -> dict[str, tuple[str, Row]]:
    """Name of a row -> the name of the measurement, and its task."""
    found: dict[str, tuple[str, Row]] = {}
    for model, shape in STEPS.items():
        for size in VOCAB_SIZES:
            task = {"model": model, "vocab_size": size, **shape}
            found[f"step of {model}, V = {size:,}"] = "benchmarks.workloads:training", task
    for batch in (1, 8):
        for drafts in (False, True):
            name = f"main job, batch {batch}, {'drafts' if drafts else 'plain'}"
            task = {**_MAIN_JOB, "batch": batch, "drafts": drafts, "precision": "fp32"}
            found[name] = "benchmarks.workloads:decoding", {**task, "overrides": []}
    overrides = ["mtp=none", *(f"model.{key}={value}" for key, value in _SMOLLM2_SHAPE.items())]
    for precision in ("fp32", "bf16", "int8"):
        task = {**_SMOLLM2, "overrides": overrides, "drafts": False, "precision": precision}
        found[f"SmolLM2's shape, {precision}"] = "benchmarks.workloads:decoding", task
    longer = {**task, "new_tokens": 480}  # attention reads more with every token
    found["SmolLM2's shape, int8, 512 tokens"] = "benchmarks.workloads:decoding", longer
    return found


def compare(name: str, answers: Mapping[str, Sequence[Row]]) -> Row:
    """A row: the medians of ``base`` and ``tree``, and the ratios of their turns."""
    row: Row = {"name": name}
    for side, own in answers.items():
        row[f"{side}_ms"] = 1e3 * statistics.median(answer["seconds"] for answer in own)
        row[f"{side}_mb"] = max(answer["rss"] for answer in own) / 1e6
    pairs = list(zip(answers["base"], answers["tree"], strict=True))
    ratios = [tree["seconds"] / base["seconds"] for base, tree in pairs]
    row |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    row |= {"memory": row["tree_mb"] / row["base_mb"], "ratios": ratios}
    if "result" in pairs[0][0]:
        same = all(base["result"] == tree["result"] for base, tree in pairs)
        row["same"] = "yes" if same else "NO"
    return row


def program(tree: Path, words: list[str]) -> Row:
    """CPU seconds and peak memory of a Python program of a tree, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run_dir={folder}/run"] if "debug=fast" in words else []
        return harness.usage_of([sys.executable, *words, *own], tree=tree)


def give_worker_files(commit: str, tree: Path) -> None:
    """Add the oldest ``benchmarks/workloads.py`` to the tree of a commit that has none."""
    if _git("cat-file", "-e", f"{commit}:benchmarks/workloads.py").returncode == 0:
        return
    log = _git("log", "--diff-filter=A", "--format=%H", "--", "benchmarks/workloads.py")
    first = log.stdout.split()[-1]
    for name in _WORKER_FILES:
        text = _git("show", f"{first}:benchmarks/{name}").stdout
        file = tree / "benchmarks" / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


@cli.command(quick={"turns": 2})
def against(base: str, turns: int = 9, only: Sequence[str] = ("",)) -> Row:
    """Optimizer steps, decoding and start-up.

    Args:
        base: a commit.
        only: rows whose names contain one of these words; default all.
    """
    harness.use_cpu_time()
    commit = commit_of(base)
    trees = {"base": built_tree(commit), "tree": ROOT}
    give_worker_files(commit, trees["base"])
    rows = []

    def wanted(name: str) -> bool:
        return any(part in name for part in only)

    for name, (measurement, task) in workloads().items():
        if not wanted(name):
            continue
        starts = {
            side: partial(harness.Worker, measurement, task, tree=tree)
            for side, tree in trees.items()
        }
        rows.append(compare(name, harness.race(starts, turns, say=name)))
    for name, words in COMMANDS.items():
        if not wanted(name):
            continue
        programs = {side: partial(program, tree, words) for side, tree in trees.items()}
        for first in programs.values():
            first()  # compiles Python's files, and fills the cache folder
        rows.append(compare(name, harness.take_turns(programs, turns, say=name)))
    cli.print_table(
        f"CPU time of one thread: {commit[:12]} and the working tree, in turns",
        "what: name; base, ms: base_ms ,.2f; tree, ms: tree_ms ,.2f; tree/base: ratio .3f; "
        "lowest: low .3f; highest: high .3f; base, MB: base_mb ,.0f; tree, MB: tree_mb ,.0f; "
        "tree/base: memory .3f; same: same",
        rows,
    )
    return {"commit": commit, "rows": rows}


main = cli.program(against)


if __name__ == "__main__":
    main()
