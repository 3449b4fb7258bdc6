"""``mtp=teacherless`` in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.helpers import train_here

TRAINED = {
    "data": "copy",
    "data.task.letters": 3,
    "data.task.shortest": 2,
    "data.task.periods": 2,
    "data.task.held_out": "null",
    "data.eval_examples": 32,
    "data.eval_bytes": None,
    "data.val_fraction": None,
    "data.seq_len": None,
    "tokenizer": None,
    "mtp": "teacherless",
    "mtp.depth": None,
    "lambda_schedule": "constant",
}


def test_it_learns_from_the_question_alone(tmp_path: Path, cache: Path) -> None:
    more = {"trainer.max_steps": 250, "trainer.val_check_interval": 250, "data.batch_size": 32}
    summary = train_here(tmp_path / "run", cache, {**TRAINED, **more, "optimizer.lr": 0.01})
    assert summary["val/exact_match"] > 0.9 > 4 * summary["val/chance"]


@pytest.mark.parametrize("settings", [{**TRAINED, "data.train_prompt": "true"}, None])
def test_it_needs_answers(tmp_path: Path, cache: Path, settings: dict | None) -> None:
    settings = settings or {"mtp": "teacherless", "mtp.depth": None}
    with pytest.raises(ValueError, match="mtp=teacherless is not shown what it is to say"):
        train_here(tmp_path / "run", cache, settings)
