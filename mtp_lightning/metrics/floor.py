"""The rejection rate that no draft head of a given order can avoid, and a trained head's gap to it.

A head of order m sees the trunk's state at position t and the m tokens before its target. Depth k
drafts token t + k + 1 of a text that the main model samples; the target's distribution p depends on
all k tokens in between, and the head's q on m of them alone. Its *rejection* is the expected total
variation distance

    E[1 - sum_v min(p_v, q_v)]

over the model's own texts (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5). The *order-m
floor* is the least rejection of any q that depends on the state and those m tokens (the information
floor, arXiv 2608.27339); it is 0 for m = k. *Gap* = rejection - floor: the floor is what a head
lacks in information, the gap what training could still give it.

Shapes: T tokens of a prompt, N continuations, K tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel

RECALL = 16
"""Number of a head's first choices among which recall looks for the target."""

ENUMERATED = 512
"""Number of continuations up to which all are taken, each with its probability."""

_ROWS = 64  # continuations read in one pass


class FloorValues(NamedTuple):
    """Means over continuations of a prompt."""

    floor: float  # least rejection of any head of the order
    rejection: float  # of the model's own head, over the same continuations
    recall: float  # probability that the target is among the head's first choices


def least_rejection(p_NV: Tensor, weight_N: Tensor) -> float:
    """The minimum over all distributions q of ``sum_n w_n (1 - sum_v min(p_nv, q_v))``, exactly.

    The sum that q maximizes is concave and piecewise linear in each q_v: up to the smallest of the
    p_nv its slope is the sum of all weights, beyond it that of the others, and so on. So the mass
    1 is given to the steepest pieces first.

    Args:
        p_NV: distributions, fp64.
        weight_N: weights >= 0, fp64; they need not sum to 1.
    """
    sorted_NV, order_NV = p_NV.sort(dim=0)
    length_NV = sorted_NV.diff(dim=0, prepend=torch.zeros_like(sorted_NV[:1]))
    # The weights of all distributions that reach so far.
    slope_NV = weight_N[order_NV].flip(0).cumsum(0).flip(0)
    slope_M, steepest_M = slope_NV.flatten().sort(descending=True)
    length_M = length_NV.flatten()[steepest_M]
    end_M = length_M.cumsum(0)
    used_M = (length_M - (end_M - 1).clamp(min=0)).clamp(min=0)
    return max(float(weight_N.sum() - (slope_M * used_M).sum()), 0.0)


