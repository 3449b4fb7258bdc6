"""Checks that a change of the code leaves every number as it was.

Run ``python -m benchmarks.same_bits --base COMMIT``. Each configuration of :data:`CASES` trains for
60 steps on a generated text, by one thread of this machine: once by the code of the commit and once
by the working tree. Losses, their weights, gradient norms and validation results in ``metrics.csv``
must agree to the last bit; if not, the exit code is 1. It takes four minutes, half of them for the
base, whose results are kept by commit and configuration in the cache folder (``--again`` trains it
again). The base runs this file from the working tree, so it imports no other benchmark.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE = "b4f10fd"
STEPS = 60

# Columns that are compared. Times and speeds differ from run to run.
COMPARED = ("train/", "val/", "grad/", "balance/", "moe/")

COMMON = [
    "data=text",
    "data.seq_len=32",
    "data.batch_size=4",
    "data.eval_bytes=1000",
    "data.eval_batch_size=4",
    "tokenizer=byte",
    "logger=csv",
    "~callbacks.speculative_eval",
    "callbacks.throughput.measure_matmul=false",
    "callbacks.checkpoints.every_n_steps=1000",
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={STEPS // 2}",
    "trainer.log_every_n_steps=1",
    "trainer.num_threads=1",
    "trainer.accelerator=cpu",
]
DENSE = ["model=nano", "model.d_model=48", "model.n_layers=2"]
MOE = ["model=deepseek_nano", "model.d_model=48", "model.n_layers=2"]
_CONFLICT = (
    "+callbacks.gradient_conflict={_target_:"
    "mtp_lightning.callbacks.gradient_conflict.GradientConflict,every_n_steps:5}"
)

# A case's name -> its overrides. Two processes train "ddp", by the command line.
CASES: dict[str, list[str]] = {
    "none": [*DENSE, "mtp=none"],
    "sequential": [*DENSE],
    "depth_zero": [*DENSE, "mtp.depth=0"],
    "share_layers": [*DENSE, "mtp.depth=3", "mtp.share_layers=true"],
    "hidden_state_mixing": [*DENSE, "mtp.depth=3", "mtp.hidden_state_mixing=true"],
    "pre_hidden_first": [*DENSE, "mtp.input_norm=pre", "mtp.concat=hidden_first"],
    "branch_before_last": [*DENSE, "mtp.branch=before_last"],
    "parallel": [*DENSE, "mtp=parallel"],
    "parallel_final": [*DENSE, "mtp=parallel", "mtp.branch=final", "mtp.input_norm=post"],
    "linear": [*DENSE, "mtp=linear"],
    "linear_markov": [*DENSE, "mtp=linear", "mtp.correction=markov"],
    "parallel_mlp": [*DENSE, "mtp=parallel", "mtp.correction=mlp"],
    "feature_confidence": [*DENSE, "objective=feature", "objective.confidence=true"],
    "parameter_free": [*DENSE, "mtp=parameter_free"],
    "moe": [*MOE],
    "moe_parallel": [*MOE, "mtp=parallel"],
    "moe_recompute": [*MOE, "model.recompute=true"],
    "moe_parallel_recompute": [*MOE, "mtp=parallel", "model.recompute=true"],
    "moe_accumulate_mask": [*MOE, "trainer.accumulate_grad_batches=2", "data.document_mask=true"],
    "document_mask": [*DENSE, "data.document_mask=true"],
    "document_mask_linear": [*DENSE, "mtp=linear", "data.document_mask=true"],
    "document_mask_parameter_free": [*DENSE, "mtp=parameter_free", "data.document_mask=true"],
    "accumulate": [*DENSE, "trainer.accumulate_grad_batches=2"],
    "accumulate_parallel": [*DENSE, "mtp=parallel", "trainer.accumulate_grad_batches=2"],
    "detach_trunk": [*DENSE, "mtp.detach=trunk"],
    "detach_all": [*DENSE, "mtp.detach=all"],
    "detach_all_linear": [*DENSE, "mtp=linear", "mtp.detach=all"],
    "freeze_trunk": [*DENSE, "mtp.freeze_trunk=true"],
    "freeze_trunk_linear": [*DENSE, "mtp=linear", "mtp.freeze_trunk=true"],
    "untied_gpt": [*DENSE, "model.tie_embeddings=false", "+model.attention.qk_norm=true"],
    "dwa": [*DENSE, "balance=dwa", "balance.window_steps=10"],
    "uncertainty": [*DENSE, "balance=uncertainty"],
    "gradnorm": [*DENSE, "balance=gradnorm"],
    "gradnorm_parallel": [*DENSE, "mtp=parallel", "balance=gradnorm"],
    "cosine_gate": [*DENSE, "balance=cosine_gate"],
    "cosine_gate_moe": [*MOE, "balance=cosine_gate"],
    "trunk_ratio": [*DENSE, "balance=trunk_ratio", "balance.every_n_steps=2"],
    "trunk_ratio_linear": [*DENSE, "mtp=linear", "balance=trunk_ratio"],
    "trunk_ratio_accumulate": [
        *DENSE, "balance=trunk_ratio", "trainer.accumulate_grad_batches=2"
    ],
    "random": [*DENSE, "balance=random"],
    "sampled_depths": [*DENSE, "balance=sampled_depths"],
    "sampled_depths_parallel": [*DENSE, "mtp=parallel", "balance=sampled_depths"],
    "gradient_conflict": [*DENSE, _CONFLICT],
    "gradient_conflict_moe": [*MOE, _CONFLICT],
    "list_lambda": [*DENSE, "mtp_lambda=[0.5,0.1]", "lambda_schedule=linear_decay"],
    "forward_curriculum": [*DENSE, "lambda_schedule=forward_curriculum"],
    "reverse_curriculum": [*DENSE, "mtp=parallel", "lambda_schedule=reverse_curriculum"],
    "modded_nanogpt": [*DENSE, "mtp=parameter_free", "lambda_schedule=modded_nanogpt"],
    "geometric": [*DENSE, "mtp.depth=3", "lambda_schedule=geometric"],
    "bf16": [*DENSE, "trainer.precision=bf16-mixed"],
    "bf16_moe": [*MOE, "trainer.precision=bf16-mixed"],
    "double": [*DENSE, "trainer.precision=64-true"],
    "ddp": [*DENSE, "trainer.devices=2", "trainer.strategy=ddp", "data.document_mask=true"],
    "ddp_moe": [*MOE, "trainer.devices=2", "trainer.strategy=ddp"],
}  # fmt: skip


def made_text() -> str:
    """600 documents as .jsonl: 2 to 60 words of a small vocabulary, in some order."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(60)]
    lines = []
    for _ in range(600):
        word, text = 0, []
        for _ in range(draw.randint(2, 60)):
            word = (word * 7 + draw.choice((1, 2, 5))) % len(words)
            text.append(words[word])
        lines.append(json.dumps({"text": " ".join(text)}))
    return "\n".join(lines) + "\n"


