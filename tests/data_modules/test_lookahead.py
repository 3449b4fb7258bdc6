"""Windows with more look-ahead targets than their depth needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_modules.data_module import TokenDataModule
from data_modules.sources.synthetic import SyntheticSource
from data_modules.tasks import Copy
from data_modules.tasks.data_module import TaskDataModule
from data_modules.tokenizers import ByteTokenizer
from tests.models import target_counts


def text_module(cache: Path, **options: int) -> TokenDataModule:
    source = SyntheticSource(size=6000, documents=40)
    data = TokenDataModule(
        source, ByteTokenizer(), seq_len=8, batch_size=2, depth=1, cache_dir=cache,
        eval_bytes=200, document_mask=True, **options,
    )  # fmt: skip
    data.prepare()
    return data


@pytest.mark.parametrize(("lookahead", "ahead"), [(0, 2), (1, 2), (2, 2), (5, 5), (9, 9), (50, 9)])
def test_text_windows_look_ahead(tmp_path: Path, lookahead: int, ahead: int) -> None:
    data, plain = text_module(tmp_path, lookahead=lookahead), text_module(tmp_path)
    tokens = data.store["train"].tokens()
    dataset, plain_dataset = data.train_dataloader().dataset, plain.train_dataloader().dataset
    assert len(dataset) == len(plain_dataset)  # the same windows, with more tokens
    numbers = np.array([0, 3, len(dataset) - 1])
    batch, short = dataset[numbers], plain_dataset[numbers]
    assert batch.seq_len == 8 and batch.tokens.shape == (3, 8 + ahead)
    for row, number in zip(batch.tokens, numbers, strict=True):
        assert row.tolist() == tokens[number * 8 : number * 8 + 8 + ahead].tolist()
    for k in (0, 1):
        assert batch.targets(k).equal(short.targets(k))
    assert batch.documents is not None
    assert target_counts(batch).equal(target_counts(short))
    parts = batch.micro_batches(3)
    assert all(part.seq_len == 8 and part.extra == batch.extra for part in parts)
    last = len(data.evaluation) - 1
    evaluated, shorter = data.evaluation[np.array([0, last])], plain.evaluation[np.array([0, last])]
    assert evaluated.seq_len == 8 and evaluated.tokens.shape == (2, 8 + ahead)
    assert evaluated.tokens[:, :10].equal(shorter.tokens[:, :10])
    assert evaluated.scored is not None and not evaluated.scored[1, -1]  # padding


def test_the_stride_reaches_tokens_that_a_head_looks_at_anyway(tmp_path: Path) -> None:
    source = SyntheticSource(size=6000, documents=40)
    data = TokenDataModule(source, ByteTokenizer(), seq_len=8, depth=2, stride=2, lookahead=9,
                           cache_dir=tmp_path, eval_bytes=200)  # fmt: skip
    data.prepare()
    batch = data.train_dataloader().dataset[np.array([0])]
    assert batch.tokens.shape == (1, 8 + 9) and batch.extra == 4


def test_task_windows_look_ahead() -> None:
    task = Copy(letters=3, shortest=2, periods=2)
    data, plain = (TaskDataModule(task, depth=1, lookahead=n, seq_len=14) for n in (40, 0))
    numbers = np.array([0, 1])
    batch, short = (d.train_dataloader().dataset[numbers] for d in (data, plain))
    assert batch.seq_len == short.seq_len == 14 and batch.tokens.shape == (2, 14 + 15)
    assert batch.tokens[:, :16].equal(short.tokens) and batch.extra == 13
    assert batch.scored is not None and not batch.scored[:, 16:].any()
    assert batch.documents is not None and batch.documents.shape == batch.tokens.shape
