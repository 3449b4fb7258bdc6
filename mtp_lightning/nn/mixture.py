"""Predictions that are mixtures: several hidden states of a position, each with a weight.

    q = sum_a w_a softmax(U h_a),    a = 1 .. r

On its way through the model such a prediction is one vector, like a hidden state: the r states and
behind them the logarithms of their weights, X = r (C + 1) numbers. It is told from a state of C
numbers by its width.

Shapes: A components (r), C d_model, X width of a packed mixture, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pack(hidden_AC: Tensor, log_weights_A: Tensor) -> Tensor:
    """[..., A, C] states and [..., A] log-weights as [..., X], of fp32 at least."""
    dtype = torch.promote_types(hidden_AC.dtype, torch.float32)
    return torch.cat((hidden_AC.flatten(-2).to(dtype), log_weights_A.to(dtype)), dim=-1)


def unpack(mixture_X: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`: [..., A, C] states and [..., A] log-weights, views."""
    rank = mixture_X.shape[-1] // (d_model + 1)
    states, log_weights_A = mixture_X.split((rank * d_model, rank), dim=-1)
    return states.unflatten(-1, (rank, d_model)), log_weights_A


def mixed_log_probs(
    mixture_X: Tensor, d_model: int, log_probs: Callable[[Tensor], Tensor]
) -> Tensor:
    """``log q`` [..., V], which are logits as good as any.

    One component after another: beside the result there are the numbers of one more.

    Args:
        mixture_X: packed.
        d_model: C.
        log_probs: of a component's states [..., C], [..., V].
    """
    hidden_AC, log_weights_A = unpack(mixture_X, d_model)
    log_q: Tensor | None = None
    for a in range(hidden_AC.shape[-2]):
        part = log_probs(hidden_AC[..., a, :]) + log_weights_A[..., a : a + 1]
        log_q = part if log_q is None else torch.logaddexp(log_q, part)
    assert log_q is not None
    return log_q