def overrides(case: str, folder: Path, data: Path) -> list[str]:
    places = [f"data.paths={data / 'text.jsonl'}", f"paths.cache_dir={data / 'cache'}"]
    return [*COMMON, *CASES[case], *places, f"paths.output_dir={folder}"]


def train_all(tree: Path, output: Path, data: Path, cases: list[str]) -> None:
    """Run in the child: train every case with the code of ``tree``, into ``output/CASE``."""
    import mtp_lightning

    if not Path(mtp_lightning.__file__).is_relative_to(tree):
        raise RuntimeError(f"{mtp_lightning.__file__} was imported, which is not of {tree}")
    for case in cases:
        print(f"{tree.name}: {case}", file=sys.stderr, flush=True)
        partial = output / f"{case}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / "log").open("w", encoding="utf-8") as log:
            try:
                (by_command_line if "ddp" in case else in_process)(tree, case, partial, data, log)
            except Exception:  # the other cases run, and the table shows this one as failed
                traceback.print_exc(file=log)
                continue
        partial.rename(output / case)


def in_process(tree: Path, case: str, folder: Path, data: Path, log: Any) -> None:
    """One run in this process: importing Lightning takes longer than most of them."""
    from hydra import compose, initialize_config_dir

    from mtp_lightning.experiment.training import train

    with initialize_config_dir(str(tree / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=overrides(case, folder, data))
    with redirect_stdout(log), redirect_stderr(log):
        train(cfg)


def by_command_line(tree: Path, case: str, folder: Path, data: Path, log: Any) -> None:
    """One run of several processes."""
    words = [*overrides(case, folder, data), f"run_dir={folder}"]
    command = [sys.executable, str(tree / "train.py"), *words]
    subprocess.run(command, stdout=log, stderr=log, cwd=folder, check=True)


def read(folder: Path) -> dict[str, dict[int, str]]:
    """The compared columns of a run's ``metrics.csv``: tag -> step -> the number's text.

    The file's floats are written by ``repr``: equal texts are equal bits.
    """
    columns: dict[str, dict[int, str]] = {}
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for tag, text in row.items():
                if text and tag.startswith(COMPARED):
                    columns.setdefault(tag, {})[int(row["step"])] = text
    return columns


def compare(base: Path, tree: Path) -> dict[str, Any]:
    """One row of the table: how many numbers were compared, and the first that differs."""
    for name, folder in (("base", base), ("tree", tree)):
        if not (folder / "metrics.csv").is_file():
            log = folder.with_name(f"{folder.name}.partial") / "log"
            lines = log.read_text(encoding="utf-8").strip().splitlines() if log.is_file() else []
            return {"verdict": "failed", "first": f"{name}: {lines[-1] if lines else 'not run'}"}
    before, after = read(base), read(tree)
    row: dict[str, Any] = {"numbers": sum(len(column) for column in before.values())}
    for tag in sorted(before.keys() ^ after.keys()):
        where = "base" if tag in before else "tree"
        return row | {"verdict": "differs", "first": f"{tag} is in the {where} alone"}
    steps = sorted({step for column in before.values() for step in column})
    for step in steps:
        for tag, column in before.items():
            old, new = column.get(step), after[tag].get(step)
            if old != new:
                first = f"{tag} at step {step}: {old} -> {new}"
                return row | {"verdict": "differs", "first": first}
    if not any(tag.startswith("train/") for tag in before) or len(steps) < STEPS:
        return row | {"verdict": "failed", "first": f"only {len(steps)} steps were logged"}
    return row | {"verdict": "identical"}


def run_child(tree: Path, output: Path, data: Path, cases: list[str]) -> None:
    """Train the cases in a child that imports the code of ``tree``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HYDRA_")}
    environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    task = json.dumps([str(tree), str(output), str(data), cases])
    subprocess.run(  # -P: the child does not import the files next to this one
        [sys.executable, "-P", str(Path(__file__).resolve()), "--child", task],
        env=environment,
        cwd=tree,
        check=True,
    )


def commit_of(base: str) -> str:
    """The full name of a commit.

    Raises:
        RuntimeError: no commit has this name.
    """
    words = ["git", "rev-parse", "--verify", f"{base}^{{commit}}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"--base {base} is not a commit of this repository.")
    return done.stdout.strip()


def built_tree(commit: str) -> Path:
    """A commit's files in the cache folder, and their C++, whose rounding PyTorch does not have."""
    from data_modules.cache import cache_folder

    python, torch = sys.version_info, importlib.metadata.version("torch")
    tree = cache_folder() / "trees" / f"{commit[:12]}-py{python[0]}.{python[1]}-torch{torch}"
    if tree.is_dir():
        return tree
    print(f"building the C++ of {commit[:12]}", file=sys.stderr, flush=True)
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit], cwd=ROOT, capture_output=True, check=True
    )
    tree.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=tree.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(partial, filter="data")
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        subprocess.run(build, cwd=partial, env=quiet, check=True, capture_output=True)
        partial.rename(tree)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return tree


