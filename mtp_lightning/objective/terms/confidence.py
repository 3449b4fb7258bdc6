"""Every depth learns to estimate the acceptance of its draft (DSpark, arXiv 2607.05147)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.mtp.base import Confidence, MTPStack
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.objective.terms.tv import acceptance


class ConfidenceTerm(Term):
    """``BCE(Linear(h^k), sg alpha_k)`` with ``alpha = sum_v min(p_v, q_v)``, q as drafted
    (``objective.confidence=true``)."""

    name = "confidence"
    needs_teacher = True
    of_state = True
    follows_weights = False
    selectable = False  # selected by a switch of the objective, as it needs a part of the model

    def __init__(self, stack: MTPStack) -> None:
        assert stack.confidence is not None
        self.head: Confidence = stack.confidence
        self.stack, self.reads_before = stack, stack.rescorer is not None

    @property
    def parameters(self) -> Sequence[nn.Parameter]:  # type: ignore[override]
        return list(self.head.parameters())

    def value(self, chunk: Chunk) -> Tensor:
        logit_R, alpha_R = self._both(chunk)
        return F.binary_cross_entropy_with_logits(logit_R, alpha_R, reduction="none")

    def _both(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The logit of the confidence and the true acceptance, [R] each."""
        assert chunk.hidden_RC is not None
        with torch.no_grad():
            q_RV = chunk.log_probs_RV.exp()
            if self.reads_before:
                assert chunk.before_R is not None
                q_RV = self.stack.rescore(
                    chunk.depth, chunk.hidden_RC, chunk.log_probs_RV, chunk.before_R
                ).softmax(-1)
            alpha_R = acceptance(chunk.teacher.probs_RV, q_RV)
        return self.head(chunk.depth, chunk.hidden_RC.to(alpha_R.dtype)), alpha_R.clamp(max=1)


class ConfidenceError(ConfidenceTerm):
    """Absolute error of the confidence, ``|sigmoid(logit) - alpha|``: logged, not trained on."""

    name = "confidence_error"
    follows_mask = False
    parameters = ()  # type: ignore[assignment]

    def tag(self, k: int) -> str:
        return f"confidence/error_depth_{k}"

    def value(self, chunk: Chunk) -> Tensor:
        logit_R, alpha_R = self._both(chunk)
        return (logit_R.sigmoid() - alpha_R).abs()
