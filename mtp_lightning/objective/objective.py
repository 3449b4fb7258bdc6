"""What the MTP depths are trained on: a term or a mixture of them, and which positions count.

``L_k = sum_TERM weight_TERM * L_k/TERM``, and each ``L_k/TERM`` is a mean over the positions of
depth k that count for the term: those that count for cross-entropy and, where the term compares
with a teacher, have one. Depth k at position t is taught by the main prediction at t + k, so the
last k positions of a window are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPStack
from mtp_lightning.objective.ahead import Seen, Wanted
from mtp_lightning.objective.entropy_mask import EntropyMask
from mtp_lightning.objective.position_weights import Acceptance, ExpDecay, PositionWeights
from mtp_lightning.objective.targets import (
    DepthTarget,
    PositionCounts,
    taught_targets,
    tokens_of,
)
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.confidence import ConfidenceError, ConfidenceTerm
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV, together
from mtp_lightning.settings import require, require_choice, require_number


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The group ``objective``.

    Attributes:
        term: of the depths; the main prediction keeps cross-entropy.
        train_head: whether the depths' losses train the shared head; if not, it passes their
            gradients on to the hidden states alone.
        weights: of positions: ``none``, ``exp_decay`` or ``acceptance`` (``position_weights.py``).
        decay: g of ``exp_decay``; None for 4.
        smoothing: a of ``acceptance``; None for 0.5.
        mask: of positions: ``none`` or ``entropy`` (``entropy_mask.py``).
        tau: of the mask, in nats; None for a running quantile.
        quantile: that one; None for 0.95.
        confidence: whether depths learn how often they are believed (``terms/confidence.py``).

    Raises:
        UserError: a value that an option does not know, or one that nothing reads.
    """

    term: Term
    train_head: bool = True
    weights: str = "none"
    decay: float | None = None
    smoothing: float | None = None
    mask: str = "none"
    tau: float | None = None
    quantile: float | None = None
    confidence: bool = False
    _more_parts: tuple[tuple[float, Term], ...] = ()

    def __post_init__(self) -> None:
        for name in ("train_head", "confidence"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"objective.{name}", value, "true or false")
        require_choice("objective.weights", self.weights, ("none", "exp_decay", "acceptance"))
        require_choice("objective.mask", self.mask, ("none", "entropy"))
        for name, owner, chosen in (
            ("decay", "weights", "exp_decay"),
            ("smoothing", "weights", "acceptance"),
            ("tau", "mask", "entropy"),
            ("quantile", "mask", "entropy"),
        ):
            value = getattr(self, name)
            if value is not None and getattr(self, owner) != chosen:
                raise UserError(
                    f"objective.{name}={value} is read by objective.{owner}={chosen} alone: set "
                    "that, or leave it null."
                )
        if self.decay is not None:
            require_number("objective.decay", self.decay, above=0)
        if self.smoothing is not None:
            require_number("objective.smoothing", self.smoothing, least=0, most=1)
        if self.tau is not None and self.tau != math.inf:
            require_number("objective.tau (null for a running quantile)", self.tau)
        if self.tau is not None and self.quantile is not None:
            raise UserError(
                f"objective.tau={self.tau} and objective.quantile={self.quantile} both say what a "
                "jump is: leave one of them null."
            )
        _ = self.entropy_mask  # which checks the rest

    @classmethod
    def options(cls) -> list[str]:
        """The keys of the group that are not the term's own."""
        names = [field.name for field in fields(cls)]
        return [name for name in names if name != "term" and not name.startswith("_")]

    def for_model(self, model: MTPModel) -> Objective:
        """The objective with the terms that train parts of a model of their own."""
        head = model.mtp.confidence
        if not self.confidence or self._more_parts or head is None:
            return self
        more = ((1.0, ConfidenceTerm(head)), (0.0, ConfidenceError(head)))
        return replace(self, _more_parts=more)

    @cached_property
    def parts(self) -> list[tuple[float, Term]]:
        """The terms that are computed, each with its weight."""
        return [*self.term.parts(), *self._more_parts]

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them compares with the main prediction."""
        return any(term.needs_teacher for _, term in self.parts)

    @property
    def couples(self) -> bool:
        """Whether a depth's loss rests on other depths' predictions."""
        return any(isinstance(term, E2ETV) for _, term in self.parts)

    @cached_property
    def position_weights(self) -> PositionWeights | None:
        """Of the positions; None is 1."""
        if self.weights == "exp_decay":
            return ExpDecay(4.0 if self.decay is None else self.decay)
        if self.weights == "acceptance":
            return Acceptance(0.5 if self.smoothing is None else self.smoothing)
        return None

    @cached_property
    def entropy_mask(self) -> EntropyMask | None:
        """Which positions count; it learns while a run goes on."""
        if self.mask == "none":
            return None
        return EntropyMask(self.tau, quantile=0.95 if self.quantile is None else self.quantile)

    @cached_property
    def wanted(self) -> Wanted:
        """What must be known of all depths before any learns."""
        weights = self.position_weights
        return Wanted(
            alpha=self.couples,
            target_probs=weights is not None and weights.needs_target_probs,
            entropy=self.entropy_mask is not None,
        )

    def targets(
        self, k: int, batch: WindowBatch, factor: float, counts: PositionCounts, *, place: int
    ) -> list[DepthTarget]:
        """What depth ``k`` is asked for: a target for every term that has a position in the step.

        Args:
            k: the depth, 1 .. D.
            batch: a micro-batch.
            factor: of L_k.
            counts: of the whole step.
            place: :meth:`MTPStack.target_depth` of ``k``.
        """
        found = []
        for part, (weight, term) in enumerate(self.parts):
            if count := counts.of(k, term):
                taught = term.needs_teacher
                tokens_BT = taught_targets(batch, k) if taught else batch.targets(place)
                coefficient = factor * weight / count
                found.append(
                    DepthTarget(k, tokens_BT, coefficient, term, part, stride=batch.stride)
                )
        return found

    def settle(self, targets: Sequence[DepthTarget], seen: Seen) -> list[DepthTarget]:
        """The targets with masks and weights that rest on what was seen of all depths.

        Args:
            targets: of the main prediction, then of the depths.
            seen: what :attr:`wanted` says.
        """
        if self.entropy_mask is None and self.position_weights is None and not self.couples:
            return list(targets)
        tokens = tokens_of(targets)
        if self.entropy_mask is not None:
            assert seen.entropy is not None
            kept = self.entropy_mask.keep(seen.entropy, tokens)
            targets = [
                replace(t, tokens=t.tokens.masked_fill(~kept[t.depth], IGNORE_INDEX))
                if t.depth and not isinstance(t.term, ConfidenceError)
                else t
                for t in targets
            ]
            tokens |= {k: tokens[k].masked_fill(~kept[k], IGNORE_INDEX) for k in kept}
        valid = {k: tokens_BT != IGNORE_INDEX for k, tokens_BT in tokens.items() if k}
        if self.position_weights is not None and valid:
            weights = self.position_weights.of_depths(valid, seen.target_probs)
            targets = [
                replace(t, weights=weights[t.depth])
                if t.depth and not isinstance(t.term, ConfidenceTerm)
                else t
                for t in targets
            ]
        return self._coupled(targets, seen) if self.couples else list(targets)

    def _coupled(self, targets: Sequence[DepthTarget], seen: Seen) -> list[DepthTarget]:
        own = {t.depth: t for t in targets if isinstance(t.term, E2ETV)}
        if not own:
            return list(targets)
        alpha = {k: seen.alpha[k] for k in own}
        valid = {k: t.tokens != IGNORE_INDEX for k, t in own.items()}
        weights = {
            k: torch.ones_like(alpha[k]) if t.weights is None else t.weights.to(alpha[k].dtype)
            for k, t in own.items()
        }
        coefficients = {k: t.coefficient * weights[k] for k, t in own.items()}
        values, scales = together(alpha, valid, coefficients)
        settled = {
            k: replace(t, weights=scales[k] / t.coefficient, values=values[k] * weights[k])
            for k, t in own.items()
        }
        return [settled[t.depth] if isinstance(t.term, E2ETV) else t for t in targets]

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, in plain containers."""
        return {} if self.entropy_mask is None else self.entropy_mask.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; what was stored for another mask is left."""
        if self.entropy_mask is not None and state:
            self.entropy_mask.load_state_dict(state)

    def losses(self, sums_KP: Tensor, counts: PositionCounts) -> Tensor:
        """The mean loss of every depth and term [D + 1, P]; 0 where nothing was counted.

        Args:
            sums_KP: of the whole step; of the main prediction in the first column.
            counts: of the whole step.
        """
        losses_KP = sums_KP.clone()
        losses_KP[0, 0] /= max(counts.valid[0], 1)
        for k in range(1, len(counts.valid)):
            for part, (_, term) in enumerate(self.parts):
                losses_KP[k, part] /= max(counts.of(k, term), 1)
        return losses_KP

    def mixed(self, losses_KP: Tensor) -> Tensor:
        """The loss of every depth [D + 1]: its terms, weighted."""
        if len(self.parts) == 1 and self.parts[0][0] == 1:
            return losses_KP[:, 0]
        weighted = [losses_KP[1:, part] * weight for part, (weight, _) in enumerate(self.parts)]
        return torch.cat((losses_KP[:1, 0], torch.stack(weighted).sum(0)))

    def further_flops(
        self,
        config: ModelConfig,
        stack: MTPStack,
        seq_len: int,
        active: Sequence[int],
        *,
        main: bool = True,
    ) -> int:
        """FLOPs of training a position that :meth:`ModelConfig.flops_per_token` does not count,
        since it takes the depths to be trained on cross-entropy.

        Args:
            config: of the model.
            stack: its stack, or one like it.
            seq_len: T.
            active: depths that are computed.
            main: whether the main prediction goes through the head anyway.
        """
        head, depths = config.trunk.head_flops(), len(active)
        alone = stack.in_turn
        flops = self._flops_ahead(config, seq_len, active, alone=alone)
        if not active:
            return flops
        if self.confidence:
            flops += depths * 4 * 2 * config.trunk.d_model  # two products, and one's two backward
        if self.needs_teacher and config.mtp.rank > 1:
            return flops + depths * config.mtp.rank * head  # each depth's by itself
        if self.needs_teacher:
            # One head at a time needs a teacher of its own; a chain's is the main prediction.
            flops += (depths if alone else not main) * head
        trained = self.train_head and config.mtp.detach != "all"
        if stack.shares_state and (self.needs_teacher or not trained):
            return flops + depths * (2 + trained) * head  # each by itself
        if not self.train_head and config.mtp.trains_trunk and config.mtp.detach != "all":
            flops -= config.mtp.projections(active) * head
        return flops

    def measuring_flops(self, config: ModelConfig, active: Sequence[int]) -> int:
        """FLOPs of a position that teachers add to a measurement of every depth's gradient."""
        return len(active) * config.trunk.head_flops() if self.needs_teacher else 0

    def _flops_ahead(
        self, config: ModelConfig, seq_len: int, active: Sequence[int], *, alone: bool
    ) -> int:
        """FLOPs of what must be known before any depth learns."""
        wanted, passes = self.wanted, int(self.wanted.entropy)
        if wanted.alpha and active:  # a pass of the main prediction for all, or for each
            passes = len(active) if alone else 1
        if wanted.of_depths:
            passes += len(active)
        flops = passes * config.trunk.head_flops()
        if wanted.of_depths and alone:  # the heads are computed twice
            flops += config.mtp.module_flops(config.trunk, seq_len, active)
        return flops


CROSS_ENTROPY = Objective(term=CrossEntropy())
"""What the depths learn where nothing else is said."""
