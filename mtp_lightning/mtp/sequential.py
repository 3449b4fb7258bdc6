"""DeepSeek-V3's sequential modules (report, section 2.2, eq. 21-25): a causal chain of depths.

    x^k_i = eh_proj([enorm(Emb(t_{i+k})) ; hnorm(h^{k-1}_i)])
    h^k   = norm_k(Block_k(x^k))          (mtp.blocks of them, one after another)

Embedding and output head are the trunk's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.windows import RandomKey
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.config import BranchConfig, Concat, Init, InputNorm
from mtp_lightning.mtp.inputs import StackInputs, TrunkText
from mtp_lightning.mtp.kinds import Chain
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.head import Head
from mtp_lightning.nn.init import generator
from mtp_lightning.nn.linear import Linear
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.trunk import Trunk
from mtp_lightning.settings import require_number, require_whole


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(BranchConfig, variant="sequential"):
    """Switches of the sequential stack; where systems differ, the default is DeepSeek-V3's.

    Attributes:
        input_norm: ``post`` gives depth 1 the state after the trunk's final norm (Megatron,
            transformers, vLLM), ``pre`` the state before it (torchtitan, MaxText).
        concat: order of the two halves of ``eh_proj``'s input. ``embedding_first`` is that of the
            released weights, ``hidden_first`` that of the report's equation (and MiMo).
        share_layers: one module is applied D times (FastMTP; Megatron mtp_use_repeated_layer).
        blocks: blocks of a module, one after another. DeepSeek's modules have one, and so have all
            layouts of other programs.
        hidden_state_mixing: in training, every position of depth k >= 2 reads a hidden state drawn
            uniformly from those of depth k - 1, of the earlier depths and of the trunk, each taken
            where it has read the same tokens (Megatron mtp_hsm).
        token_dropout: probability, for each position of a depth in training, that a learned vector
            replaces the token's embedding. At 0 the modules are DeepSeek's; at 1 they never see a
            token, like heads side by side: a continuum between the two families (this project's
            own).
        init: initialization of modules that ``init_from`` does not provide. ``random`` draws a
            module at random and copies the trunk's final norm; ``last_block`` also copies the
            trunk's last block and fits the projection before it to some text (``last_block.py``).
    """

    meaning: ClassVar[tuple[str, ...]] = ("branch", "input_norm", "concat", "blocks")

    input_norm: InputNorm = "post"
    concat: Concat = "embedding_first"
    share_layers: bool = False
    blocks: int = 1
    hidden_state_mixing: bool = False
    token_dropout: float = 0.0
    init: Init = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("mtp.blocks", self.blocks, least=1)
        require_number("mtp.token_dropout", self.token_dropout, least=0, most=1)
        if self.hidden_state_mixing and self.depth < 2:
            raise UserError(
                f"mtp.hidden_state_mixing=true has nothing to mix at mtp.depth={self.depth}: "
                "set mtp.depth to 2 or more, or mtp.hidden_state_mixing=false."
            )

    def build(self, trunk: TrunkConfig) -> SequentialMTP:
        return SequentialMTP(self, trunk)

    @property
    def n_modules(self) -> int:
        """Number of modules."""
        return min(self.depth, 1) if self.share_layers else self.depth


class SequentialModule(nn.Module):
    """One depth: two input norms, a projection from 2 C to C, its blocks, an output norm."""

    def __init__(self, config: SequentialConfig, trunk: TrunkConfig) -> None:
        super().__init__()
        self.hidden_first = config.concat == "hidden_first"
        self.enorm = RMSNorm(trunk.d_model, trunk.norm_eps)
        self.hnorm = RMSNorm(trunk.d_model, trunk.norm_eps)
        self.eh_proj = Linear(2 * trunk.d_model, trunk.d_model)
        # The blocks before the last one; none in DeepSeek's modules.
        self.before = nn.ModuleList(Block(trunk) for _ in range(config.blocks - 1))
        self.block = Block(trunk)
        self.norm = RMSNorm(trunk.d_model, trunk.norm_eps)

    def forward(self, hidden_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext) -> Tensor:
        h_BTC = self.eh_proj(self.joined(hidden_BTC, embedded_BTC))
        for layer, block in enumerate(self.blocks):
            h_BTC = block(h_BTC, ctx, layer)
        return self.norm(h_BTC)

    @property
    def blocks(self) -> list[nn.Module]:
        """The module's blocks, in order."""
        return [*self.before, self.block]

    def joined(self, hidden_BTC: Tensor, embedded_BTC: Tensor) -> Tensor:
        """The input of ``eh_proj``, [B, T, 2 C]."""
        halves = [self.enorm(embedded_BTC), self.hnorm(hidden_BTC)]
        if self.hidden_first:
            halves.reverse()
        return torch.cat(halves, dim=-1)

    @property
    def hidden_half(self) -> slice:
        """The columns of ``eh_proj``'s input that hold the hidden state."""
        width = self.eh_proj.weight.shape[0]
        return slice(0, width) if self.hidden_first else slice(width, 2 * width)


