"""Register tokens (MuToR: Gerontopoulos et al. 2025, arXiv 2505.10518, section 3).

In training a register follows every token. All registers of a step predict ``d`` tokens ahead, with
d drawn uniformly from 1 .. d_max. The register of token j has the target ``x_{j+d}`` and the rotary
position ``j + d - 1``, that of the token before its target. It attends to the tokens up to j and to
itself, and no other position attends to it. So the tokens' states are those without registers, and
validation and decoding have none.

Tokens and registers go through the trunk in one pass, [tokens ; registers], ordered by positions
and mask. That doubles the positions of the trunk and quadruples attention's share. All registers
start from one learned vector; their positions tell the trunk which d is meant.

Registers change the main prediction's states only by rounding: a mask that is not causal uses
PyTorch's attention kernel, where windows of tokens alone may use another. The contents of registers
change no bit, except with experts, whose products round by the number of tokens that each gets.

Routers of experts treat registers like tokens: both count in loads, biases and the sequence-wise
balance loss.

Shapes: B batch, T tokens of a window, C d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.inputs import StackInputs
from mtp_lightning.mtp.kinds import TrainingOnly, TrainingOnlyConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.init import generator
from mtp_lightning.nn.rope import rope_table
from mtp_lightning.nn.trunk import Trunk


@dataclass(frozen=True, kw_only=True)
class RegistersConfig(TrainingOnlyConfig, variant="registers"):
    """``mtp=registers``: one further loss, from registers that predict a token further ahead.

    Attributes:
        lookahead: d_max, how far ahead the farthest target is; at most T + 1.
    """

    lookahead: int = 4

    def build(self, trunk: TrunkConfig) -> Registers:
        return Registers(self, trunk)

    def check_window(self, seq_len: int) -> None:
        if self.lookahead > seq_len + 1:
            raise UserError(
                f"mtp.lookahead={self.lookahead} is beyond the windows, which hold data.seq_len + "
                f"1 = {seq_len + 1} tokens ahead: lower it, or lengthen the window."
            )


class Registers(TrainingOnly):
    """The learned vector that all registers start from."""

    def __init__(self, config: RegistersConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.trunk_config = trunk
        # A matrix, so that it is initialized like an embedding.
        self.register = nn.Parameter(torch.empty(1, trunk.d_model))

    def states(self, inputs: StackInputs, active: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        # Without random choices (in validation) there are no registers.
        return iter(()) if inputs.key is None else super().states(inputs, active)

    def offset(self, key: RandomKey) -> int:
        """d, the same for all windows of a step, on every rank."""
        rng = generator(key.seed, f"registers:{key.step}")
        return int(torch.randint(1, self.config.lookahead + 1, (), generator=rng))

    def targets(self, k: int, batch: WindowBatch) -> Tensor:
        if k == 0:
            return batch.targets(0)
        assert batch.key is not None, "registers exist only in training, where d is drawn"
        return batch.targets(self.offset(batch.key) - 1)

    def through_trunk(
        self, trunk: Trunk, embedded_BTC: Tensor, ctx: ForwardContext, key: RandomKey | None
    ) -> tuple[Tensor, Tensor]:
        if key is None:
            final_BTC = trunk(embedded_BTC, ctx).final
            return final_BTC, final_BTC
        seq_len = embedded_BTC.shape[1]
        registers_BTC = self.register.to(embedded_BTC.dtype).expand_as(embedded_BTC)
        both = torch.cat((embedded_BTC, registers_BTC), dim=1)
        final = trunk(both, self.context(ctx, seq_len, self.offset(key))).final
        return final[:, :seq_len], final[:, seq_len:]

    def context(self, tokens: ForwardContext, seq_len: int, d: int) -> ForwardContext:
        """The context of the 2 T positions of [tokens ; registers], from that of the T tokens."""
        config, device = self.trunk_config, tokens.cos.device
        places_T = torch.arange(seq_len, device=device)
        places = torch.cat((places_T, places_T + d - 1))
        cos, sin = rope_table(places, **config.rotary, dtype=tokens.cos.dtype)
        sees = tokens.dense_mask()
        itself = torch.eye(seq_len, dtype=torch.bool, device=device).expand_as(sees)
        by_token = torch.cat((sees, torch.zeros_like(sees)), dim=-1)
        mask = torch.cat((by_token, torch.cat((sees, itself), dim=-1)), dim=-2)
        return replace(tokens, cos=cos.unsqueeze(-2), sin=sin.unsqueeze(-2), mask=mask)
