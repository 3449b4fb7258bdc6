"""Mixtures of softmaxes (Yang et al. 2018, arXiv 1711.03953): several hidden states per position,
each with a weight.

    q = sum_a w_a softmax(U h_a),    a = 1 .. r

Such a prediction is passed through the model as one vector, like a hidden state: the r states,
followed by the logarithms of their weights, X = r (C + 1) numbers. Its width distinguishes it from
a state of C numbers.

Shapes: A components (r), C d_model, X width of a packed mixture, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pack(hidden_AC: Tensor, log_weights_A: Tensor) -> Tensor:
    """Pack states [..., A, C] and log-weights [..., A] into [..., X], at least fp32."""
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
    """``log q`` [..., V], which may be used as logits, of a packed mixture; ``log_probs`` returns
    the log-probabilities [..., V] of a component's states [..., C].

    Components are added one at a time: the sum and one component exist at once.
    """
    hidden_AC, log_weights_A = unpack(mixture_X, d_model)
    log_q: Tensor | None = None
    for a in range(hidden_AC.shape[-2]):
        part = log_probs(hidden_AC[..., a, :]) + log_weights_A[..., a : a + 1]
        log_q = part if log_q is None else torch.logaddexp(log_q, part)
        del part  # before the next component is computed
    assert log_q is not None
    return log_q
