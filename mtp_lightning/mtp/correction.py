"""What lets heads side by side see the tokens between: an addition to each one's hidden state.

    mlp      h^k = f_k(z) + A_k SiLU(W_k [z ; Emb(x_{t+1}) ; .. ; Emb(x_{t+k})])
    markov   h^k = f_k(z) + A_k T_k[x_{t+k}]

where ``f_k(z)`` is the head's own. ``mlp`` is Hydra's (Ankner et al. 2024, arXiv 2402.05109,
section 3): the head reads all tokens since t. ``markov`` (arXiv 2607.05147) reads the last one
alone, by a table ``T_k`` of r columns. The paper adds ``W2 T[x_{t+k}]`` to the logits, by a matrix
``W2`` of its own; here that is ``U A_k`` with the shared head U. So all that a depth says is in its
hidden state, and logits of all positions are needed nowhere. ``A_k`` starts at zero: every head
starts as it is without a correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import BranchPoint, MTPConfig
from mtp_lightning.mtp.switches import Detach
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear
from mtp_lightning.settings import require_choice, require_whole

Kind = Literal["none", "markov", "mlp"]

_RANK = 64


@dataclass(frozen=True, kw_only=True)
class SideBySideConfig(MTPConfig):
    """Switches of heads side by side.

    Attributes:
        detach: ``trunk`` stops the depths' gradients at the branch point; ``all`` also at the
            shared head and, of corrected heads, at the embedding.
        freeze_trunk: embedding, trunk and head keep their weights; only the heads are trained.
        correction: ``mlp`` adds what an MLP makes of branch and tokens since (Hydra), ``markov``
            what a table of rank ``correction_rank`` says of the last token.
        correction_rank: r, columns of ``markov``'s table; None is 64.
        stride: s; depth k predicts ``x_{t+1+sk}`` (leap multi-token prediction, Liu et al. 2025,
            arXiv 2505.17505). Windows then reach s D tokens beyond the next one; what a head
            computes is the same. Only 1 can draft.

    Raises:
        UserError: a switch has a value that it does not know, or nothing to act on.
    """

    detach: Detach = "none"
    freeze_trunk: bool = False
    correction: Kind = "none"
    correction_rank: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("mtp.correction", self.correction, get_args(Kind))
        if self.correction_rank is not None:
            require_whole("mtp.correction_rank", self.correction_rank, least=1)
            if self.correction != "markov":
                raise UserError(
                    f"mtp.correction_rank={self.correction_rank} has no meaning with "
                    f"mtp.correction={self.correction}: set mtp.correction=markov, or "
                    "mtp.correction_rank=null."
                )
        require_whole("mtp.stride", self.stride, least=1)
        if self.stride > 1 and self.correction != "none":
            raise UserError(
                f"mtp.stride={self.stride} leaves tokens out between the heads' targets, which "
                f"mtp.correction={self.correction} would have to read: set one of the two to its "
                "default."
            )

    @property
    def columns(self) -> int:
        """r."""
        return _RANK if self.correction_rank is None else self.correction_rank

    def build_corrections(self, trunk: TrunkConfig) -> list[Correction]:
        """One a depth; none at all without a correction."""
        depths = range(1, self.depth + 1)
        if self.correction == "mlp":
            return [TokensMLP(trunk, k) for k in depths]
        if self.correction == "markov":
            return [Bigrams(trunk, self.columns) for _ in depths]
        return []

    def correction_params(self, trunk: TrunkConfig) -> int:
        """Weights of all depths together."""
        c, rank = trunk.d_model, self.columns
        if self.correction == "mlp":
            return sum((k + 2) * c * c for k in range(1, self.depth + 1))
        return self.depth * rank * (trunk.vocab_size + c) if self.correction == "markov" else 0

    def correction_flops(self, trunk: TrunkConfig, k: int) -> int:
        """Forward FLOPs of one position of depth ``k``."""
        c = trunk.d_model
        if self.correction == "mlp":
            return 2 * (k + 2) * c * c
        return 2 * c * self.columns if self.correction == "markov" else 0

    def correction_backward_flops(self, trunk: TrunkConfig, k: int) -> int:
        """Backward FLOPs of the same: no gradient leads on to a trunk that takes none."""
        cut = self.freeze_trunk or self.detach == "all"
        saved = 2 * (k + 1) * trunk.d_model**2 if cut and self.correction == "mlp" else 0
        return 2 * self.correction_flops(trunk, k) - saved


class Correction(nn.Module):
    """What is added to a head's state: called with the depth and the branch point, [B, T, C].

    Args:
        width: of what the last matrix reads.
        trunk: whose width it gives.
    """

    def __init__(self, width: int, trunk: TrunkConfig) -> None:
        super().__init__()
        self.down = Linear(width, trunk.d_model)

    @torch.no_grad()
    def initialise_own(self) -> None:
        """Start at zero."""
        self.down.weight.zero_()


class TokensMLP(Correction):
    """Hydra's: one hidden layer on the branch and the tokens since."""

    def __init__(self, trunk: TrunkConfig, k: int) -> None:
        super().__init__(trunk.d_model, trunk)
        self.up = Linear((k + 1) * trunk.d_model, trunk.d_model)

    def forward(self, k: int, at: BranchPoint) -> Tensor:
        parts = [at.hidden, *(at.embedded_at(j) for j in range(1, k + 1))]
        return self.down(F.silu(self.up(torch.cat(parts, dim=-1))))


class Bigrams(Correction):
    """A table of the last token, as wide as the rank."""

    def __init__(self, trunk: TrunkConfig, rank: int) -> None:
        super().__init__(rank, trunk)
        # By this name optimizers know a table that is looked up from a matrix.
        self.embedding = nn.Embedding(trunk.vocab_size, rank)

    def forward(self, k: int, at: BranchPoint) -> Tensor:
        return self.down(self.embedding(at.tokens_at(k)))
