"""The objectives once more, from their equations in float64, a position at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel


@dataclass(frozen=True)
class Position:
    """One position: log q [V], log p [V], the target, h^k_t [C] and h_{t+k} [C]."""

    log_q: Tensor
    log_p: Tensor
    target: int
    hidden: Tensor
    main: Tensor


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def ce(at: Position) -> Tensor:
    return -at.log_q[at.target]


def kl_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _sum([log_p[v].exp() * (log_p[v] - log_q[v]) for v in range(len(log_q))])


def kl(at: Position) -> Tensor:
    return kl_of(at.log_p, at.log_q)


def warm_kl(at: Position) -> Tensor:
    return kl_of(torch.log_softmax(at.log_p / 2, -1), torch.log_softmax(at.log_q / 2, -1))


def reverse_kl(at: Position) -> Tensor:
    return kl_of(at.log_q, at.log_p)


def js(at: Position) -> Tensor:
    log_m = ((at.log_p.exp() + at.log_q.exp()) / 2).log()
    return (kl_of(at.log_p, log_m) + kl_of(at.log_q, log_m)) / 2


def alpha(at: Position) -> Tensor:
    p, q = at.log_p.exp(), at.log_q.exp()
    return _sum([p[v] if p[v] < q[v] else q[v] for v in range(len(q))])


def tv(at: Position) -> Tensor:
    return 1 - alpha(at)


def nla(at: Position) -> Tensor:
    return -torch.log(alpha(at)) if alpha(at) > 1e-5 else 0 * alpha(at) - math.log(1e-5)


def lk(at: Position) -> Tensor:
    w = math.exp(-3 * alpha(at).item())
    return w * kl(at) + (1 - w) * tv(at)


def feature(at: Position) -> Tensor:
    return _feature(at, (at.main.square().mean() + 1e-6).sqrt())


def raw_feature(at: Position) -> Tensor:
    return _feature(at, torch.ones(()))


def _feature(at: Position, rms: Tensor) -> Tensor:
    losses = []
    for difference in (at.hidden - at.main) / rms:
        size = difference.abs()
        losses.append(0.5 * size * size if size < 1 else size - 0.5)
    return _sum(losses) / len(losses)


FORMULAS: dict[str, Callable[[Position], Tensor]] = {
    "ce": ce,
    "kl": kl,
    "kl at temperature 2": warm_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "tv": tv,
    "nla": nla,
    "lk": lk,
    "feature": feature,
    "raw feature": raw_feature,
}


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
            losses, on = [], batch.stride * k
            for b in range(len(batch)):
                for t in range(batch.seq_len):
                    target = int(batch.targets(k)[b, t])
                    if target < 0 or (k and name != "ce" and t + on >= batch.seq_len):
                        continue
                    u = min(t + on, batch.seq_len - 1)
                    hidden, known = states[k][b, t], states[0][b, u].detach()
                    at = Position(log_probs[k][b, t], main[b, u], target, hidden, known)
                    losses.append(FORMULAS[name](at))
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