def kept(commit: str, case: str, versions: str) -> Path:
    """The cache folder of the base's run of a case, which depends on settings and versions."""
    from data_modules.cache import cache_folder

    native = os.environ.get("MTP_LIGHTNING_NATIVE", "built")
    said = json.dumps([made_text(), COMMON, CASES[case], versions, native])
    key = hashlib.sha256(said.encode()).hexdigest()[:12]
    return cache_folder() / "same_bits" / commit / key / case


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print the table; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_bits", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--base", default=BASE, help=f"a commit; default {BASE}")
    parser.add_argument("--only", type=lambda text: text.split(","), help="NAME,.. of the cases")
    parser.add_argument("--again", action="store_true", help="train the base even if it is kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        tree, output, data, cases = json.loads(options.child)
        train_all(Path(tree), Path(output), Path(data), cases)
        return 0

    cases = options.only or list(CASES)
    if unknown := sorted(set(cases) - CASES.keys()):
        parser.error(f"no case {', '.join(unknown)}: choose among {', '.join(CASES)}")
    try:
        commit = commit_of(options.base)[:12]
    except RuntimeError as error:
        parser.error(str(error))

    import torch  # only for its version: both trees train in children

    from mtp_lightning.system import processor

    versions = f"{torch.__version__} {processor()}"
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        (data / "text.jsonl").write_text(made_text(), encoding="utf-8")
        base = {case: kept(commit, case, versions) for case in cases}
        missing = [case for case in cases if options.again or not base[case].is_dir()]
        if missing:
            output = data / "base"
            run_child(built_tree(commit), output, data, missing)
            for case in missing:
                if not (output / case).is_dir():
                    base[case] = output / case
                    continue
                base[case].mkdir(parents=True, exist_ok=True)
                shutil.copy(output / case / "metrics.csv", base[case])
        run_child(ROOT, data / "tree", data, cases)
        rows = [{"case": case, **compare(base[case], data / "tree" / case)} for case in cases]
    print(f"{STEPS} steps by {commit} and by the working tree: numbers compared, first difference")
    for row in rows:
        numbers, first = row.get("numbers", 0), row.get("first", "")
        print(f"  {row['case']:<30}{row['verdict']:<11}{numbers:>7,}  {first}".rstrip())
    same = sum(row["verdict"] == "identical" for row in rows)
    print(f"{same} of {len(rows)} configurations are identical to the last bit.")
    return 0 if same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
