"""Linear heads that predict the next tokens jointly, by a tensor of rank r (Basharin et al. 2024,
arXiv 2410.17765, section 3: a canonical polyadic decomposition).

    P(x_{t+1} .. x_{t+1+D}) = sum_a w_a prod_k p_a^k(x_{t+1+k}),    a = 1 .. r,  k = 0 .. D
    w = softmax(W h_t),    p_a^k = softmax(U (h_t + SiLU(W_{k,a} h_t)))

By the chain rule that is a prediction for each depth, given the true tokens before it,

    q^k(x) = sum_a w_a^k p_a^k(x),    w^0 = w,    w_a^k ~ w_a^(k-1) p_a^(k-1)(x_{t+k})

so that ``-log P = sum_k -log q^k``: L_k is the mean of ``-log q^k``, and with every lambda at 1 the
loss is the paper's. A draft of depth k is drawn from q^k given the drafts before it. The next token
is a mixture, too, by the weights w: its first component is the trunk's own prediction, the others
have a matrix each. Of one component nothing is left but ``mtp=linear`` (``linear.py``).

The first component of every depth starts as Medusa's, as a copy of the main prediction; the others
are drawn, since equal components would learn the same. The paper's auxiliary loss, which keeps the
components in even use, is not part of this.

Shapes: A components (r), X width of a packed mixture (``nn/mixture.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import BranchPoint, MTPConfig, MTPStack, RandomKey
from mtp_lightning.mtp.switches import Switches
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.mixture import pack, unpack
from mtp_lightning.settings import require_whole

# Numbers of one chunk of logits, where a text is read with the head in the depths' way.
_CHUNK_NUMEL = 2**21


def check_rank(config: MTPConfig) -> None:
    """Refuse a rank that is none, or another switch that more than one component makes no sense
    with.

    Raises:
        UserError: naming the switch and its value.
    """
    require_whole("mtp.rank", config.rank, least=1)
    if config.rank == 1:
        return
    usual, joined = Switches, f"mtp.rank={config.rank}"
    for name, why in (
        ("branch", "whose next token is predicted from the whole trunk"),
        ("detach", "whose depths share their components' weights with the next token"),
        ("freeze_trunk", "whose next token learns with the depths"),
        ("stride", "which reads the tokens between"),
        ("correction", "which lets the heads know the tokens before theirs in its own way"),
    ):
        default = getattr(usual, name, "none")
        if getattr(config, name) != default:
            raise UserError(
                f"mtp.{name}={_word(getattr(config, name))} has no meaning with {joined}, {why}: "
                f"set mtp.{name}={_word(default)}, or mtp.rank=1."
            )
    if config.depth == 0:
        raise UserError(
            f"{joined} has no tokens to join at mtp.depth=0: set mtp.depth to 1 or more, or "
            "mtp.rank=1."
        )


def _word(value: object) -> str:
    return str(value).lower()


class JointLinearMTP(MTPStack):
    """D + 1 depths of r components each, with one set of weights.

    Attributes:
        depths: of every depth, r matrices.
        next: of the next token, those of the components behind the first.
        weigh: what the components' weights are made by.
    """

    attends_back: ClassVar[bool] = False

    def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.d_model = trunk.d_model

        def matrices(n: int) -> nn.ModuleList:
            return nn.ModuleList(Linear(trunk.d_model, trunk.d_model) for _ in range(n))

        self.next = matrices(config.rank - 1)
        self.depths = nn.ModuleList(matrices(config.rank) for _ in range(config.depth))
        self.weigh = Linear(trunk.d_model, config.rank)

    @torch.no_grad()
    def initialise_own(self) -> None:
        for components in self.depths:
            assert isinstance(components, nn.ModuleList)
            first = components[0]
            assert isinstance(first, Linear)
            first.weight.zero_()

    def components(self, k: int, hidden_BTC: Tensor) -> Tensor:
        """The hidden states [B, T, A, C] of depth ``k``, 0 for the next token."""
        matrices = self.next if k == 0 else self.depths[k - 1]
        assert isinstance(matrices, nn.ModuleList)
        moved = [hidden_BTC + F.silu(matrix(hidden_BTC)) for matrix in matrices]
        return torch.stack(moved if k else [hidden_BTC, *moved], dim=-2)

    def log_weights(self, hidden_BTC: Tensor) -> Tensor:
        """``log w`` [B, T, A], fp32 at least."""
        logits_BTA = self.weigh(hidden_BTC)
        return logits_BTA.to(torch.promote_types(logits_BTA.dtype, torch.float32)).log_softmax(-1)

    def main_state(self, final_BTC: Tensor) -> Tensor:
        return pack(self.components(0, final_BTC), self.log_weights(final_BTC))

    def states(
        self, at: BranchPoint, active: Sequence[int], key: RandomKey | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        before = at.hidden
        for k in self.computed(active):
            before = self.depth_state(k, at, before)
            if k in active:
                yield k, before

    def depth_state(self, k: int, at: BranchPoint, previous_BTC: Tensor) -> Tensor:
        before_BTX = self.main_state(at.hidden) if k == 1 else previous_BTC
        hidden_BTAC, log_weights_BTA = unpack(before_BTX, self.d_model)
        said_BTA = _said(at, hidden_BTAC, at.tokens_at(k))
        log_weights_BTA = (log_weights_BTA + said_BTA).log_softmax(-1)
        return pack(self.components(k, at.hidden), log_weights_BTA)

    def state_width(self, d_model: int) -> int:
        return self.config.rank * (d_model + 1)

    def computed(self, active: Sequence[int]) -> list[int]:
        return list(range(1, max(active, default=0) + 1))

    def ahead(self, active: Sequence[int]) -> int:
        return max(active, default=0)


def _said(at: BranchPoint, hidden_BTAC: Tensor, tokens_BT: Tensor) -> Tensor:
    """How likely every component held a token, ``log p_a`` [B, T, A], some positions at a time."""
    assert at.head is not None, "weights of components rest on what the head makes of them"
    hidden_MAC, token_M = hidden_BTAC.flatten(0, 1), tokens_BT.flatten()
    rank, vocab = hidden_MAC.shape[1], at.head.weight.shape[0]
    rows = max(1, _CHUNK_NUMEL // (vocab * rank))
    found = []
    for h_RAC, token_R in zip(hidden_MAC.split(rows), token_M.split(rows), strict=True):
        log_p_RAV = at.head.log_probs(h_RAC)
        found.append(log_p_RAV.gather(-1, token_R[:, None, None].expand(-1, rank, 1)).squeeze(-1))
    return torch.cat(found).unflatten(0, tokens_BT.shape)