class SequentialMTP(Chain):
    """D modules, or one applied D times."""

    config: SequentialConfig

    def __init__(self, config: SequentialConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.cached_blocks, self.repeats = config.blocks, config.n_modules == 1
        self.depths = nn.ModuleList(
            SequentialModule(config, trunk) for _ in range(config.n_modules)
        )
        if config.token_dropout and config.depth:
            # A matrix, so that it is initialized like an embedding.
            self.blank = nn.Parameter(torch.empty(1, trunk.d_model))

    def module(self, k: int) -> SequentialModule:
        """The module that computes depth ``k``."""
        return cast(SequentialModule, self.depths[0 if len(self.depths) == 1 else k - 1])

    def step(
        self, k: int, previous_BTC: Tensor, embedded_BTC: Tensor, ctx: ForwardContext
    ) -> Tensor:
        return self.module(k)(previous_BTC, embedded_BTC, ctx)

    def token_input(self, k: int, inputs: StackInputs) -> Tensor:
        embedded_BTC = super().token_input(k, inputs)
        p = self.config.token_dropout
        if p == 0 or (p < 1 and inputs.key is None):
            return embedded_BTC
        blank_BTC = self.blank.to(embedded_BTC.dtype).expand_as(embedded_BTC)
        if inputs.key is None or p == 1:
            return blank_BTC
        batch, seq_len, _ = embedded_BTC.shape
        dropped_BT = _to_device(draw_dropped(k, p, batch, seq_len, inputs.key), embedded_BTC.device)
        return torch.where(dropped_BT.unsqueeze(-1), blank_BTC, embedded_BTC)

    def states(self, inputs: StackInputs, active: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        if inputs.key is None or not self.config.hidden_state_mixing:
            yield from super().states(inputs, active)
            return
        history = [inputs.branch]
        for k in self.with_prerequisites(active):
            history.append(self.depth_state(k, inputs, _mixed(k, history, inputs.key)))
            if k in active:
                yield k, history[-1]

    @property
    def reads_tokens(self) -> bool:
        return super().reads_tokens and self.config.token_dropout < 1

    @torch.no_grad()
    def init_from_trunk(
        self, fresh: Collection[int], trunk: Trunk, head: Head, text: TrunkText | None
    ) -> None:
        from mtp_lightning.mtp.last_block import copy_last_blocks, fit_projection

        for i in fresh:
            self.module(i + 1).norm.load_state_dict(trunk.norm.state_dict())
        if self.config.init == "random":
            return
        assert text is not None
        hidden = text.inputs.branch
        for k in range(1, len(self.depths) + 1):  # a shared module is fitted as depth 1
            module = self.module(k)
            tokens = self.token_input(k, text.inputs)
            if k - 1 in fresh:
                copy_last_blocks(module.blocks, trunk)
                x, y = text.projection_pairs(k, module.joined(hidden, tokens))
                module.eh_proj.weight.copy_(fit_projection(x, y, module.hidden_half))
            hidden = module(hidden, tokens, text.inputs.ctx)


def _mixed(k: int, history: Sequence[Tensor], key: RandomKey) -> Tensor:
    """The hidden state [B, T, C] that depth ``k`` reads with ``hidden_state_mixing``, from the
    branch and the hidden states of the depths before it."""
    mixed = newest = history[-1]
    if k == 1:
        return newest
    batch, seq_len, _ = newest.shape
    back_BT = _to_device(draw_states_back(k, batch, seq_len, key), newest.device)
    for back in range(1, k):
        # Depth k - 1 at i has read the tokens up to i + k - 1, and so has the depth `back` levels
        # shallower at i + back. Beyond the window's end, the newest state is used.
        aligned = F.pad(history[k - 1 - back][:, back:], (0, 0, 0, min(back, seq_len)))
        mixed = torch.where((back_BT == back).unsqueeze(-1), aligned, mixed)
    return mixed


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor drawn on the CPU to a device without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _generators(key: RandomKey, purpose: str, k: int, rows: int) -> list[torch.Generator]:
    """A generator for each of the micro-batch's windows, named by ``purpose``; ``k`` is the
    depth that it is for."""
    names = (f"{purpose}:{key.step}:{k}:{key.first_row + row}" for row in range(rows))
    return [generator(key.seed, name) for name in names]


def draw_dropped(k: int, p: float, batch: int, seq_len: int, key: RandomKey) -> Tensor:
    """Which positions of depth k read no token: bool [B, T] on the CPU."""
    rows = _generators(key, "token_dropout", k, batch)
    return torch.stack([torch.rand(seq_len, generator=row) for row in rows]) < p


def draw_states_back(k: int, batch: int, seq_len: int, key: RandomKey) -> Tensor:
    """How many depths before k - 1 every position's input is taken from: int64 [B, T] on the CPU.

    Uniform in 0 .. k - 1, and 0 if the window holds no such state.
    """
    rows = _generators(key, "hidden_state_mixing", k, batch)
    back_BT = torch.stack([torch.randint(0, k, (seq_len,), generator=row) for row in rows])
    exists_BT = torch.arange(seq_len) + back_BT < seq_len
    return back_BT.where(exists_BT, torch.zeros_like(back_BT))
