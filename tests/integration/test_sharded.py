"""``trainer.strategy=fsdp``: a sharded model trains, decodes and resumes as an unsharded one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import ROOT, checkpoint, execute, rows, train_here, typed, weights
from tests.integration.several import run_all

TWO = typed("trainer.devices=2 trainer.strategy=fsdp data.batch_size=4")
FOUR = typed("trainer.devices=4 trainer.strategy=fsdp data.batch_size=2")
COPIES = FOUR | {"trainer.shard_size": 2}
IN_PARTS = {"trainer.split_checkpoint_gb": 0}
ALONE = {"data.batch_size": 8}
# Steps that follow a validation with decoding.
COMMON = typed(
    "trainer.max_steps=4 trainer.val_check_interval=2 model.n_layers=2 "
    "callbacks.speculative_eval.n_prompts=1 callbacks.speculative_eval.new_tokens=8 "
    "callbacks.speculative_eval.prompt_tokens=4"
)
MOE = typed(
    "model=deepseek_nano model.n_kv_heads model.attention.kv_rank=12 model.attention.d_nope=8 "
    "model.attention.d_rope=4 model.attention.d_value=8 model.feed_forward.n_routed=4 "
    "model.feed_forward.d_expert=16 model.feed_forward.sequence_loss=0.01"
)
TASK = helpers.NO_TEXT | typed("data=star_graph data.examples=400 data.eval_examples=24")
MASKED = typed("data.document_mask=true data.source.documents=1200")
CASES: dict[str, dict[str, Any]] = {
    # Independent switches share a run.
    "untied": typed(
        "model.tie_embeddings=false model.recompute=true +model.attention.qk_norm=true"
    ),
    "parallel": typed("mtp=parallel"),
    "long_range": typed("callbacks=[default,long_range]"),
    "linear": typed("mtp=linear mtp.correction=mlp balance=uncertainty"),
    "selector": typed("mtp=parallel mtp.correction=selector mtp.correction_rank=8"),
    "parameter_free": {"mtp": "parameter_free", **TASK},
    "shared_layers": typed(
        "mtp.share_layers=true mtp.hidden_state_mixing=true lambda_schedule=forward_curriculum"
    ),
    "nextlat": typed("mtp=nextlat"),
    "eagle": typed("mtp=eagle mtp.draft_vocab=60"),
    "masked": typed("mtp=masked"),
    "dflash": typed("mtp=dflash"),
    "bag": typed("mtp=bag mtp.depth"),
    "teacher": typed("objective=kl objective.confidence=true"),
    "teacher_parallel": typed("mtp=parallel objective=js"),
    "experts": MOE | MASKED,
    "muon": typed("optimizer=muon optimizer.lr"),
    "double": typed("trainer.precision=64-true mtp.detach=all"),
}
ACCUMULATED = {"untied", "experts"}
SPLIT = typed("data.batch_size=2 trainer.accumulate_grad_batches=2")


def assert_same_run(run: Path, reference: Path) -> None:
    """Every column of every row, and a checkpoint of the same form."""
    helpers.assert_near_rows(run, reference)
    assert form(checkpoint(run)) == form(checkpoint(reference))


def form(content: dict[str, Any]) -> dict[str, Any]:
    """The keys, shapes and dtypes of a checkpoint."""
    weights_form = {name: (t.shape, t.dtype) for name, t in content["state_dict"].items()}
    state = content["optimizer_states"][0]
    parts = {"": state} if "state" in state else state  # several optimizers, by name
    state_form = {
        (part, number): {name: (t.shape, t.dtype) for name, t in entry.items()}
        for part, part_state in parts.items()
        for number, entry in part_state["state"].items()
    }
    groups = [
        group["params"] for part_state in parts.values() for group in part_state["param_groups"]
    ]
    return {"keys": set(content), "weights": weights_form, "state": state_form, "groups": groups}


@pytest.mark.slow
def test_lightnings_launcher_with_masks_and_accumulation_equals_one_process(tmp_path, cache):
    """Also with decoding at validation."""
    helpers.train_apart(tmp_path / "two", cache, COMMON | MASKED | TWO | SPLIT)
    train_here(tmp_path / "one", cache, COMMON | MASKED | ALONE)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    names = ("decode/tokens_per_step", "val/loss_depth_2", "train/grad_norm")
    assert set(names) <= set().union(*rows(tmp_path / "two"))
    left, right = weights(tmp_path / "two"), weights(tmp_path / "one")
    torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_checkpoints_in_parts_equal_whole_files(tmp_path: Path, cache: Path) -> None:
    """Checkpoints are written at every step while training continues, and every app reads them."""
    common = COMMON | TWO | {"callbacks.checkpoints.every_n_steps": 1}
    runs = {"parts": common | IN_PARTS, "files": common}
    run_all(tmp_path, cache, runs, processes=2)
    run = tmp_path / "parts"
    assert rows(run) == rows(tmp_path / "files")
    keys = ("state_dict", "optimizer_states", "loops", "callbacks", "global_step", "model_config")
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        one, other = checkpoint(run, name), checkpoint(tmp_path / "files", name)
        for key in keys:
            helpers.assert_equal(one[key], other[key], key)
        file = run / "checkpoints" / name
        assert file.stat().st_size < (tmp_path / "files" / "checkpoints" / name).stat().st_size / 4
    folders = {path.relative_to(run / "checkpoints").as_posix()[:14] for path in run.rglob("*.pt")}
    assert folders == {"parts/00000003", "parts/00000004"}  # those of last and previous
    apps = {"generate.py": "prompt=a", "evaluate.py": "output=OUT", "export.py": "output=OUT"}
    for app, more in apps.items():
        argument = more.replace("OUT", str(tmp_path / f"of-{app}"))
        execute([sys.executable, str(ROOT / app), f"checkpoint={run}", argument], code=0)
    shutil.rmtree(run / "checkpoints" / "parts")
    last = run / "checkpoints" / "last.ckpt"
    generate = [sys.executable, str(ROOT / "generate.py"), f"checkpoint={last}", "prompt=a"]
    assert "copy the folder parts/ along" in execute(generate, code=1).stderr


@pytest.fixture(scope="session")
def two(once: Once, cache: Path) -> Path:
    """Every case, by two processes."""

    def make(folder: Path) -> None:
        split = {name: SPLIT for name in ACCUMULATED}
        runs = {name: COMMON | case | TWO | split.get(name, {}) for name, case in CASES.items()}
        ddp = {"trainer.strategy": "ddp"}
        runs["bf16"], runs["bf16_ddp"] = COMMON | BF16 | TWO, COMMON | BF16 | TWO | ddp
        run_all(folder, cache, runs, processes=2)

    return once("sharded-two", make)


# It rounds so coarsely that data-parallel runs, too, agree with one process in few digits only.
BF16 = MOE | {"trainer.precision": "bf16-mixed"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path: Path, cache: Path, two: Path, case: str) -> None:
    train_here(tmp_path / "one", cache, COMMON | CASES[case] | ALONE)
    assert_same_run(two / case, tmp_path / "one")


# Starts from a trained run: with its trunk, with its frozen trunk, and with its modules.
STARTED: dict[str, dict[str, Any]] = {
    "new_modules": {"mtp": "parallel"},
    "frozen": {"mtp": "sequential", "mtp.freeze_trunk": "true", "mtp.init": "last_block"},
    "frozen_linear": {"mtp": "linear", "mtp.freeze_trunk": "true"},
    "all_kept": {"mtp.depth": 1},
}


@pytest.fixture(scope="session")
def started(once: Once, cache: Path) -> Path:
    """A trained run, and the runs of two processes that start from it."""

    def make(folder: Path) -> None:
        plain = typed("mtp=none mtp.depth data.batch_size=8")
        train_here(folder / "none", cache, COMMON | plain)
        train_here(folder / "one_module", cache, COMMON | ALONE | {"mtp.depth": 1})
        runs = {name: COMMON | case | TWO | start(folder, name) for name, case in STARTED.items()}
        run_all(folder, cache, runs, processes=2)

    return once("sharded-started", make)


def start(folder: Path, case: str) -> dict[str, Any]:
    """Where a case starts from."""
    return {"init_from": folder / ("one_module" if case == "all_kept" else "none")}


@pytest.mark.slow
@pytest.mark.parametrize("case", STARTED)
def test_init_from_in_two_processes_equals_one_process(tmp_path, cache, started, case):
    train_here(tmp_path / "one", cache, COMMON | STARTED[case] | ALONE | start(started, case))
    assert_same_run(started / case, tmp_path / "one")
    initial = weights(started / ("one_module" if case == "all_kept" else "none"))
    trunk = {name for name in initial if name.startswith("model.trunk.")}
    final = weights(started / case)
    unchanged = {name for name in trunk if torch.equal(final[name], initial[name])}
    assert unchanged == (trunk if case.startswith("frozen") else set())


@pytest.mark.slow
def test_sharded_bf16_is_near_data_parallel_training(two: Path) -> None:
    left, right = rows(two / "bf16"), rows(two / "bf16_ddp")
    for one, other in zip(left, right, strict=True):
        losses = [tag for tag in other if "/loss" in tag]
        assert len(losses) >= 3
        assert [one[t] for t in losses] == pytest.approx([other[t] for t in losses], rel=2e-3)
    assert form(checkpoint(two / "bf16")) == form(checkpoint(two / "bf16_ddp"))


KINDS: dict[str, dict[str, Any]] = {
    "one": ALONE,
    "ddp2": TWO | {"trainer.strategy": "ddp"},
    "fsdp2": TWO,
    "fsdp4": FOUR,
    "hsdp4": COPIES,
    "parts2": TWO | IN_PARTS,
    "parts4": COPIES | IN_PARTS,
}
PROCESSES = {name: int(name[-1]) if name != "one" else 1 for name in KINDS}
# The kinds whose first halves each kind continues.
CONTINUES = {
    "one": "fsdp2 fsdp4 hsdp4 parts2",
    "ddp2": "fsdp2 hsdp4 parts2",
    "fsdp2": "one ddp2 fsdp2 fsdp4 parts2",
    "fsdp4": "one fsdp2 hsdp4 parts2",
    "hsdp4": "one fsdp4 hsdp4",
    "parts2": "parts2 parts4",
    "parts4": "one parts2 parts4",
}
WAYS = [(before, after) for after, kinds in CONTINUES.items() for before in kinds.split()]


@pytest.fixture(scope="session")
def resumed(once: Once, cache: Path) -> Path:
    """Whole runs of every kind, and their first halves continued by another kind."""

    def make(folder: Path) -> None:
        # best.ckpt would be saved between the two checkpoints.
        common = COMMON | typed(
            "trainer.max_steps=8 callbacks.checkpoints.every_n_steps=4 "
            "callbacks.checkpoints.monitor=null"
        )
        for n in (2, 4):
            kinds = {k: common | s for k, s in KINDS.items() if PROCESSES[k] == n}
            run_all(folder, cache, kinds, processes=n)
        train_here(folder / "one", cache, common | KINDS["one"])
        for before, after in WAYS:
            halfway = folder / f"{before}_{after}" / "checkpoints"
            halfway.mkdir(parents=True)
            shutil.copy(folder / before / "checkpoints" / "previous.ckpt", halfway / "last.ckpt")
            if "parts" in before:
                shutil.copytree(folder / before / "checkpoints" / "parts", halfway / "parts")
            shutil.copy(folder / before / "metrics.csv", halfway.parent)
            if after == "one":
                train_here(halfway.parent, cache, common | KINDS["one"])
        for n in (2, 4):
            runs = {f"{b}_{a}": common | KINDS[a] for b, a in WAYS if PROCESSES[a] == n}
            run_all(folder, cache, runs, processes=n)

    return once("sharded-resumed", make)


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "one"])
def test_every_kind_of_sharding_trains_as_one_process(resumed: Path, kind: str) -> None:
    assert checkpoint(resumed / kind, "previous.ckpt")["global_step"] == 4
    assert_same_run(resumed / kind, resumed / "one")


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), WAYS)
def test_a_run_resumes_under_another_kind_of_sharding(resumed, before, after):
    run = resumed / f"{before}_{after}"
    assert_same_run(run, resumed / "one")
    if before == after:  # exactly
        helpers.assert_same_run(run, resumed / after)


@pytest.mark.slow
def test_a_shard_size_that_does_not_divide_the_processes_is_refused(tmp_path, cache):
    args = helpers.command(tmp_path / "run", cache, COMMON | TWO | {"trainer.shard_size": 3})
    error = execute(args, code=1).stderr
    assert "trainer.shard_size=3 does not divide the 2 processes" in error
