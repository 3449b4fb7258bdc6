"""Attention of blocks of positions, one block after every token of whole windows.

A block of J queries follows each of the T tokens. Its queries attend to the entries of the tokens
that its token attends to, and to the entries of their own block.

Shapes: B batch, T tokens, J positions of a block, N heads, M key heads, G = N / M, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.rope import rope_table

Entry = tuple[Tensor, Tensor]
"""Rotated keys, and values."""


def block_rotary(
    trunk: TrunkConfig, tokens: int, width: int, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The rotary table [P, H/2] of blocks of ``width`` positions after each of ``tokens`` tokens,
    of the device and dtype of ``like``; P = T J, those after the first token first."""
    positions = torch.arange(tokens, device=like.device).unsqueeze(1)
    positions = positions + torch.arange(1, width + 1, device=like.device)
    return rope_table(positions.flatten(), **trunk.rotary, dtype=like.dtype)


def attend_blocks(
    query_BTJNH: Tensor,
    of_tokens: Entry,
    of_blocks: Entry,
    sees: Tensor,
    sees_own: Tensor | None = None,
) -> Tensor:
    """The mixed values of all blocks' queries, [B, T, J, N, H].

    Args:
        of_tokens: [B, T, M, H] each.
        of_blocks: [B, T, J, M, H] each.
        sees: bool [1 | B, 1, T, T], True where a token attends to another.
        sees_own: bool [J, J], True where a query attends to a position of its block; None for all.
    """
    (key, value), (own_key, own_value) = of_tokens, of_blocks
    query = query_BTJNH.unflatten(3, (key.shape[2], -1))
    query = query / math.sqrt(query.shape[-1])
    scores = torch.einsum("btjmgh,bsmh->bmgjts", query, key)
    scores = scores.masked_fill(~sees[:, :, None, None], -math.inf)
    own_scores = torch.einsum("btjmgh,btemh->bmgjte", query, own_key)
    if sees_own is not None:
        own_scores = own_scores.masked_fill(~sees_own.unsqueeze(1), -math.inf)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.cat((scores, own_scores), dim=-1).softmax(-1, dtype=dtype).to(value.dtype)
    token_weights, own_weights = weights.split([key.shape[1], own_key.shape[2]], dim=-1)
    mixed = torch.einsum("bmgjts,bsmh->btjmgh", token_weights, value)
    mixed = mixed + torch.einsum("bmgjte,btemh->btjmgh", own_weights, own_value)
    return mixed.flatten(3, 4)
