"""Corrections give heads the tokens between the branch point and the target, or only the last of
them.

    mlp        h^k = f_k(z) + A_k SiLU(W_k [z ; Emb(x_{t+1}) ; .. ; Emb(x_{t+k})])
    markov     h^k = f_k(z) + A_k T_k[x_{t+k}]
    selector   the logits of h^k = f_k(z) are rescored by x_{t+k} (``selector.py``)

where ``f_k(z)`` is the head's output. ``mlp`` is Hydra's (Ankner et al. 2024, arXiv 2402.05109,
section 3): the head reads all tokens since t. ``markov`` (arXiv 2607.05147) reads only the last
one, through a table ``T_k`` of r columns. The paper adds ``W2 T[x_{t+k}]`` to the logits, with a
separate matrix ``W2``; here ``W2 = U A_k`` with the shared head U. So the hidden state determines a
depth's prediction, and logits of all positions never exist at once. ``A_k`` starts at zero: every
head starts as if it had no correction.

A correction changes either a depth's hidden state (:class:`Correction`) or its logits
(:class:`~mtp_lightning.mtp.rescoring.Rescorer`). :data:`CORRECTIONS` names their classes, and may
be given another; the stack knows the two interfaces alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import BranchConfig, MTPConfig
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.mtp.rescoring import Rescorer
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear, ZeroLinear, embedding
from mtp_lightning.registry import imported
from mtp_lightning.settings import require_choice, require_whole

CORRECTIONS: dict[str, tuple[str, int | None]] = {
    "mlp": (f"{__name__}.TokensMLP", None),
    "markov": (f"{__name__}.Bigrams", 64),
    "selector": ("mtp_lightning.mtp.selector.Selector", 256),
}
"""A word's class, imported on demand, and its rank by default; None for one without a rank."""


@dataclass(frozen=True, kw_only=True)
class CorrectedConfig(MTPConfig):
    """Switches of heads that a correction can be added to.

    Attributes:
        correction: ``none``, or a word of :data:`CORRECTIONS`.
        correction_rank: r, columns of the tables of ``markov`` and ``selector``; None is 64 and
            256.
    """

    # The words that the heads support; None for all.
    supported_corrections: ClassVar[tuple[str, ...] | None] = None

    correction: str = "none"
    correction_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.supported_corrections or tuple(CORRECTIONS)
        require_choice("mtp.correction", self.correction, ["none", *words])
        if self.correction_rank is not None:
            require_whole("mtp.correction_rank", self.correction_rank, least=1)
            if self.columns is None:
                ranked = " or ".join(word for word in words if CORRECTIONS[word][1])
                raise UserError(
                    f"mtp.correction_rank={self.correction_rank} has no meaning with "
                    f"mtp.correction={self.correction}: set mtp.correction to {ranked}, or "
                    "mtp.correction_rank=null."
                )

    @property
    def columns(self) -> int | None:
        """r; None for a correction without a rank."""
        _, default = CORRECTIONS.get(self.correction, ("", None))
        return default if default is None or self.correction_rank is None else self.correction_rank

    def build_correction(
        self, trunk: TrunkConfig, n_states: int
    ) -> tuple[list[Correction], Rescorer | None]:
        """``n_states`` corrections of hidden states, and the correction of the logits, which all
        depths share; one of the two at most."""
        if self.correction == "none" or not self.depth:
            return [], None
        kind: Any = imported(CORRECTIONS[self.correction][0])
        if issubclass(kind, Rescorer):
            return [], kind(trunk, self.columns)
        return [kind(trunk, self.columns or k) for k in range(1, n_states + 1)], None


@dataclass(frozen=True, kw_only=True)
class SideBySideConfig(CorrectedConfig, BranchConfig):
    """Switches of heads side by side.

    Attributes:
        stride: s; depth k predicts ``x_{t+1+sk}`` (leap multi-token prediction, Liu et al. 2025,
            arXiv 2505.17505). Windows then reach s D tokens beyond the next one; the heads compute
            the same. Drafting needs a stride of 1.
    """

    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.stride", self.stride, least=1)
        if self.stride > 1 and self.correction != "none":
            raise UserError(
                f"mtp.stride={self.stride} skips tokens between the heads' targets, which "
                f"mtp.correction={self.correction} would have to read: set one of the two to its "
                "default."
            )

    def check_objective(self, draft_rules: Sequence[str], separate_training: Sequence[str]) -> None:
        if self.stride > 1 and draft_rules:
            raise UserError(
                f"{draft_rules[0]} depends on every token up to a depth's, and mtp.stride="
                f"{self.stride} skips some: leave it out, or set mtp.stride=1."
            )


class Correction(nn.Module):
    """A module whose output [B, T, C] is added to a head's state. It is called with the depth and
    the branch point; its last matrix reads ``width`` numbers."""

    def __init__(self, width: int, trunk: TrunkConfig) -> None:
        super().__init__()
        self.down = ZeroLinear(width, trunk.d_model)


class TokensMLP(Correction):
    """``mlp``, Hydra's: one hidden layer on the branch and the tokens since."""

    def __init__(self, trunk: TrunkConfig, k: int) -> None:
        super().__init__(trunk.d_model, trunk)
        self.up = Linear((k + 1) * trunk.d_model, trunk.d_model)

    def forward(self, k: int, inputs: StackInputs) -> Tensor:
        parts = [inputs.branch, *(inputs.embedded_at(j) for j in range(1, k + 1))]
        return self.down(F.silu(self.up(torch.cat(parts, dim=-1))))


class Bigrams(Correction):
    """``markov``: a table lookup of the last token, as wide as the rank."""

    def __init__(self, trunk: TrunkConfig, rank: int) -> None:
        super().__init__(rank, trunk)
        # Optimizers recognize a lookup table by this name (optim/groups.py).
        self.embedding = embedding(trunk.vocab_size, rank)

    def forward(self, k: int, inputs: StackInputs) -> Tensor:
        return self.after(inputs.tokens_at(k))

    def after(self, tokens: Tensor) -> Tensor:
        """What is added to the states [.., C] whose drafts follow these tokens [..]."""
        return self.down(self.embedding(tokens))
