"""``callbacks=gradient_conflict``: norms and cosines of the depths' gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import cache, once
from tests.integration.helpers import assert_same_weights, column, rows, train_here

__all__ = ["cache", "once"]

CONFLICT: dict[str, Any] = {
    "callbacks": "gradient_conflict",
    "callbacks.gradient_conflict.every_n_steps": 3,
}
TAGS = [
    *(f"grad/{group}norm_depth_{k}" for group in ("", "embedding_") for k in range(3)),
    *(f"grad/{group}cosine_depth_{k}" for group in ("", "embedding_") for k in (1, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mtp.hidden_state_mixing": "true", "trainer.accumulate_grad_batches": 2},
        {"trainer.precision": "64-true", "mtp": "parallel", "model.n_layers": 2},
        {"trainer.precision": "bf16-mixed"},
        {"mtp": "parameter_free", "trainer.log_every_n_steps": 2},
    ],
)
def test_training_is_the_same_to_the_last_bit(tmp_path, cache, settings):
    train_here(tmp_path / "with", cache, settings | CONFLICT)
    train_here(tmp_path / "without", cache, settings)
    logged = rows(tmp_path / "with")
    trained = [{t: v for t, v in row.items() if not t.startswith("grad/")} for row in logged]
    expected = {row["step"]: row for row in rows(tmp_path / "without")}
    assert [row for row in trained if row["step"] in expected] == list(expected.values())
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    for tag in TAGS:
        assert list(column(tmp_path / "with", tag)) == [3, 6, 9], tag
    norms, cosines = TAGS[:6], TAGS[6:]
    assert all(row[t] > 0 for row in logged if norms[0] in row for t in norms)
    assert all(-1.001 < row[t] < 1.001 for row in logged if norms[0] in row for t in cosines)


def test_every_step_has_one_row_next_to_another_callback(tmp_path: Path, cache: Path) -> None:
    """Lightning's monitor logs a learning rate in the row of the step before."""
    both = {**CONFLICT, "callbacks": "[gradient_conflict,learning_rate]"}
    train_here(tmp_path, cache, both)
    assert [row["step"] for row in rows(tmp_path)] == list(range(11))
    assert list(column(tmp_path, TAGS[0])) == [3, 6, 9]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_blocks_are_measured(tmp_path: Path, cache: Path) -> None:
    """Each task's backward pass goes through the same compiled trunk."""
    short = {**CONFLICT, "trainer.max_steps": 3}
    for name in ("true", "false"):
        train_here(tmp_path / name, cache, {**short, "trainer.compile": name})
    compiled, eager = (rows(tmp_path / name) for name in ("true", "false"))
    assert {t: compiled[-1][t] for t in TAGS} == pytest.approx(
        {t: eager[-1][t] for t in TAGS}, rel=1e-3, abs=1e-5
    )


def test_norms_equal_those_of_gradnorm(tmp_path: Path, cache: Path) -> None:
    train_here(tmp_path / "callback", cache, CONFLICT | {"trainer.max_steps": 3})
    rule = {"balance": "gradnorm", "balance.every_n_steps": 3, "trainer.max_steps": 3}
    train_here(tmp_path / "rule", cache, rule)
    for tag in TAGS[:3]:
        norms = column(tmp_path / "callback", tag)
        assert norms == pytest.approx(column(tmp_path / "rule", tag), rel=1e-6) and 3 in norms


def test_a_model_without_depths_logs_the_main_predictions_norm(tmp_path: Path, cache: Path) -> None:
    train_here(tmp_path, cache, CONFLICT | {"mtp": "none", "mtp.depth": 0})
    assert list(column(tmp_path, "grad/norm_depth_0")) == [3, 6, 9]
    assert column(tmp_path, "grad/norm_depth_1") == {}


def test_an_objective_over_all_depths_is_refused(tmp_path, cache):
    with pytest.raises(ValueError, match="callbacks=gradient_conflict .* objective=eal"):
        train_here(tmp_path / "run", cache, CONFLICT | {"objective": "eal"})
    assert not (tmp_path / "run" / "metrics.csv").exists()
