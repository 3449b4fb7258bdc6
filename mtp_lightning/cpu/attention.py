"""Causal attention over whole windows that skips hidden keys.

PyTorch's CPU kernel multiplies every query with every key. Here a block of queries is multiplied
only with the keys up to its end, grouped queries share their key-value head without copying it, and
the probabilities are saved for the backward pass: about 1.5 times as fast at 256 tokens
(``python -m benchmarks.kernels``). The probabilities grow with T^2, so long windows use PyTorch's
kernel. The C++ keeps eight queries in the L1 cache from scores to output, and applies the rotary
positions on the way.

Shapes: B batch, T positions, W positions of a block, S visible keys, N heads, M key-value heads,
G = N / M queries per key-value head, R = B x M, H head size (that of values may differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.nn.attention.flex_attention import BlockMask

from mtp_lightning.cpu import library as native
from mtp_lightning.nn import ops

_Shape = c_int64 * 12  # ``Shape`` of cpp/attention.cpp

_BLOCK = 32
_MAX_SEQ_LEN = 512


def rotary_attention(
    qkv_BTNH: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | BlockMask | None,
    n_heads: int,
    n_kv: int,
) -> Tensor:
    """``ops.rotary_attention``."""
    if mask is None and fits_native(qkv_BTNH) and cos.dtype == torch.float32:
        return _NativeAttention.apply(n_heads, cos.contiguous(), sin.contiguous(), qkv_BTNH)
    return ops.rotary_attention.plain(qkv_BTNH, cos, sin, mask, n_heads, n_kv)


def attention(
    query_BTNH: Tensor,
    key_BSMH: Tensor,
    value_BSMH: Tensor,
    mask: Tensor | BlockMask | None,
) -> Tensor:
    """``ops.attention``."""
    if mask is None:
        if fits_native(query_BTNH, key_BSMH, value_BSMH):
            heads = query_BTNH, key_BSMH, value_BSMH
            return _NativeAttention.apply(query_BTNH.shape[2], None, None, *heads)
        if fits(query_BTNH):
            return _CausalAttention.apply(query_BTNH, key_BSMH, value_BSMH)
    return ops.attention.plain(query_BTNH, key_BSMH, value_BSMH, mask)


def fits(query_BTNH: Tensor) -> bool:
    """Whether this file's code is faster than PyTorch: fp32, windows of up to 512."""
    return query_BTNH.dtype == torch.float32 and query_BTNH.shape[1] <= _MAX_SEQ_LEN


def fits_native(*heads: Tensor) -> bool:
    """Whether the C++ supports these, each [B, T, ., H]: head sizes must be multiples of 16, and
    heads adjacent. Gradients have the same strides, so that no number may be there twice."""
    return (
        fits(heads[0])
        and native.fits(*heads)
        and all(x.shape[3] % 16 == 0 and x.stride(2) == x.shape[3] for x in heads)
        and all(0 not in x.stride() for x in heads)
    )


