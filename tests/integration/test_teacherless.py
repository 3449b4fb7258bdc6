"""``mtp=teacherless`` in real runs."""

from __future__ import annotations

from pathlib import Path

from tests.integration.helpers import TASK, train_here


def test_it_learns_from_the_question_alone(tmp_path: Path, cache: Path) -> None:
    more = {"trainer.max_steps": 250, "trainer.val_check_interval": 250, "data.batch_size": 32}
    summary = train_here(tmp_path / "run", cache, {**TASK, **more, "optimizer.lr": 0.01})
    assert summary["val/exact_match"] > 0.9 > 4 * summary["val/chance"]
