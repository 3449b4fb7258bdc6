"""``mtp.stride``: depth k predicts the token s k positions beyond the next."""

from __future__ import annotations

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build, target_counts


def strided_windows(rows: int, seq_len: int, depth: int, stride: int) -> WindowBatch:
    """Windows with documents and unscored tokens."""
    generator = torch.Generator().manual_seed(2)
    shape = (rows, seq_len + stride * depth + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    documents = (torch.rand(shape, generator=generator) < 0.1).long().cumsum(1)
    scored = torch.rand(shape, generator=generator) < 0.8
    return WindowBatch(tokens, depth, documents, scored, stride=stride)


@pytest.mark.parametrize(("stride", "depth", "seq_len"), [(1, 2, 4), (3, 2, 6), (4, 3, 1)])
def test_targets_are_those_of_deeper_windows(stride: int, depth: int, seq_len: int) -> None:
    batch = strided_windows(3, seq_len, depth, stride)
    deep = WindowBatch(batch.tokens, stride * depth, batch.documents, batch.scored)
    assert batch.seq_len == deep.seq_len == seq_len
    for k in range(depth + 1):
        assert torch.equal(batch.targets(k), deep.targets(stride * k))
        for row in range(3):
            for i in range(seq_len):
                target = int(batch.targets(k)[row, i])
                if target >= 0:
                    assert target == batch.tokens[row, i + 1 + stride * k]
    assert target_counts(batch).tolist() == target_counts(deep).tolist()[::stride]
    for part in batch.micro_batches(2):
        assert part.stride == stride and part.seq_len == seq_len


@pytest.mark.parametrize("variant", ["parallel", "linear"])
def test_strided_heads_do_not_draft(tiny_trunk: TrunkConfig, variant: str) -> None:
    model = build(tiny_trunk, variant, depth=2, stride=2).eval()
    assert model.mtp.max_draft_depth == 0 and not model.mtp.reads_tokens
    (plain,) = generate(model, [[1, 2, 3]], max_new_tokens=5)
    assert len(plain.token_ids) == 5 and plain.verify_passes == 4
    with pytest.raises(ValueError, match="mtp.stride=2 predicts one token in 2 "):
        generate(model, [[1, 2, 3]], max_new_tokens=5, draft_depth=1)
    with pytest.raises(ValueError, match="built for mtp.stride=2"):
        strided_windows(1, 4, 2, 2).require_depth(2)
