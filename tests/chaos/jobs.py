"""Commands that are killed in the middle, and the comparison of two of their folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mtp_lightning.run.checkpoints import inspect
from tests.chaos.cases import hold
from tests.integration.helpers import checkpoint, overrides, rows
from tests.sweeps.claims.fixture_claims import write_claim

# Steps, validations and checkpoints that fall on different steps, and several epochs.
SMALL: dict[str, Any] = {
    "data.source.size": 8_000, "data.source.documents": 20, "data.eval_bytes": 300,
    "trainer.max_steps": 40, "trainer.val_check_interval": 15,
    "callbacks.checkpoints.every_n_steps": 4, "callbacks.speculative_eval.n_prompts": 1,
    "callbacks.speculative_eval.new_tokens": 8,
}  # fmt: skip
TASK: dict[str, Any] = {
    "data.source.size": None, "data.source.documents": None, "data.seq_len": None,
    "data.eval_bytes": None, "data.val_fraction": None, "data.eval_examples": 16,
    "data.batch_size": 8, "tokenizer": None,
}  # fmt: skip
_MODEL = {f"model.{key}": None for key in ("n_heads", "n_kv_heads", "d_ff")}
# Every head, objective, rule and source with a state that a resumed run needs.
RUNS: dict[str, dict[str, Any]] = {
    "sequential": {"lambda_schedule": "linear_decay"}, "shared": {"mtp.share_layers": "true"},
    "parallel": {"mtp": "parallel"}, "linear": {"mtp": "linear"},
    "parameter_free": {"mtp": "parameter_free"}, "joint": {"mtp": "joint"},
    "top": {"mtp": "top", "mtp.depth": 1}, "bag": {"mtp": "bag", "mtp.depth": 1},
    "nextlat": {"mtp": "nextlat"}, "eagle": {"mtp": "eagle", "mtp.draft_vocab": 60},
    "masked": {"mtp": "masked", "mtp.lora_rank": 4}, "dflash": {"mtp": "dflash"},
    "registers": {"mtp": "registers", "mtp.depth": 1}, "kl": {"objective": "kl"},
    "experts": {"model": "deepseek_nano", "model.n_layers": 2, **_MODEL},
    "gradnorm": {"balance": "gradnorm"}, "dwa": {"balance": "dwa"},
    "uncertainty": {"balance": "uncertainty"}, "trunk_ratio": {"balance": "trunk_ratio"},
    "sampled_depths": {"balance": "sampled_depths"}, "random_weights": {"balance": "random"},
    "cosine_gate": {"balance": "cosine_gate"}, "muon": {"optimizer": "muon", "optimizer.lr": None},
    "token_dropout": {"mtp.token_dropout": 0.5, "mtp.hidden_state_mixing": "true"},
    "accumulated": {"trainer.accumulate_grad_batches": 2}, "workers": {"data.num_workers": 2},
    "tensorboard": {"logger": "default"}, "task": {"data": "copy", **TASK},
    "sibling": {"data": "sibling", "data.examples": 64, **TASK},
}  # fmt: skip
# Keys of a summary that differ between equal runs: times, speeds and the commit.
_TIMED = (
    "perf/", "seconds", "git_commit", "progress/seconds", "decode/speedup",
    "decode/tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command whose result is known.

    Attributes:
        name: its name.
        arguments: the app and its arguments, for a working folder.
        same: raises Broken unless two folders have the same results.
        processes: whether it starts other processes, which takes seconds.
        once: whether it refuses to repeat finished work.
        again: further arguments that retry a failed part.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    same: Callable[[Path, Path], None]
    processes: bool = False
    once: bool = False
    again: tuple[str, ...] = ()


def train_job(name: str, cache: Path, settings: dict[str, Any], *, processes: bool = False) -> Job:
    """A run in ``FOLDER/run``; one of several processes for ``processes``."""
    given = overrides(cache, SMALL | settings)
    return Job(
        name,
        lambda folder: ["train.py", *given, f"run_dir={folder / 'run'}"],
        lambda one, other: same_runs(one / "run", other / "run"),
        processes,
    )


def store_job(cache: Path) -> Job:
    """A run of two steps that first learns a vocabulary and builds a store with two processes, in
    a cache of its own."""
    text = cache.parent / "text"
    text.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        words = [f"{(i * 7919 + j * j * 31) % 997:x}" for j in range(6000)]
        (text / f"{i}.txt").write_text(f"text {i}\n" + " ".join(words) + "\n")
    settings = {
        "data": "text", "data.source.size": None, "data.source.documents": None,
        "data.paths": f"[{text}]", "data.val_fraction": 0.1, "data.build_workers": 2,
        "tokenizer": "bpe", "tokenizer.vocab_size": 400, "trainer.max_steps": 2,
    }  # fmt: skip

    def arguments(folder: Path) -> list[str]:
        given = overrides(folder / "cache", SMALL | settings)
        return ["train.py", *given, f"run_dir={folder / 'run'}"]

    def same(one: Path, other: Path) -> None:
        same_runs(one / "run", other / "run")
        same_files(one / "cache", other / "cache")

    return Job("store", arguments, same)


def sweep_job(cache: Path) -> Job:
    """Two jobs of a sweep, one after another, in ``FOLDER/sweep``."""
    given = [part for part in overrides(cache, SMALL) if not part.startswith("mtp.depth=")]

    def arguments(folder: Path) -> list[str]:
        where = [f"sweep_dir={folder / 'sweep'}", "hydra.launcher.n_jobs=1"]
        return ["train.py", "-m", *given, "mtp.depth=0,1", *where]

    again = ("sweep.retry_failed=true",)
    return Job("sweep", arguments, _all_same("sweep", 2), processes=True, again=again)


def claims_job(cache: Path) -> Job:
    """A claim of two arms, its runs in ``FOLDER/runs``."""
    short = {**SMALL, "trainer.max_steps": 12, "mtp": None, "mtp.depth": None}
    write_claim(cache.parent, "killed", seeds=[0, 1], minimum=2, shared=overrides(cache, short))

    def arguments(folder: Path) -> list[str]:
        where = ["--claims", str(cache.parent), "--runs", str(folder / "runs")]
        return ["-m", "sweeps.claims", "run", "killed", *where, "--unpredicted"]

    again = ("--retry-failed",)
    return Job("claims", arguments, _all_same("runs", 4), processes=True, again=again)


def _all_same(below: str, number_of: int) -> Callable[[Path, Path], None]:
    """Compares all finished runs in a folder of two, which must be so many."""

    def same(one: Path, other: Path) -> None:
        runs = sorted(file.parent.name for file in (one / below).glob("*/summary.json"))
        hold(len(runs) == number_of, f"{below} has {len(runs)} finished runs")
        for name in runs:
            same_runs(one / below / name, other / below / name)

    return same


def export_job(cache: Path, run: Path) -> Job:
    """A finished run exported into ``FOLDER/out``."""
    return Job(
        "export",
        lambda folder: ["export.py", f"checkpoint={run}", f"output={folder / 'out'}"],
        lambda one, other: same_files(one / "out", other / "out"),
        once=True,
    )


def same_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, counters, logged columns and summary of two runs are the same."""
    a, b = map(checkpoint, (one, other))
    for key in ("state_dict", "optimizer_states", "progress", "balance"):
        hold(_same(a[key], b[key]), f"{key} of last.ckpt differs")
    for line, (row, expected_row) in enumerate(zip(rows(one), rows(other), strict=False), start=1):
        differ = [t for t in row.keys() | expected_row.keys() if row.get(t) != expected_row.get(t)]
        hold(not differ, f"metrics.csv line {line}, columns {differ[:3]} differ")
    hold(len(rows(one)) == len(rows(other)), "metrics.csv has another number of rows")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        summary["data"].pop("store", None)  # where it lies
    for key in summaries[0].keys() | summaries[1].keys():
        if not key.startswith(_TIMED):
            pair = [summary.get(key) for summary in summaries]
            hold(str(pair[0]) == str(pair[1]), f"summary's {key}: {pair[0]} and {pair[1]}")
    nothing_left(one)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return alike and bool((torch.eq(a, b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        keys = [key for key in a if key != "seconds"]
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in keys)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def same_files(one: Path, other: Path) -> None:
    """Two folders hold the same files with the same bytes; locks and times aside."""
    digests = [
        {
            str(file.relative_to(folder)): hashlib.sha256(_untimed(file)).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.stat().st_size and not file.name.endswith(".lock")
        }
        for folder in (one, other)
    ]
    a, b = digests
    differ = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    hold(not differ, f"files differ: {differ[:4]}")
    nothing_left(one)


def _untimed(file: Path) -> bytes:
    """A file's content; of JSON, without ``seconds``."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text())
    return json.dumps({k: v for k, v in content.items() if k != "seconds"}).encode()


def nothing_left(folder: Path) -> None:
    """No temporary file or folder is left."""
    hidden = [path for path in folder.rglob(".*") if path.name != ".hydra"]
    left = [*hidden, *folder.rglob("*.tmp")]
    # A half-built folder may belong to a running process until it is old (cache.py).
    left = [p for p in left if not (p.name.endswith(".lock") or ".building-" in p.name)]
    hold(not left, f"left behind: {[str(path.relative_to(folder)) for path in left[:4]]}")


def whole_files(folder: Path) -> None:
    """Every file under its own name can be read to its end."""
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".yaml":
                yaml.safe_load(file.read_text())
            elif file.suffix == ".ckpt":
                reason, _ = inspect(file)
                hold(reason is None, f"{file.name} is damaged: {reason}")
        except (ValueError, yaml.YAMLError) as error:
            hold(False, f"{file.relative_to(folder)} cannot be read: {error}")