class _CausalAttention(torch.autograd.Function):
    """``ops.attention`` without a mask, block by block. Inputs are cast to fp32: the products
    accumulate in fp32 tensors."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, seq_len, n_heads, d_head = query.shape
        n_kv = key.shape[2]
        group = n_heads // n_kv
        rows = batch * n_kv
        key_RTH = key.transpose(1, 2).reshape(rows, seq_len, d_head)
        value_RTH = value.transpose(1, 2).reshape(rows, seq_len, -1)
        grouped = query.view(batch, seq_len, n_kv, group, d_head).permute(0, 2, 3, 1, 4)
        scaled_BMGTH = grouped * d_head**-0.5
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        out_BTMGH = out.view(batch, seq_len, n_kv, group, -1)
        hidden_WW = torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)
        queries, probs = [], []
        for start in range(0, seq_len, _BLOCK):
            end = min(start + _BLOCK, seq_len)
            width = end - start
            query_block = scaled_BMGTH[:, :, :, start:end].reshape(rows, group * width, d_head)
            scores = torch.bmm(query_block, key_RTH[:, :end].transpose(1, 2))
            # Only the last W keys can come after one of the block's own queries.
            scores.view(rows, group, width, end)[..., start:].add_(hidden_WW[:width, :width])
            prob_block = torch.softmax(scores, dim=-1)
            mixed = torch.bmm(prob_block, value_RTH[:, :end])
            out_BTMGH[:, start:end] = mixed.view(batch, n_kv, group, width, -1).permute(
                0, 3, 1, 2, 4
            )
            queries.append(query_block)
            probs.append(prob_block)
        ctx.save_for_backward(key_RTH, value_RTH, *queries, *probs)
        ctx.shape = query.shape
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key_RTH, value_RTH, *blocks = ctx.saved_tensors
        queries, probs = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        batch, seq_len, n_heads, d_head = ctx.shape
        rows = key_RTH.shape[0]
        n_kv = rows // batch
        group = n_heads // n_kv
        grad_BMGTH = grads[0].reshape(batch, seq_len, n_kv, group, -1).permute(0, 2, 3, 1, 4)
        d_query = grads[0].new_empty(ctx.shape)
        d_query_BTMGH = d_query.view(batch, seq_len, n_kv, group, d_head)
        d_key, d_value = torch.zeros_like(key_RTH), torch.zeros_like(value_RTH)
        for index, start in enumerate(range(0, seq_len, _BLOCK)):
            end = min(start + _BLOCK, seq_len)
            width = end - start
            query_block, prob_block = queries[index], probs[index]
            grad_block = grad_BMGTH[:, :, :, start:end].reshape(rows, group * width, -1)
            d_value[:, :end].baddbmm_(prob_block.transpose(1, 2), grad_block)
            d_prob = torch.bmm(grad_block, value_RTH[:, :end].transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_prob, prob_block, -1, d_prob.dtype)
            d_key[:, :end].baddbmm_(d_scores.transpose(1, 2), query_block)
            d_block = torch.bmm(d_scores, key_RTH[:, :end]).mul_(d_head**-0.5)
            d_query_BTMGH[:, start:end] = d_block.view(batch, n_kv, group, width, d_head).permute(
                0, 3, 1, 2, 4
            )
        shape = (batch, n_kv, seq_len, -1)
        return d_query, d_key.view(shape).transpose(1, 2), d_value.view(shape).transpose(1, 2)


class _NativeAttention(torch.autograd.Function):
    """The same in C++, with rotary positions if their cosines and sines are given, of queries, keys
    and values. They may be one tensor, a projection's output [B, T, N + 2 M, H]; its gradient then
    is one, too."""

    @staticmethod
    def forward(
        ctx: Any, n_heads: int, cos: Tensor | None, sin: Tensor | None, *given: Tensor
    ) -> Tensor:
        query, key, value = heads = _apart(given, n_heads)
        batch, seq_len, _, _ = query.shape
        out = query.new_empty(batch, seq_len, n_heads, value.shape[-1])
        kept = query.new_empty(batch * n_heads * native.lib().attention_kept(seq_len))
        native.call("attention_forward", *heads, cos, sin, out, kept, _shape(*heads))
        ctx.n_heads = n_heads
        ctx.save_for_backward(cos, sin, kept, *given)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, kept, *given = ctx.saved_tensors
        d_given = [torch.empty_strided(x.shape, x.stride()) for x in given]
        heads, d_heads = (_apart(tensors, ctx.n_heads) for tensors in (given, d_given))
        used = *heads, cos, sin, kept, grads[0].contiguous(), *d_heads
        native.call("attention_backward", *used, _shape(*heads))
        return None, None, None, *d_given


def _apart(given: Sequence[Tensor], n_heads: int) -> Sequence[Tensor]:
    """Queries, keys and values."""
    if len(given) > 1:
        return given
    n_kv = (given[0].shape[2] - n_heads) // 2
    return given[0].split([n_heads, n_kv, n_kv], dim=2)


def _shape(query: Tensor, key: Tensor, value: Tensor) -> Any:
    strides = [stride for x in (query, key, value) for stride in x.stride()[:2]]
    return _Shape(*query.shape[:3], key.shape[2], query.shape[3], value.shape[3], *strides)


ops.attention.register("cpu", attention)
ops.rotary_attention.register("cpu", rotary_attention)
