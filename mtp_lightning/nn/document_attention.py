"""Attention within documents, block by block (FlexAttention, Dong et al. 2024, arXiv 2412.05496).

A dense mask of [B, T, T] prevents flash kernels on a GPU, although it hides most pairs: later
tokens and other documents. A block mask instead lists the blocks of 128 x 128 that hold a visible
pair, and the compiler makes a kernel that visits only these. The kernel exists for compiled blocks
on a GPU; everything else uses the dense mask. (Finding the blocks builds a dense mask once per
pass, for all layers and depths.)

Shapes: B batch, T positions, N heads, M key-value heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

MIN_WIDTH = 16
"""Smallest head size that the kernel supports."""


def dense_mask(documents_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T]: True where a query attends to a key, of the same document and not
    later."""
    same_document = documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2)
    return same_document.tril_().unsqueeze(1)


def block_mask(documents_BT: Tensor) -> BlockMask:
    """:func:`dense_mask` as a block mask."""
    documents_BT = documents_BT.contiguous()

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents_BT[b, query] == documents_BT[b, key])

    batch, seq_len = documents_BT.shape
    return create_block_mask(sees, batch, None, seq_len, seq_len, device=documents_BT.device)


def to_dense(mask: BlockMask) -> Tensor:
    """The dense mask of a block mask."""
    batch, _, queries, keys = mask.shape
    device = mask.kv_num_blocks.device
    return create_mask(mask.mask_mod, batch, 1, queries, keys, device=device)


def document_attention(
    query_BTNH: Tensor, key_BTMH: Tensor, value_BTMH: Tensor, mask: BlockMask
) -> Tensor:
    """``softmax(q k^T / sqrt(H) + mask) v`` with a mask of :func:`block_mask`: [B, T, N, H] of the
    values' width; query head n reads key head n // (N / M)."""
    device = query_BTNH.device.type
    heads = [x.transpose(1, 2) for x in (query_BTNH, key_BTMH, value_BTMH)]
    if torch.is_autocast_enabled(device):  # not every version of PyTorch casts by itself here
        dtype = torch.get_autocast_dtype(device)
        heads = [x.to(dtype) for x in heads]
    query, key, value = heads
    enable_gqa = query.shape[1] != key.shape[1]
    mixed = flex_attention(query, key, value, block_mask=mask, enable_gqa=enable_gqa)
    return mixed.transpose(1, 2)
