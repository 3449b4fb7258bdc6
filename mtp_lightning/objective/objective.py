"""The objective of the MTP depths: a term or a mixture of terms, and rules for its positions.

``L_k = sum_TERM weight_TERM * L_k/TERM``, and each ``L_k/TERM`` is a mean over the positions of
depth k that count for the term: those with a valid target and, if the term compares with a teacher,
with a teacher (``WindowBatch.positions_with_teacher``).

Shapes: B batch, T positions, K = D + 1 depths, P terms.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig, MTPStack
from mtp_lightning.objective.plan import PositionCounts, StepPlan
from mtp_lightning.objective.rules.base import Measures, PositionMeasure, Rule, select_rules
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.settings import require_bool, require_whole

_MAIN_TERM = CrossEntropy()
# The rules of a setting by its words: their class in rules/, and the settings that they read.
_MASKS = {"entropy": ("entropy_mask.EntropyMask", ("tau", "quantile"))}
_WEIGHTS = {
    "exp_decay": ("position_weights.ExpDecay", ("decay",)),
    "acceptance": ("position_weights.Acceptance", ("smoothing",)),
}


class Objective:
    """The group ``objective``: terms, and rules that change the targets position by position.

    Args:
        term: the depths' term; the main prediction keeps cross-entropy.
        train_head: whether the depths' losses train the shared head; if not, only the hidden states
            get their gradients.
        weights, decay, smoothing: ``none``, ``exp_decay`` or ``acceptance``, and the settings of
            these two (``rules/position_weights.py``); None for their defaults.
        mask, tau, quantile: ``none`` or ``entropy``, and its settings (``rules/entropy_mask.py``).
        confidence: whether depths learn to estimate the acceptance of their drafts
            (``terms/confidence.py``).
        draft_vocab: N, with a frozen trunk: the depths are trained on the first N token ids alone.
            Only these rows of the head are computed, and teachers are conditional on these tokens;
            positions with another target add nothing. None for all tokens.

    Attributes:
        terms: those that are computed, each with its weight.
        rules: the rules, in the order in which they change the targets.

    Raises:
        UserError: an option has an unknown value, or a value that nothing reads.
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
        draft_vocab: int | None = None,
    ) -> None:
        self.train_head = require_bool("objective.train_head", train_head)
        self.confidence = require_bool("objective.confidence", confidence)
        if draft_vocab is not None:
            require_whole("objective.draft_vocab (null for all tokens)", draft_vocab, least=2)
        self.term, self.draft_vocab = term, draft_vocab
        self._selected_rules = [
            *select_rules("mask", mask, _MASKS, tau=tau, quantile=quantile),
            *select_rules("weights", weights, _WEIGHTS, decay=decay, smoothing=smoothing),
        ]
        self._set_terms(term.parts())

    def _set_terms(self, terms: Iterable[tuple[float, Term]]) -> None:
        self.terms = list(terms)
        own = (rule for _, part in self.terms for rule in part.rules(self.setting))
        self.rules: list[Rule] = [*self._selected_rules, *own]

    @classmethod
    def options(cls) -> list[str]:
        """The keys of the group that are not the term's own."""
        return [name for name in inspect.signature(cls).parameters if name != "term"]

    @property
    def setting(self) -> str:
        """The setting that selects its term, for messages."""
        return self.term.setting

    def for_model(self, model: MTPModel) -> Objective:
        """The objective with the additional terms that train a part of ``model``.

        Raises:
            UserError: the model cannot be trained on ``draft_vocab`` tokens.
        """
        self._check_draft_vocab(model)
        bound = copy(self)
        bound._set_terms((weight, term.for_model(model)) for weight, term in self.term.parts())
        if self.confidence and model.mtp.confidence is not None:
            from mtp_lightning.objective.terms.confidence import ConfidenceError, ConfidenceTerm

            bound.terms += [(1.0, ConfidenceTerm(model.mtp)), (0.0, ConfidenceError(model.mtp))]
        if model.mtp.rescorer is not None:
            from mtp_lightning.objective.terms.rescoring import RescoringTerm

            bound.terms.append((1.0, RescoringTerm(model.mtp.rescorer)))
        return bound

    @property
    def measures(self) -> list[PositionMeasure]:
        """The measures that a prepass computes for the rules, each once."""
        by_name = {measure.name: measure for rule in self.rules for measure in rule.measures}
        return list(by_name.values())

    def targets(self, stack: MTPStack, plan: StepPlan, batch: WindowBatch) -> list[DepthTarget]:
        """The main prediction's target over one of the plan's micro-batches, then those of every
        depth with a factor: one for each term that has a position in the step."""
        factors, counts = plan.factors, plan.counts
        tokens_BT = self._tokens(_MAIN_TERM, stack, 0, batch)
        targets = [DepthTarget(0, tokens_BT, factors[0] / counts.valid[0], _MAIN_TERM)]
        for k in plan.active:
            for index, (weight, term) in enumerate(self.terms):
                count = counts.of(k, term)
                if not count:
                    continue
                tokens_BT = self._tokens(term, stack, k, batch)
                # Before a depth's target is the target of the depth before.
                before_BT = batch.shifted(batch.tokens, k - 1) if term.reads_before else None
                scale, shift = factors[k] * weight / count, batch.stride * k
                targets.append(
                    DepthTarget(k, tokens_BT, scale, term, index, shift=shift, before=before_BT)
                )
        return targets

    def _tokens(self, term: Term, stack: MTPStack, k: int, batch: WindowBatch) -> Tensor:
        """``[B, T]`` target tokens of depth k for a term; -100 at positions that do not count, such
        as those without a teacher, or with a target beyond ``draft_vocab``."""
        tokens_BT = stack.targets(k, batch)
        if term.needs_teacher:
            tokens_BT = tokens_BT.clone()
            tokens_BT[:, batch.positions_with_teacher(k) :] = IGNORE_INDEX
        elif term.counts_padding:
            tokens_BT = tokens_BT.clamp(min=0)
        if self.draft_vocab is None:
            return tokens_BT
        return tokens_BT.masked_fill(tokens_BT >= self.draft_vocab, IGNORE_INDEX)

    def apply_rules(self, targets: Sequence[DepthTarget], values: Measures) -> list[DepthTarget]:
        """The targets after all rules; ``values`` are those of :attr:`measures`."""
        targets = list(targets)
        for rule in self.rules:
            targets = rule.apply(targets, values)
        return targets

    def after_backward(self) -> dict[str, float]:
        """Let the rules learn from an optimizer step; returns values to log."""
        return {tag: value for rule in self.rules for tag, value in rule.after_backward().items()}

    def state_dict(self) -> dict[str, Any]:
        """The state of all rules, in plain containers."""
        return {key: value for rule in self.rules for key, value in rule.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; the state of absent rules is ignored."""
        for rule in self.rules:
            rule.load_state_dict(state)

    def term_losses(self, sums_KP: Tensor, counts: PositionCounts) -> Tensor:
        """The mean loss of every depth and term [D + 1, P], from the step's summed losses, with the
        main prediction's in the first column; 0 where nothing was counted."""
        losses_KP = sums_KP.clone()
        losses_KP[0, 0] /= max(counts.valid[0], 1)
        for k in range(1, len(counts.valid)):
            for index, (_, term) in enumerate(self.terms):
                losses_KP[k, index] /= max(counts.of(k, term), 1)
        return losses_KP

    def depth_losses(self, losses_KP: Tensor) -> Tensor:
        """The loss of every depth [D + 1]: the weighted sum of its terms."""
        weighted = [losses_KP[1:, i] * weight for i, (weight, _) in enumerate(self.terms)]
        return torch.cat((losses_KP[:1, 0], torch.stack(weighted).sum(0)))

    def log_values(self, losses_KP: Tensor, depths: Sequence[int]) -> dict[str, Tensor]:
        """The losses of every term at some depths, by log tag; empty for a single term."""
        if len(self.terms) == 1:
            return {}
        terms = [term for _, term in self.terms]
        return {term.tag(k): losses_KP[k, i] for k in depths for i, term in enumerate(terms)}

    def check(self, mtp: MTPConfig) -> None:
        """Raise a ``UserError`` for a stack with which the objective or one of its options has no
        meaning."""
        # What is set, as it is typed, by what it needs; a default is an empty list.
        own = [] if self.term.of_token else [self.setting]
        head = [] if self.train_head else ["objective.train_head=false"]
        confidence = ["objective.confidence=true"] if self.confidence else []
        rules = [rule.setting for rule in self.rules]
        of_drafts = [*confidence, *(rule.setting for rule in self.rules if rule.of_drafts)]
        vocab = [] if self.draft_vocab is None else [f"objective.draft_vocab={self.draft_vocab}"]
        settings = own + head + confidence + rules + vocab
        if mtp.depth and not mtp.predicts_tokens and settings:
            raise UserError(
                f"{settings[0]} is for depths that predict a token, and mtp={mtp.variant} has its "
                "own loss: leave it out."
            )
        if vocab and of_drafts:
            raise UserError(
                f"{of_drafts[0]} follows a draft from token to token, and {vocab[0]} leaves out "
                "tokens, which have no draft: leave one of the two out."
            )
        of_state = [self.setting for _, term in self.terms if term.of_state]
        mtp.check_objective(of_drafts, of_state + head)
        if mtp.depth == 0 and (idle := confidence + rules):
            raise UserError(
                f"{idle[0]} has nothing to act on at mtp.depth=0: set mtp.depth to 1 "
                "or more, or leave it out."
            )

    def _check_draft_vocab(self, model: MTPModel) -> None:
        mtp, vocab, reason = model.config.mtp, model.config.trunk.vocab_size, None
        if self.draft_vocab is None:
            return
        if mtp.trains_trunk:
            reason = f"leaves out what the trunk is trained on: {mtp.how_to_freeze}"
        elif mtp.depths_are_mixed:
            reason = f"leaves out tokens that mtp.rank={mtp.rank} depends on: set mtp.rank=1"
        elif model.head_of(1) is not model.head:
            reason = (
                f"shortens the shared head, and mtp={mtp.variant} has one of its own: shorten that"
            )
        elif self.draft_vocab > vocab:
            reason = f"is more than the model's {vocab} tokens: use at most that many"
        if reason is not None:
            raise UserError(f"objective.draft_vocab={self.draft_vocab} {reason}, or leave it null.")


CROSS_ENTROPY = Objective(term=CrossEntropy())
"""The default objective."""
