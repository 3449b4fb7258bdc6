"""``mtp=teacherless``: a model that does not read the answers that it learns to give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_modules.tasks import MQAR, Copy
from data_modules.tasks.answers import AnswerSet
from data_modules.windows import WindowBatch
from mtp_lightning.decoding.answers import ModelOutputs, generate_scored
from mtp_lightning.decoding.generate import generate
from mtp_lightning.mtp.teacherless import DUMMY
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build

TASK = Copy(letters=8, shortest=4, periods=4)


def answers(task: Any = TASK, n: int = 6) -> WindowBatch:
    return AnswerSet(task, n, depth=0).batch(torch.arange(n).numpy())


def test_the_model_reads_a_dummy_in_place_of_the_answer(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "teacherless").eval()
    plain = build(tiny_trunk, "none").eval()
    batch = answers()
    hidden = model(batch)[0]
    dummies = batch.tokens.masked_fill(batch.scored, DUMMY)
    assert torch.equal(hidden, plain(WindowBatch(dummies, 0))[0])
    # No state depends on the answer.
    changed = batch.tokens.masked_fill(batch.scored, 5)
    assert torch.equal(hidden, model(WindowBatch(changed, 0, None, batch.scored))[0])
    # The targets are the true ones.
    targets = batch.targets(0)[batch.valid(0)]
    assert targets.tolist() == batch.tokens[batch.scored].tolist()


def test_questions_between_answers_are_read(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "teacherless")
    batch = answers(MQAR(pairs=3, slots=8, keys=6, values=6))
    read = model.mtp.tokens_read(batch.tokens, batch.scored)
    assert torch.equal(read[~batch.scored], batch.tokens[~batch.scored])


def test_the_model_answers_at_once_and_cannot_generate(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "teacherless").eval()
    batch = answers()
    forced_BW = ModelOutputs(model, batch, lambda: torch.empty(0)).forced_BW
    assert torch.equal(generate_scored(model, batch), forced_BW)
    with pytest.raises(ValueError, match="mtp=teacherless predicts a task's whole answer at once"):
        generate(model, [[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(ValueError, match="mtp=teacherless needs a task"):
        model(WindowBatch(torch.ones(1, 5, dtype=torch.int64), 0))