class Floors:
    """Measures one model on one prompt.

    Where all continuations of k tokens are at most ``ENUMERATED``, everything is exact. Else
    continuations are sampled. With tokens that the head sees (m > 0), these are drawn ``seen``
    times, and each of the ``rollouts`` of the tokens before them is weighted by how likely it
    makes them. Since a floor is the minimum over the same sample that the rejection is taken
    from, a sampled floor is biased low, and never above the rejection of a head of its order.

    Args:
        model: in evaluation mode, with depths that predict a token each and stride 1.
        prompt_T: int64 ids of the prompt.
        generator: draws the samples, on the CPU.
        rollouts: continuations to sample, >= 1.
        seen: continuations of these to sample for an order above 0, >= 1.
    """

    def __init__(
        self,
        model: MTPModel,
        prompt_T: Tensor,
        generator: torch.Generator,
        *,
        rollouts: int,
        seen: int,
    ) -> None:
        self.model, self.prompt_T, self.generator = model, prompt_T.cpu(), generator
        self.rollouts, self.seen = rollouts, seen
        self._vocabulary = model.config.trunk.vocab_size

    @torch.no_grad()
    def measure(self) -> dict[tuple[int, int], FloorValues]:
        """The values by depth k = 1 .. D and order m = 0 .. k - 1."""
        depths = range(1, self.model.depth + 1)
        return {(k, m): self._measure(k, m) for k in depths for m in range(k)}

    def _measure(self, k: int, m: int) -> FloorValues:
        hidden_NK, weight_N = self._paths(k, k - m)
        if m == 0:
            return self._measure_paths(hidden_NK, weight_N, k)[0]
        totals = [0.0, 0.0, 0.0]
        for seen_m, share in self._visible_tokens(k, m, hidden_NK, weight_N):
            tokens_NK = torch.cat([hidden_NK, seen_m.expand(len(weight_N), m)], 1)
            values, likely = self._measure_paths(tokens_NK, weight_N, k, m)
            # The weights sum to the probability of what is seen.
            scale = 1.0 if share is None else share / likely if likely else 0.0
            totals = [total + scale * value for total, value in zip(totals, values, strict=True)]
        return FloorValues(*totals)

    def _visible_tokens(
        self, k: int, m: int, hidden_NK: Tensor, weight_N: Tensor
    ) -> list[tuple[Tensor, float | None]]:
        """The m tokens that a head can see, each time with their share among the samples; None if
        all of them are enumerated."""
        if self._vocabulary**k <= ENUMERATED:
            return [(seen_m, None) for seen_m in _all(self._vocabulary, m)]
        draws_N = self._draw(weight_N, self.seen).bincount(minlength=len(weight_N))
        tokens_NK, counts_N = self._continued(hidden_NK, draws_N, m)
        seen_Mm, index_N = tokens_NK[:, -m:].unique(dim=0, return_inverse=True)
        counts_M = torch.zeros(len(seen_Mm), dtype=torch.int64).index_add_(0, index_N, counts_N)
        return [(s, c / self.seen) for s, c in zip(seen_Mm, counts_M.tolist(), strict=True)]

    def _draw(self, probs_N: Tensor, n: int) -> Tensor:
        return torch.multinomial(probs_N, n, replacement=True, generator=self.generator)

    def _measure_paths(
        self, tokens_NK: Tensor, weight_N: Tensor, k: int, m: int = 0
    ) -> tuple[FloorValues, float]:
        """Measures continuations of k tokens that share their last m, which a head of order m sees.
        Multiplies each weight by the probability of those m tokens, and also returns the sum of the
        weights."""
        p_NKV, q_NV = self._predictions(tokens_NK, k)
        if m:
            seen_Nm1 = tokens_NK[:, k - m :].unsqueeze(-1)
            weight_N = weight_N * p_NKV[:, k - m : k].gather(-1, seen_Nm1).squeeze(-1).prod(1)
        p_NV = p_NKV[:, k]
        rejected_N = 1 - torch.minimum(p_NV, q_NV).sum(-1)
        first_NR = q_NV.topk(min(RECALL, self._vocabulary), dim=-1).indices
        values = FloorValues(
            floor=least_rejection(p_NV, weight_N),
            rejection=float((weight_N * rejected_N).sum()),
            recall=float((weight_N * p_NV.gather(-1, first_NR).sum(-1)).sum()),
        )
        return values, float(weight_N.sum())

    def _paths(self, k: int, n: int) -> tuple[Tensor, Tensor]:
        """Different continuations of n tokens, and their probabilities, which sum to 1: all of
        them if those of k tokens are few, else samples."""
        if self._vocabulary**k > ENUMERATED:
            none = torch.empty(1, 0, dtype=torch.int64)
            tokens_NK, counts_N = self._continued(none, torch.tensor([self.rollouts]), n)
            return tokens_NK, counts_N.double() / self.rollouts
        tokens_NK = _all(self._vocabulary, n)
        p_NKV, _ = self._predictions(tokens_NK, 0)
        weight_NK = p_NKV[:, :n].gather(-1, tokens_NK.unsqueeze(-1)).squeeze(-1)
        return tokens_NK, weight_NK.prod(1)

    def _continued(self, tokens_NK: Tensor, counts_N: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Sample n more tokens for each continuation, as often as its count says. Equal results are
        merged, and counted."""
        for _ in range(n):
            tokens_NK, counts_N = tokens_NK[counts_N > 0], counts_N[counts_N > 0]
            p_NKV, _ = self._predictions(tokens_NK, 0)
            longer = []
            for path_K, p_V, count in zip(tokens_NK, p_NKV[:, -1], counts_N.tolist(), strict=True):
                next_N1 = self._draw(p_V, count).unsqueeze(1)
                longer.append(torch.cat([path_K.expand(count, -1), next_N1], 1))
            tokens_NK, counts_N = torch.cat(longer).unique(dim=0, return_counts=True)
        return tokens_NK, counts_N

    def _predictions(self, tokens_NK: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Main predictions after the prompt and after each token of a continuation
        [N, K + 1, V], and what depth k predicts at the prompt's end [N, V]; both fp64, on the CPU.

        Depth k may read k tokens of the continuation. Depth 0 is the main prediction.
        """
        model, n = self.model, len(self.prompt_T)
        weight_VC = model.head.weight
        parts = []
        for part_NK in tokens_NK.split(_ROWS):
            rows, width = part_NK.shape
            # The model is causal, so no position used here reads the padding.
            fill = torch.zeros(rows, model.depth + 1, dtype=torch.int64)
            text_NT = torch.cat([self.prompt_T.expand(rows, n), part_NK, fill], 1)
            batch = WindowBatch(text_NT.to(weight_VC.device), model.depth)
            assert batch.seq_len == n + width
            states = model(batch, [k] if k else [])
            main_MC = states[0][:, n - 1 :].flatten(0, 1)
            state_NC = states[k][:, n - 1].to(weight_VC.dtype)
            with torch.autocast(weight_VC.device.type, enabled=False):
                p_MV = model.head.log_probs(main_MC.to(weight_VC.dtype))
                q_NV = model.head_of(k).log_probs(state_NC)
                if k:
                    q_NV = model.mtp.rescore(k, state_NC, q_NV, batch.tokens[:, n - 1 + k])
            p_NKV = _probabilities(p_MV).unflatten(0, (rows, width + 1))
            parts.append((p_NKV, _probabilities(q_NV)))
        p_NKV, q_NV = map(torch.cat, zip(*parts, strict=True))
        return p_NKV, q_NV


def floors(by_prompt: Sequence[dict[tuple[int, int], FloorValues]]) -> dict[str, float]:
    """The values to log, without ``val/``, from those of all prompts; see docs/logged.md."""
    values: dict[str, float] = {}
    for k, m in by_prompt[0]:
        columns = zip(*(prompt_values[k, m] for prompt_values in by_prompt), strict=True)
        floor, rejection, recall = (math.fsum(column) / len(by_prompt) for column in columns)
        if m == 0:
            values[f"rejection_depth_{k}"] = rejection
            values[f"recall_{RECALL}_depth_{k}"] = recall
            blind = floor
        name = f"depth_{k}_order_{m}"
        values[f"floor_{name}"] = floor
        values[f"gap_{name}"] = rejection - floor
        if rejection > 0:
            values[f"floor_share_{name}"] = floor / rejection
        if m and blind > 0:
            values[f"floor_kept_{name}"] = floor / blind
    return values


def _probabilities(logits_MV: Tensor) -> Tensor:
    """Probabilities [M, V], fp64, on the CPU."""
    return logits_MV.double().softmax(-1).cpu()


def _all(size: int, n: int) -> Tensor:
    """Every continuation of n tokens, [size ** n, n]."""
    return torch.cartesian_prod(*[torch.arange(size)] * n).view(-1, n)
