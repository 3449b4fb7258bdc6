"""The CPU attention against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtp_lightning.cpu.attention import _BLOCK, _MAX_SEQ_LEN, attention, fits


@pytest.mark.parametrize(
    ("seq_len", "n_heads", "n_kv"),
    [(1, 4, 2), (_BLOCK - 1, 1, 1), (_BLOCK, 4, 4), (_BLOCK + 1, 6, 1), (3 * _BLOCK + 5, 4, 2)],
)
def test_values_and_gradients(seq_len: int, n_heads: int, n_kv: int) -> None:
    batch, d_head = 2, 8
    fused = torch.randn(batch, seq_len, n_heads + n_kv, d_head)  # as RoPE hands them on: strided
    query, key = fused.split([n_heads, n_kv], dim=2)
    value = torch.randn(batch, seq_len, n_kv, d_head)
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]

    found = attention(*inputs, None)
    q, k, v = (t.transpose(1, 2) for t in exact)
    k, v = (t.repeat_interleave(n_heads // n_kv, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / d_head**0.5
    scores = scores.masked_fill(torch.ones(seq_len, seq_len).triu(1).bool(), -torch.inf)
    expected = (torch.softmax(scores, -1) @ v).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    grad = torch.randn(found.shape)
    pairs = zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_where_it_is_used() -> None:
    assert fits(torch.empty(1, _MAX_SEQ_LEN, 1, 2))
    assert not fits(torch.empty(1, _MAX_SEQ_LEN + 1, 1, 2))
    assert not fits(torch.empty(1, 4, 1, 2, dtype=torch.bfloat16))
    long = torch.randn(1, 1, 4, 8)
    assert torch.allclose(
        attention(*(long.transpose(1, 2),) * 3, None).transpose(1, 2),
        F.scaled_dot_product_attention(long, long, long, is_causal=True),
        atol=1e-6,
    )
