"""``mtp=top``, ``bag`` and ``registers`` in real runs: trained, resumed, split, evaluated, decoded,
exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_lightning.experiment.generating import generate_text
from mtp_lightning.interop.exporting import export
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.opening import open_model
from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import DDP, column, composed, evaluated, rows, train_here, typed
from tests.integration.several import run_all

pytestmark = pytest.mark.slow

HEADS = ("top", "bag", "registers")
SUMMARIES = ("top", "bag")  # the heads with a validation loss


class Squared(Term):
    """An objective of depths that predict a token."""

    name = "squared"

    def value(self, chunk: Chunk) -> Tensor:
        return chunk.log_probs_RV[:, 0].square()


def text(head: str) -> dict[str, Any]:
    """A quick run on text with a document mask."""
    # Documents of about 100 bytes end within windows.
    return typed(
        f"mtp={head} mtp.depth=1 mtp.lookahead=6 data.document_mask=true "
        "data.source.documents=600 callbacks.checkpoints.every_n_steps=5"
    )


@pytest.fixture
def run(once: Once, cache: Path, head: str) -> Path:
    """A run on text of each head."""
    return once(f"text-{head}", lambda folder: train_here(folder, cache, text(head)))


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_logged_and_evaluate_repeats_them(run: Path, head: str) -> None:
    summary = helpers.summary_of(run)
    table = rows(run)
    assert all(row["train/loss_depth_1"] > 0 and row["train/lambda_depth_1"] > 0 for row in table)
    for row in table:
        total = row["train/loss_depth_0"] + row["train/lambda_depth_1"] * row["train/loss_depth_1"]
        assert row["train/loss"] == pytest.approx(total, rel=1e-5)
    assert table[-1]["train/loss_depth_1"] < table[0]["train/loss_depth_1"]
    measured = {tag: value for tag, value in summary.items() if tag.startswith("val/")}
    further = {"val/loss_depth_1"} if head in SUMMARIES else set()
    by_depth = {tag for tag in measured if "_depth_" in tag}
    assert by_depth == {"val/loss_depth_0", "val/accuracy_depth_0", *further}
    assert all(value == value for value in measured.values())
    assert summary["mtp_predicts_tokens"] is False and summary["mtp_reads_tokens"] is False
    assert summary["flops"] == summary["step"] * 4 * 16 * summary["flops_per_token"]
    assert not any(tag.startswith("decode/acceptance") for tag in summary)
    again = evaluated(run / "checkpoints" / "last.ckpt")
    assert {tag: again[tag] for tag in measured} == measured
    # Evaluation still measures the main prediction's use of context.
    assert "val/loss_position_1" in again and "val/loss_position_1_depth_1" not in again
    if head == "bag":
        weights_V = helpers.checkpoint(run)["state_dict"]["model.mtp.weights_V"]
        assert weights_V.min() >= 1 and len(set(weights_V.tolist())) > 10
        model = open_model(run).model
        assert torch.equal(model.mtp.weights_V, weights_V)


@pytest.mark.parametrize("head", HEADS)
def test_a_run_resumes_exactly(tmp_path: Path, cache: Path, run: Path, head: str) -> None:
    helpers.resume_from_previous(run, tmp_path / "again", cache, text(head))


def test_accumulation_and_two_processes_change_nothing(tmp_path: Path, cache: Path) -> None:
    exact = {head: text(head) | {"trainer.precision": "64-true"} for head in HEADS}
    split = {"data.batch_size": 1, "trainer.accumulate_grad_batches": 4}
    runs = {f"{head}-two": exact[head] | DDP | {"data.batch_size": 2} for head in HEADS}
    run_all(tmp_path, cache, runs, processes=2)
    for head in HEADS:
        whole = tmp_path / f"{head}-whole"
        train_here(whole, cache, exact[head])
        train_here(tmp_path / f"{head}-split", cache, exact[head] | split)
        for way in ("split", "two"):
            helpers.assert_near_rows(tmp_path / f"{head}-{way}", whole, rel=1e-7)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_trains_on_a_task(tmp_path: Path, cache: Path, head: str) -> None:
    more = {"mtp": head, "mtp.depth": None, "mtp.lookahead": 5}
    more |= {"mtp.weights": "none"} if head == "bag" else {}
    summary = train_here(tmp_path, cache, helpers.TASK | more)
    assert "val/exact_match" in summary
    assert ("val/loss_depth_1" in summary) == (head in SUMMARIES)
    again = evaluated(tmp_path / "checkpoints" / "last.ckpt")
    assert all(again[t] == v for t, v in summary.items() if t.startswith("val/"))


@pytest.mark.parametrize("head", HEADS)
def test_generation_and_export_leave_the_head_out(tmp_path, run, head, capsys):
    overrides = [f"checkpoint={run}", "prompt=abc", "max_new_tokens=5", "accelerator=cpu"]
    (generation,) = generate_text(composed("generate", overrides))
    assert generation.new_tokens >= 1
    with pytest.raises(ValueError, match=f"mtp={head} shapes the trunk in training"):
        generate_text(composed("generate", [*overrides, "draft_depth=1"]))
    out = tmp_path / "exported"
    export(composed("export", [f"checkpoint={run}", f"output={out}", "verify=false"]))
    assert f"mtp={head} shaped the trunk in training" in capsys.readouterr().out
    whole, exported = open_model(run).model, open_model(out).model
    assert exported.depth == 0
    assert torch.equal(exported.trunk.embedding.weight, whole.trunk.embedding.weight)


def test_a_probe_on_a_frozen_trunk_trains_the_head_alone(tmp_path: Path, cache: Path) -> None:
    train_here(tmp_path / "plain", cache, text("top") | typed("mtp=none mtp.depth mtp.lookahead"))
    start = {"init_from": tmp_path / "plain", "mtp.freeze_trunk": "true"}
    summary = train_here(tmp_path / "probe", cache, text("top") | start)
    plain, probe = (open_model(tmp_path / name).model.trunk for name in ("plain", "probe"))
    helpers.assert_equal(plain.state_dict(), probe.state_dict())
    assert summary["parameters_trained"] == 32 * plain.config.vocab_size
    assert not column(tmp_path / "probe", "train/loss_depth_0")
    losses = list(column(tmp_path / "probe", "train/loss_depth_1").values())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("head", "rule"), [("top", "gradnorm"), ("bag", "cosine_gate"), ("registers", "gradnorm")]
)
def test_balance_rules_measure_the_heads_gradient(tmp_path, cache, head, rule):
    summary = train_here(tmp_path, cache, text(head) | {"balance": rule, "trainer.max_steps": 4})
    assert summary["step"] == 4
    assert any(tag.startswith("grad/") and "_depth_1" in tag for tag in rows(tmp_path)[-1])


@pytest.mark.parametrize(
    ("head", "match"), [("top", "flops"), ("bag", "parameters"), ("registers", "flops")]
)
def test_a_head_is_matched_in_flops_or_parameters(tmp_path, cache, head, match):
    more = {"compare.match": match, "model.n_layers": 3, "data.document_mask": "false"}
    summary = train_here(tmp_path, cache, text(head) | more)
    assert abs(summary["compare"]["remaining"]) < (0.6 if match == "parameters" else 0.1)


def test_an_objective_of_token_predictions_is_refused(tmp_path, cache):
    objective = {"objective._target_": "tests.integration.test_summaries.Squared"}
    with pytest.raises(ValueError, match="objective=squared .* mtp=top has its own loss"):
        train_here(tmp_path / "run", cache, text("top") | objective)
