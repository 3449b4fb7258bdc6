"""An optimizer step from the definitions, in float64, with all logits [B, T, V] and autograd.

Shapes: B windows, T positions, D depths, C d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp import selector
from tests.mtp.summaries import nearest
from tests.objective.states import Forward, log_prob_of


@dataclass(frozen=True)
class At:
    """Positions of a depth: log q and log p [.., V], targets [..], h^k_t and h_{t+k} [.., C]."""

    log_q: Tensor
    log_p: Tensor
    target: Tensor
    hidden: Tensor
    main: Tensor
    embedded: Tensor | None = None  # the target's
    padded: Tensor | None = None  # the target's, or token 0's where there is no target


def kl_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def warm_kl(at: At) -> Tensor:
    return kl_of(torch.log_softmax(at.log_p / 2, -1), torch.log_softmax(at.log_q / 2, -1))


def js(at: At) -> Tensor:
    log_m = ((at.log_p.exp() + at.log_q.exp()) / 2).log()
    return (kl_of(at.log_p, log_m) + kl_of(at.log_q, log_m)) / 2


def alpha(at: At) -> Tensor:
    return torch.minimum(at.log_p.exp(), at.log_q.exp()).sum(-1)


def warm_alpha(at: At) -> Tensor:
    scaled = (torch.softmax(log / 0.6, -1) for log in (at.log_p, at.log_q))
    return torch.minimum(*scaled).sum(-1)


def of_greedy(at: At) -> Tensor:
    return log_prob_of(at.log_q, at.log_p.argmax(-1)).exp()


def lk(at: At) -> Tensor:
    w = torch.exp(-3 * alpha(at).detach())
    return w * kl_of(at.log_p, at.log_q) + (1 - w) * (1 - alpha(at))


def feature(at: At) -> Tensor:
    rms = (at.main.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return raw_feature(At(at.log_q, at.log_p, at.target, at.hidden / rms, at.main / rms))


def distance(hidden: Tensor, target: Tensor | None) -> Tensor:
    assert target is not None
    return ((hidden - target) ** 2).mean(-1)


def raw_feature(at: At) -> Tensor:
    size = (at.hidden - at.main).abs()
    return torch.where(size < 1, 0.5 * size * size, size - 0.5).mean(-1)


FORMULAS: dict[str, Callable[[At], Tensor]] = {
    "ce": lambda at: -log_prob_of(at.log_q, at.target),
    "kl": lambda at: kl_of(at.log_p, at.log_q),
    "kl at temperature 2": warm_kl,
    "reverse_kl": lambda at: kl_of(at.log_q, at.log_p),
    "js": js,
    "tv": lambda at: 1 - alpha(at),
    "nla": lambda at: -torch.log(alpha(at).clamp(min=1e-5)),
    "lk": lk,
    "feature": feature,
    "raw feature": raw_feature,
    "anchor_latent": lambda at: distance(at.hidden, at.main),
    "anchor_semantic": lambda at: distance(at.hidden, at.embedded),
    "padded semantic": lambda at: distance(at.hidden, at.padded),
}
# For terms over all depths of a position: the probability that a draft is accepted.
ACCEPTED: dict[str, Callable[[At], Tensor]] = {
    "e2e_tv": alpha,
    "wtv": alpha,
    "wtv at temperature 0.6": warm_alpha,
    "eal": of_greedy,
}
# A formula for certain settings of a term -> the name of the term in the log.
LOGGED = {
    "kl at temperature 2": "kl",
    "raw feature": "feature",
    "wtv at temperature 0.6": "wtv",
    "padded semantic": "anchor_semantic",
}


@dataclass(frozen=True)
class DepthObjective:
    """The objective of the depths: formulas with their weights, and its options."""

    mixture: Mapping[str, float]
    train_head: bool = True
    weights: str = "none"
    decay: float | None = None
    smoothing: float | None = None
    mask: str = "none"
    tau: float | None = None
    confidence: bool = False
    draft_vocab: int | None = None


class Step:
    """One optimizer step.

    Args:
        model: the model, in float64.
        batch: the batch of the whole step, on one rank.
        key: key of the random choices.
        lambdas: the schedule's, for D depths.
        objective: the objective of the depths.

    Attributes:
        total: L, differentiable.
        logged: the values that the step logs, by tag.
    """

    def __init__(
        self,
        model: MTPModel,
        batch: WindowBatch,
        key: RandomKey,
        lambdas: Sequence[float],
        objective: DepthObjective,
    ) -> None:
        self.model, self.batch, self.seq_len = model, batch, batch.seq_len
        self.objective = objective
        self.forward = Forward(model, batch, key)
        self.log_q = self.forward.log_probs(train_head=objective.train_head)
        self.log_p = self.log_q[0].detach()
        # depth -> the distance of its target from the next token
        self.offsets = {k: batch.stride * k for k in range(model.depth + 1)}
        if model.config.mtp.variant == "registers":
            self.offsets[1] = model.mtp.offset(key) - 1
        self.valid = {k: self._valid(offset) for k, offset in self.offsets.items()}
        own_head = model.mtp.own_head
        self.rows = None if own_head is None or own_head.is_whole else own_head.tokens
        for k in self.offsets if self.rows is not None else ():
            if k:
                self.valid[k] &= torch.isin(self._target(k), self.rows)
        if objective.draft_vocab is not None:
            self.rows = torch.arange(objective.draft_vocab)
        self.taught = {
            k: valid & (self._teacher_T(k) < self.seq_len) for k, valid in self.valid.items()
        }
        config: Any = model.config.mtp
        self.logged: dict[str, Any] = {}
        weights = {k: weight for k, weight in enumerate(lambdas, start=1) if weight}
        by_itself = config.variant in ("top", "bag")
        losses = self._of_summary(weights) if by_itself else self._of_depths(weights)
        self.logged |= {
            f"train/lambda_depth_{k}": weights.get(k, 0) * (k in losses) for k in self.offsets if k
        }
        if not config.freeze_trunk:
            losses[0], weights[0] = self._mean(FORMULAS["ce"](self._at(0)), self.valid[0]), 1.0
        zero = torch.zeros((), dtype=torch.float64)
        self.total = sum((weights[k] * loss for k, loss in losses.items()), zero)
        self.logged |= {f"train/loss_depth_{k}": loss for k, loss in losses.items()}
        self.logged["train/loss"] = self.total
        if (consistency := self.forward.consistency) is not None and weights.keys() - {0}:
            if config.consistency:
                self.logged["train/consistency_loss"] = consistency
            self.total = self.total + consistency  # train/loss does not have it
        for tag, value in self.logged.items():
            self.logged[tag] = value.item() if isinstance(value, Tensor) else value

    def _valid(self, offset: int) -> Tensor:
        """[B, T]: the token ``offset`` after the next can be a target and is in the same
        document."""
        batch, width = self.batch, self.seq_len
        valid = torch.ones(len(batch), width, dtype=torch.bool)
        if batch.scored is not None:
            valid &= batch.scored[:, offset + 1 : width + offset + 1]
        for ahead in range(1, offset + 2) if batch.documents is not None else ():
            valid &= batch.documents[:, ahead : width + ahead] == batch.documents[:, :width]
        return valid

    def _teacher_T(self, k: int) -> Tensor:
        """[T]: the position whose main prediction is that of depth k's target."""
        return torch.arange(self.seq_len) + self.offsets[k]

    def _at(self, k: int) -> At:
        teacher = self._teacher_T(k).clamp(max=self.seq_len - 1)
        target = self._target(k)
        states = {0: self.forward.final, **self.forward.states}
        hidden = states.get(k, self.forward.final)
        main = self.forward.final.detach()[:, teacher]
        embedding = self.forward.embedding.detach()
        padded = embedding[target.where(self.valid[k], torch.tensor(0))]
        embedded = embedding[target]
        log_q, log_p = self.log_q[k], self.log_p[:, teacher]
        if k and self.rows is not None:  # over the tokens that can be drafted
            log_q, log_p = (log[..., self.rows].log_softmax(-1) for log in (log_q, log_p))
            target = (target.unsqueeze(-1) == self.rows).long().argmax(-1)
        return At(log_q, log_p, target, hidden, main, embedded, padded)

    def _target(self, k: int) -> Tensor:
        start = 1 + self.offsets[k]
        return self.batch.tokens[:, start : start + self.seq_len]

    @staticmethod
    def _mean(value_BT: Tensor, counts: Tensor, kept: Tensor | float = 1.0) -> Tensor:
        """The mean over the positions of ``counts``; a position that is not kept adds 0."""
        total = (torch.where(counts, value_BT, 0) * kept).sum()
        return total / max(int(counts.sum()), 1)

    def _of_depths(self, lambdas: Collection[int]) -> dict[int, Tensor]:
        """The loss of every depth of ``lambdas`` that has a target; each of its terms is logged."""
        objective, names = self.objective, list(self.objective.mixture)
        selects = getattr(self.model.config.mtp, "correction", "none") == "selector"
        counted = {
            k: self.valid[k] if "ce" in names or selects else self.taught[k] for k in lambdas
        }
        counted = {k: counts for k, counts in counted.items() if counts.any()}
        inside = {k: self._target(k) < (objective.draft_vocab or math.inf) for k in counted}
        kept = {k: self._kept(k) & inside[k] for k in counted}
        at = {k: self._at(k) for k in counted}
        weights = self._weights(at, {k: counted[k] & kept[k] for k in counted})
        if objective.mask == "entropy":
            self.logged["objective/tau"] = objective.tau
            for k, counts in counted.items():
                if (counts := counts & inside[k]).any():
                    self.logged[f"objective/kept_depth_{k}"] = self._mean(kept[k].double(), counts)
        losses = {}
        ones = torch.ones(len(self.batch), self.seq_len, dtype=torch.float64)
        reached = dict.fromkeys(ACCEPTED, ones)
        for k in counted:
            terms: dict[str, Tensor] = {}
            learns = kept[k] * weights[k]
            for name in names:
                if name in ACCEPTED:
                    passed = torch.where(self.taught[k] & kept[k], ACCEPTED[name](at[k]), 1)
                    reached[name] = reached[name] * passed
                    value = 1 - reached[name]
                else:
                    value = FORMULAS[name](at[k])
                if name == "padded semantic":
                    seen = self._kept(k) & (inside[k] | ~self.valid[k])
                    terms[name] = self._mean(value, torch.ones_like(seen), seen * weights[k])
                    continue
                of_target = name in ("ce", "anchor_semantic")
                counts = self.valid[k] if of_target else self.taught[k]
                terms[name] = self._mean(value, counts, learns)
            loss = sum(share * terms[name] for name, share in objective.mixture.items())
            tags = {f"train/loss_depth_{k}/{LOGGED.get(n, n)}": terms[n] for n in names}
            drafted = at[k]
            if selects:
                drafted, value = self._selected(k, at[k])
                learned = self._mean(value, self.valid[k], learns)
                loss = loss + learned
                tags[f"train/loss_depth_{k}/selector"] = learned
            if objective.confidence:
                sure, right = self._confidence(k, at[k]), alpha(drafted).detach()
                value = -right * F.logsigmoid(sure) - (1 - right) * F.logsigmoid(-sure)
                learned = self._mean(value, self.taught[k], kept[k])
                error = self._mean((sure.sigmoid() - right).abs(), self.taught[k], inside[k])
                loss = loss + learned
                tags[f"train/loss_depth_{k}/confidence"] = learned
                tags[f"confidence/error_depth_{k}"] = error
            self.logged |= tags if len(tags) > 1 else {}
            losses[k] = loss
        return losses

    def _kept(self, k: int) -> Tensor:
        """[B, T]: the main prediction's entropy has no jump from t to t + k + 1."""
        kept = torch.ones(len(self.batch), self.seq_len, dtype=torch.bool)
        if self.objective.mask == "none":
            return kept
        log_p = self.log_p
        if self.objective.draft_vocab is not None:
            log_p = log_p[..., self.rows].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        for t in range(self.seq_len):
            for s in range(t, min(t + k, self.seq_len - 2) + 1):
                assert self.objective.tau is not None
                kept[:, t] &= entropy[:, s + 1] - entropy[:, s] <= self.objective.tau
        return kept

    def _weights(
        self, at: Mapping[int, At], counts: Mapping[int, Tensor]
    ) -> dict[int, Tensor | float]:
        objective = self.objective
        if objective.weights == "none":
            return dict.fromkeys(at, 1.0)
        if objective.weights == "exp_decay":
            return {k: math.exp(-(k - 1) / (objective.decay or 4)) for k in at}
        a = 0.5 if objective.smoothing is None else objective.smoothing
        product, reached = torch.ones(len(self.batch), self.seq_len, dtype=torch.float64), {}
        for k in at:
            s = (1 - a) * log_prob_of(at[k].log_q, at[k].target).exp().detach() + a
            product = product * torch.where(counts[k], s, 1)
            reached[k] = product * counts[k]
        return {k: sum(reached[i] for i in at if i >= k) for k in at}

    def _selected(self, k: int, at: At) -> tuple[At, Tensor]:
        """The positions with log q of the drafts, and the candidate selector's loss [B, T], from
        scores of all V tokens: other tokens than the candidates have probability 0."""
        w, before = self.forward.w, self.batch.tokens[:, k : self.seq_len + k]
        table_a, table_b = (w[f"mtp.rescorer.embedding.{n}.weight"] for n in ("before", "after"))
        gated = table_a[before] * self.forward.linear(at.hidden, "mtp.rescorer.gate")
        table_b = table_b[: at.log_q.shape[-1]]
        scores = at.log_q + torch.einsum("btr,vr->btv", gated, table_b)
        chosen = at.log_q.argsort(dim=-1, descending=True)[..., : selector.CANDIDATES]
        is_candidate = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, chosen, True)
        drafted = scores.masked_fill(~is_candidate, -math.inf).log_softmax(-1)
        missing = (chosen != at.target.unsqueeze(-1)).all(-1)
        for b, t in missing.nonzero().tolist():
            is_candidate[b, t, chosen[b, t, -1]] = False
            is_candidate[b, t, at.target[b, t]] = True
        log_p = scores.masked_fill(~is_candidate, -math.inf).log_softmax(-1)
        return replace(at, log_q=drafted), -log_prob_of(log_p, at.target)

    def _confidence(self, k: int, at: At) -> Tensor:
        w = self.forward.w
        row = w["mtp.confidence.weight"][k - 1], w["mtp.confidence.bias"][k - 1]
        return at.hidden @ row[0] + row[1]

    def _of_summary(self, lambdas: Collection[int]) -> dict[int, Tensor]:
        """The loss of ``top`` or ``bag``, one position at a time."""
        config: Any = self.model.config.mtp
        logits_BTV = self.forward.linear(self.forward.branch, "mtp.head")
        first, losses = 1 if config.variant == "top" else 2, []
        for b in range(len(self.batch)):
            for t in range(self.seq_len):
                ahead = nearest(self.batch, b, t, first, config.lookahead)
                if ahead:
                    ids, logits = torch.tensor(list(ahead)), logits_BTV[b, t]
                    if config.variant == "top":
                        losses.append(self._order(ids, list(ahead.values()), logits))
                    else:
                        losses.append(self._bag(ids, logits))
        return {1: torch.stack(losses).mean()} if losses and lambdas else {}

    def _order(self, ids: Tensor, ahead: list[int], logits: Tensor) -> Tensor:
        tau: float = self.model.config.mtp.tau  # type: ignore[attr-defined]
        target = torch.softmax(-torch.tensor(ahead).double() / tau, 0)
        return -(target * torch.log_softmax(logits, -1)[ids]).sum()

    def _bag(self, ids: Tensor, logits: Tensor) -> Tensor:
        a = torch.zeros_like(logits).index_fill(0, ids, 1)
        log_ahead, log_not = torch.sigmoid(logits).log(), torch.sigmoid(-logits).log()
        return -(self.model.mtp.weights_V * (a * log_ahead + (1 - a) * log_not)).sum()
