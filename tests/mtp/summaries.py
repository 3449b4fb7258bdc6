"""Windows with tokens ahead, and what lies ahead of a position, found by looking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import own_values
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.mtp.feed import Together
from mtp_lightning.objective.stream import stream_loss
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy


def ahead_windows(
    rows: int,
    seq_len: int,
    lookahead: int,
    *,
    ids: int = 37,
    documents: bool = False,
    scored: bool = False,
    seed: int = 1,
) -> WindowBatch:
    """Random tokens below ``ids``, as many as a data module gives a head of this reach."""
    generator = torch.Generator().manual_seed(seed)
    extra = max(min(lookahead, seq_len + 1) - 2, 0)
    shape = (rows, seq_len + 2 + extra)
    starts = torch.rand(shape, generator=generator) < 0.2
    return WindowBatch(
        torch.randint(0, ids, shape, generator=generator),
        1,
        starts.cumsum(1) if documents else None,
        torch.rand(shape, generator=generator) < 0.6 if scored else None,
        extra=extra,
    )


def nearest(batch: WindowBatch, row: int, i: int, first: int, last: int) -> dict[int, int]:
    """Id -> places ahead of its nearest occurrence that counts, looked for one by one."""
    found: dict[int, int] = {}
    for ahead in range(first, last + 1):
        at = i + ahead
        if at >= batch.tokens.shape[1]:
            break
        if batch.documents is not None and batch.documents[row, at] != batch.documents[row, i]:
            break
        if batch.scored is None or batch.scored[row, at]:
            found.setdefault(int(batch.tokens[row, at]), ahead)
    return found


def own_loss(
    stack: MTPStack, hidden: Tensor, batch: WindowBatch, coefficient: float
) -> tuple[Tensor, Tensor]:
    """The loss of the stack's one depth: ``coefficient * sum``, and the plain sum."""
    loss = stack.own_loss(1, batch)
    assert loss is not None
    # The main prediction has no part in it.
    term, tokens = CrossEntropy(), batch.targets(0)
    targets = [DepthTarget(0, tokens, 0.0, term), DepthTarget(1, tokens, coefficient, term)]
    main, unused = torch.zeros_like(hidden), torch.zeros(2, hidden.shape[-1], dtype=hidden.dtype)
    total, sums = stream_loss(unused, Together(main, [(1, hidden)], {1: loss}), targets)
    return total, sums[1]


def assert_loss_is(
    model: MTPModel, batch: WindowBatch, reference: Callable[[Tensor, Tensor], tuple[Tensor, int]]
) -> None:
    """The loss of a head in double precision, its gradients, its count and its values are those of
    a reference.

    Args:
        model: whose head is meant.
        batch: windows of T = 7.
        reference: of hidden states and the head's weight: summed loss, and positions that count.
    """
    hidden = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    weight = model.mtp.head.weight
    loss, plain = own_loss(model.mtp, hidden, batch, 0.25)
    found = torch.autograd.grad(loss, [hidden, weight])
    expected, count = reference(hidden, weight)
    torch.testing.assert_close(loss, 0.25 * expected)
    torch.testing.assert_close(plain, expected.detach())
    wanted = torch.autograd.grad(0.25 * expected, [hidden, weight])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert int(model.mtp.valid(1, batch).sum()) == count
    values, valid = own_values(model.mtp, 1, hidden, batch)
    assert int(valid.sum()) == count
    torch.testing.assert_close((values * valid).sum(), expected.detach())
