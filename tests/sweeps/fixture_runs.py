"""Folders of runs as training writes them, with numbers of which the report is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sweeps.plan import PlannedJob, SweepPlan

# Settings of all runs, by dotted key.
BASE: dict[str, Any] = {
    "seed": 0, "mtp_lambda": 0.3, "mtp._target_": "mtp_lightning.mtp.sequential.SequentialConfig",
    "mtp.depth": 1, "model.d_model": 128, "data.seed": 0, "data.split_seed": 0,
    "trainer.max_steps": 20, "paths.output_dir": "",
}  # fmt: skip


def on_text(fingerprint: str | None, *, bytes: int = 1_000_000, tokens: int = 400_000) -> Any:
    """The entry of a summary about the evaluated text."""
    counts = {"documents": 20, "bytes": bytes, "tokens": tokens}
    return {"evaluation": {"fingerprint": fingerprint, **counts}}


def on_questions(fingerprint: str | None = "e" * 32) -> Any:
    """The entry of a summary about the evaluated questions of a task."""
    return {"evaluation": {"fingerprint": fingerprint, "examples": 512, "tokens": 2048}}


def trained_on(data: str = "d", tokenizer: str = "t", **more: Any) -> dict[str, Any]:
    """The entry of a summary about its data. The fingerprints repeat these letters."""
    tokenizer_facts = {"fingerprint": tokenizer * 32}
    return {"data": {"fingerprint": data * 32, "tokenizer": tokenizer_facts, **more}}


VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
# Settings of a run without MTP.
NO_MTP = {"mtp._target_": "mtp_lightning.mtp.none.NoMTPConfig", "mtp.depth": 0}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys -> a nested mapping."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return result


def write_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    loss: float | None = 2.0,
    summary: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    done: bool = True,
    curve: tuple[float, ...] = (3.0, 2.5),
) -> Path:
    """One run in a new folder.

    Args:
        config: over BASE, by dotted key; ``data.seed`` follows ``seed``, and ``data.depth``
            ``mtp.depth``, as in training.
        loss: final ``val/loss_depth_0``; None leaves it out.
        summary: entries that replace the usual ones; None removes the key.
        status: of the launcher; None for a run that was started by hand.
        done: whether there is a summary.
        curve: main losses of the validations before the last one.
    """
    folder.mkdir(parents=True)
    settings = {**BASE, **(config or {}), "paths.output_dir": str(folder)}
    settings.setdefault("run_dir", str(folder))
    settings["data.seed"], settings["data.depth"] = settings["seed"], settings["mtp.depth"]
    (folder / "config.yaml").write_text(yaml.safe_dump(nested(settings)))
    losses = [*curve, *([loss] if done and loss is not None else [])]
    lines = ["step,train/loss,val/loss_depth_0,progress/tokens,progress/flops,progress/seconds"]
    for i, value in enumerate(losses, start=1):
        lines.append(f"{10 * i},,{value!r},{1000.0 * i},{1e9 * i},{0.5 * i}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if status is not None:
        (folder / "status.json").write_text(json.dumps({"version": 1, **status}))
    if done:
        content = {
            "val/loss_depth_0": loss, "val/bits_per_byte": None if loss is None else loss / 2,
            "step": settings["trainer.max_steps"], "tokens": 3000, "flops": 3_000_000_000,
            "seconds": 1.5, "seed": settings["seed"], "world_size": 1, **trained_on(),
            "versions": VERSIONS, "machine": "Linux x86_64, 2 cores", "git_commit": "a" * 40,
            "evaluation": {"fingerprint": "e" * 32}, **(summary or {}),
        }  # fmt: skip
        stored = {key: value for key, value in content.items() if value is not None}
        (folder / "summary.json").write_text(json.dumps(stored))
    return folder


def task_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    rights: tuple[float, ...],
    chance: float = 0.5,
    summary: dict[str, Any] | None = None,
    done: bool = True,
    **options: Any,
) -> Path:
    """One run of a task, as by :func:`write_run`. ``rights`` has ``val/exact_match`` at steps 10,
    20, ..; the last one is a finished run's."""
    numbers = {"val/exact_match": rights[-1], "val/chance": chance} if rights else {}
    numbers = {**numbers, **on_questions(), **(summary or {})}
    write_run(folder, config, done=done, summary=numbers, **options)
    lines = ["step,val/loss_depth_0,val/exact_match,val/chance"]
    lines += [f"{10 * i},2.0,{right!r},{chance!r}" for i, right in enumerate(rights, start=1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def depth_sweep(
    folder: Path, losses: dict[int, tuple[float, ...]], **options: Any
) -> dict[tuple[int, int], Path]:
    """A sweep over the depth: for every depth the final losses of seeds 0, 1, ..."""
    runs = {}
    for depth, values in losses.items():
        speed = {"decode/tokens_per_step": 1 + 0.5 * depth, "decode/speedup": 1 + 0.1 * depth}
        for seed, loss in enumerate(values):
            summary = speed if depth else {}
            for k in range(1, depth + 1):
                rates = {f"val/agreement_depth_{k}": 0.9 - 0.1 * k}
                summary = {**summary, f"val/loss_depth_{k}": loss + 0.1 * k, **rates}
            config = {"mtp.depth": depth, "seed": seed}
            run = folder / f"depth-{depth}_seed-{seed}"
            runs[depth, seed] = write_run(run, config, loss=loss, summary=summary, **options)
    return runs


def write_plan(folder: Path, overrides: dict[str, list[str]]) -> None:
    """Write the launcher's sweep.json from overrides by the job's folder."""
    plan = SweepPlan(folder)
    plan.jobs = [
        PlannedJob(name, tuple(job_overrides)) for name, job_overrides in overrides.items()
    ]
    plan.write([])
