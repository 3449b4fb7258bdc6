"""``mtp.stride``: depth k predicts the token s k positions beyond the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.metrics.rates import DepthRates
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build

every_head = pytest.mark.parametrize("variant", ["parallel", "linear"])


def strided_windows(rows: int, seq_len: int, depth: int, stride: int) -> WindowBatch:
    """Windows with documents and unscored tokens."""
    generator = torch.Generator().manual_seed(2)
    shape = (rows, seq_len + stride * depth + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    documents = (torch.rand(shape, generator=generator) < 0.1).long().cumsum(1)
    scored = torch.rand(shape, generator=generator) < 0.8
    return WindowBatch(tokens, depth, documents, scored, stride=stride)


def strided_and_dense(trunk: TrunkConfig, variant: str) -> tuple[MTPModel, MTPModel]:
    """A model with two heads of stride 3, and one with six of stride 1: the third and the sixth
    have the weights of the first two."""
    kind = MTPConfig.find(variant)
    strided, dense = build(trunk, kind(depth=2, stride=3)), build(trunk, kind(depth=6))
    state = dense.state_dict()
    for name in strided.state_dict():
        if name.startswith("mtp."):
            head = int(name.split(".")[2])
            state[name] = state.pop(name.replace(f"depths.{head}.", f"depths.{3 * head + 2}."))
    strided.load_state_dict({n: t for n, t in state.items() if n in strided.state_dict()})
    return strided, dense


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 6))
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
    assert batch.counts().tolist() == deep.counts().tolist()[::stride]
    for part in batch.micro_batches(2):
        assert part.stride == stride and part.seq_len == seq_len


@every_head
def test_rates_are_those_of_heads_of_stride_1_for_the_same_tokens(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    strided, dense = strided_and_dense(tiny_trunk, variant)
    batch = strided_windows(3, 10, 2, 3)
    deep = WindowBatch(batch.tokens, 6, batch.documents, batch.scored)
    values = {}
    for model, windows in ((strided, batch), (dense, deep)):
        rates = DepthRates(model.depth)
        with torch.no_grad():
            rates.update(model, windows, model(windows))
        values[model] = rates.compute()
    for name in ("loss", "accuracy", "agreement", "overlap"):
        for k in (1, 2):
            expected = values[dense][f"{name}_depth_{3 * k}"]
            assert values[strided][f"{name}_depth_{k}"] == expected


@every_head
def test_strided_heads_do_not_draft(tiny_trunk: TrunkConfig, variant: str) -> None:
    model = build(tiny_trunk, variant, depth=2, stride=2).eval()
    assert model.mtp.max_draft_depth == 0 and not model.mtp.reads_tokens
    (plain,) = generate(model, [[1, 2, 3]], max_new_tokens=5)
    assert len(plain.token_ids) == 5 and plain.verify_passes == 4
    with pytest.raises(ValueError, match="mtp.stride=2 predicts one token in 2 "):
        generate(model, [[1, 2, 3]], max_new_tokens=5, draft_depth=1)
    with pytest.raises(ValueError, match="built for mtp.stride=2"):
        strided_windows(1, 4, 2, 2).require_depth(2)
