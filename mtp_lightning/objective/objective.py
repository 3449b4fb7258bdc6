"""What the MTP depths are trained on: a term or a mixture of them, and which positions count.

``L_k = sum_TERM weight_TERM * L_k/TERM``, and each ``L_k/TERM`` is a mean over the positions of
depth k that count for the term: those that count for cross-entropy and, where the term compares
with a teacher, have one. Depth k at position t is taught by the main prediction at t + k, so the
last k positions of a window are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.objective.rules.base import Measure, Rule, Seen
from mtp_lightning.objective.rules.confidence import ConfidenceRule
from mtp_lightning.objective.rules.coupling import Coupling
from mtp_lightning.objective.rules.entropy_mask import entropy_mask
from mtp_lightning.objective.rules.position_weights import position_weights
from mtp_lightning.objective.targets import DepthTarget, PositionCounts, taught_targets
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.settings import require


class Objective:
    """The group ``objective``: terms, and rules that change what the depths are asked for.

    Args:
        term: of the depths; the main prediction keeps cross-entropy.
        train_head: whether the depths' losses train the shared head; if not, it passes their
            gradients on to the hidden states alone.
        weights: of positions: ``none``, ``exp_decay`` or ``acceptance``
            (``rules/position_weights.py``).
        decay: g of ``exp_decay``; None for 4.
        smoothing: a of ``acceptance``; None for 0.5.
        mask: of positions: ``none`` or ``entropy`` (``rules/entropy_mask.py``).
        tau: of the mask, in nats; None for a running quantile.
        quantile: that one; None for 0.95.
        confidence: whether depths learn how likely their drafts are accepted
            (``rules/confidence.py``).

    Attributes:
        parts: the terms that are computed, each with its weight.
        rules: in the order in which they change the targets.

    Raises:
        UserError: a value that an option does not know, or one that nothing reads.
    """

    def __init__(
        self,
        *,
        term: Term,
        train_head: bool = True,
        weights: str = "none",
        decay: float | None = None,
        smoothing: float | None = None,
        mask: str = "none",
        tau: float | None = None,
        quantile: float | None = None,
        confidence: bool = False,
    ) -> None:
        for name, value in (("train_head", train_head), ("confidence", confidence)):
            require(isinstance(value, bool), f"objective.{name}", value, "true or false")
        self.term, self.train_head = term, train_head
        self.parts = list(term.parts())
        found: list[Rule | None] = [
            ConfidenceRule() if confidence else None,
            entropy_mask(mask, tau=tau, quantile=quantile),
            position_weights(weights, decay=decay, smoothing=smoothing),
            *(Coupling(part, self.asked) for _, part in self.parts if part.couples),
        ]
        self.rules = [rule for rule in found if rule is not None]

    @classmethod
    def options(cls) -> list[str]:
        """The keys of the group that are not the term's own."""
        return [name for name in inspect.signature(cls).parameters if name != "term"]

    @property
    def asked(self) -> str:
        """The setting that asks for its term, for messages."""
        return f"objective={self.term.name}"

    def for_model(self, model: MTPModel) -> Objective:
        """The objective with the terms that train parts of a model of their own."""
        bound = copy(self)
        own = [part for rule in self.rules for part in rule.parts(model.mtp)]
        bound.parts = [(weight, term.for_model(model)) for weight, term in self.term.parts()] + own
        return bound

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the main prediction."""
        return any(term.needs_teacher for _, term in self.parts)

    @property
    def measures(self) -> list[Measure]:
        """What must be known of all hidden states before any of them learns, each once."""
        found = {measure.name: measure for rule in self.rules for measure in rule.measures}
        return list(found.values())

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
        """The targets as the rules leave them.

        Args:
            targets: of the main prediction, then of the depths.
            seen: what :attr:`measures` found.
        """
        targets = list(targets)
        for rule in self.rules:
            targets = rule.apply(targets, seen)
        return targets

    def learn(self) -> dict[str, float]:
        """Take note of the optimizer step that is over. Returns what to log of it."""
        return {tag: value for rule in self.rules for tag, value in rule.learn().items()}

    def state_dict(self) -> dict[str, Any]:
        """What the rules have learned, in plain containers."""
        return {key: value for rule in self.rules for key, value in rule.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; what was stored for another rule is left."""
        for rule in self.rules:
            rule.load_state_dict(state)

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

    def check(self, mtp: MTPConfig) -> None:
        """Refuse a stack that the objective, or an option of it, has no meaning for.

        Raises:
            UserError: naming both, and the remedy.
        """
        plain = self.term.of_token and self.train_head and not self.rules
        if mtp.depth and not mtp.predicts_tokens and not plain:
            raise UserError(
                f"{self.asked} and its options say what depths that predict a token are trained "
                f"on, and mtp={mtp.variant} has a loss of its own: leave objective=ce."
            )
        of_drafts = [rule.asked for rule in self.rules if rule.of_drafts]
        if mtp.stride > 1:
            _refuse(
                of_drafts,
                f"rests on every token up to a depth's, of which mtp.stride={mtp.stride} leaves "
                "some out: leave it out, or set mtp.stride=1",
            )
        if mtp.rank > 1:
            alone = [self.asked for _, part in self.parts if part.of_state]
            alone += [] if self.train_head else ["objective.train_head=false"]
            _refuse(
                [*of_drafts, *alone],
                f"has no meaning with mtp.rank={mtp.rank}, whose depths and next token are one "
                "mixture and learn together: leave it out, or set mtp.rank=1",
            )
        if mtp.depth == 0:
            _refuse(
                [rule.asked for rule in self.rules],
                "has nothing to act on at mtp.depth=0: set mtp.depth to 1 or more, or leave it out",
            )

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
        flops += depths * sum(rule.flops(config.trunk.d_model) for rule in self.rules)
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
        of_depths = [measure for measure in self.measures if not measure.of_main]
        passes = int(len(of_depths) < len(self.measures))
        if active and any(measure.needs_teacher for measure in of_depths):
            # A pass of the main prediction for all, or for each.
            passes = len(active) if alone else 1
        if of_depths:
            passes += len(active)
        flops = passes * config.trunk.head_flops()
        if of_depths and alone:  # the heads are computed twice
            flops += config.mtp.module_flops(config.trunk, seq_len, active)
        return flops


def _refuse(asked: Sequence[str], why: str) -> None:
    if asked:
        raise UserError(f"{asked[0]} {why}.")


CROSS_ENTROPY = Objective(term=CrossEntropy())
"""What the depths learn where nothing else is said."""
