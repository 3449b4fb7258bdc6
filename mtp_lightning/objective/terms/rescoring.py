"""The loss of a stack's rescorer (``mtp/rescoring.py``), in addition to the objective's terms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mtp_lightning.mtp.chunk import StateGradient, TermGradients
from mtp_lightning.mtp.rescoring import Rescorer
from mtp_lightning.objective.terms.base import Chunk, Term


class RescoringTerm(Term):
    """The loss that a stack's rescorer brings."""

    name = "rescoring"
    of_state = True
    reads_before = True
    selectable = False  # selected by a switch of the stack

    def __init__(self, rescorer: Rescorer) -> None:
        self.rescorer = rescorer

    @property
    def parameters(self) -> Sequence[nn.Parameter]:  # type: ignore[override]
        return list(self.rescorer.parameters())

    def tag(self, k: int) -> str:
        return f"train/loss_depth_{k}/{self.rescorer.name}"

    def value(self, chunk: Chunk) -> Tensor:
        return self.rescorer.value(chunk)

    def state_gradient(self, chunk: Chunk, factor_R: Tensor, into: TermGradients) -> StateGradient:
        return self.rescorer.state_gradient(chunk, factor_R, into)
