"""The objectives once more, from their equations in float64, a position at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel

# log q [V], log p [V], target -> the loss of one position
Formula = Callable[[Tensor, Tensor, int], Tensor]


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def ce(log_q: Tensor, log_p: Tensor, target: int) -> Tensor:
    return -log_q[target]


def kl(log_q: Tensor, log_p: Tensor, target: int) -> Tensor:
    return _sum([log_p[v].exp() * (log_p[v] - log_q[v]) for v in range(len(log_q))])


def warm_kl(log_q: Tensor, log_p: Tensor, target: int) -> Tensor:
    return kl(torch.log_softmax(log_q / 2, -1), torch.log_softmax(log_p / 2, -1), target)


FORMULAS: dict[str, Formula] = {"ce": ce, "kl": kl, "kl at temperature 2": warm_kl}


def expected(
    model: MTPModel, batch: WindowBatch, weights: list[float], mixture: dict[str, float]
) -> tuple[Tensor, dict[str, list[float]]]:
    """The differentiable objective, and the mean of every term and depth (NaN without positions).

    Args:
        model: in float64.
        batch: the whole step.
        weights: lambda_k, of D depths.
        mixture: names in FORMULAS -> weights.
    """
    states = model(batch)
    log_probs = {k: torch.log_softmax(model.head(h), -1) for k, h in states.items()}
    main = log_probs[0].detach()
    total = torch.zeros((), dtype=torch.float64)
    means: dict[str, list[float]] = {name: [] for name in mixture}
    for k, weight in enumerate([1.0, *weights]):
        for name, share in mixture.items() if k else [("ce", 1.0)]:
            losses = []
            for b in range(len(batch)):
                for t in range(batch.seq_len):
                    target = int(batch.targets(k)[b, t])
                    if target < 0 or (k and name != "ce" and t + k >= batch.seq_len):
                        continue
                    taught = main[b, min(t + k, batch.seq_len - 1)]
                    losses.append(FORMULAS[name](log_probs[k][b, t], taught, target))
            mean = _sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)
            total = total + weight * share * mean
            if k:
                means[name].append(mean.item() if losses else math.nan)
    return total, means


def gradients(model: MTPModel) -> dict[str, Tensor]:
    """Those of all parameters, which are taken away."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
