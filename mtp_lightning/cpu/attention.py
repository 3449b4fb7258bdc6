"""Causal attention over whole windows in C++ (``cpp/attention.cpp``).

PyTorch's CPU kernel multiplies every query with every key. Here eight queries at a time are
multiplied with the keys up to their end, stay in the L1 cache from scores to output, and share
their key-value head without copying it; the rotary positions are applied on the way. The
probabilities are saved for the backward pass. They grow with T^2, so long windows use PyTorch's
kernel. ``python -m benchmarks.kernels`` measures both.

Shapes: B batch, T positions, S keys, N heads, M key-value heads, H head size (that of values may
differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mtp_lightning.cpu import library as native
from mtp_lightning.nn import ops

_Shape = c_int64 * 12  # ``Shape`` of cpp/attention.cpp

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
    if mask is None and _fits(qkv_BTNH) and cos.dtype == torch.float32:
        return _NativeAttention.apply(n_heads, cos.contiguous(), sin.contiguous(), qkv_BTNH)
    return ops.rotary_attention.plain(qkv_BTNH, cos, sin, mask, n_heads, n_kv)


def attention(
    query_BTNH: Tensor, key_BSMH: Tensor, value_BSMH: Tensor, mask: Tensor | BlockMask | None
) -> Tensor:
    """``ops.attention``."""
    if mask is not None or query_BTNH.shape[1] > _MAX_SEQ_LEN:
        return ops.attention.plain(query_BTNH, key_BSMH, value_BSMH, mask)
    # Latent attention's values are a part of wider heads.
    inputs = query_BTNH, key_BSMH, value_BSMH
    query, key, value = heads = [x if _is_adjacent(x) else x.contiguous() for x in inputs]
    if _fits(*heads):
        return _NativeAttention.apply(query.shape[2], None, None, *heads)
    # Heads of all sizes attend in fp32 under autocast, as those in C++ do.
    fp32 = all(x.dtype == torch.float32 for x in heads)
    with ops.no_autocast(query) if fp32 else nullcontext():
        return ops.attention.plain(query, key, value, None)


def _fits(*heads: Tensor) -> bool:
    """Whether the C++ supports these, each [B, T, ., H], and is faster than PyTorch: windows of up
    to 512, head sizes that are multiples of 16, adjacent heads. Gradients get the same strides, so
    expanded tensors do not fit."""
    fits = native.fits(*heads) and heads[0].shape[1] <= _MAX_SEQ_LEN
    return fits and all(x.shape[3] % 16 == 0 and _is_adjacent(x) for x in heads)


def _is_adjacent(x: Tensor) -> bool:
    return x.stride(2) == x.shape[3] and 0 not in x.stride()


class _NativeAttention(torch.autograd.Function):
    """``ops.attention`` without a mask, after ``ops.rotary`` if cosines and sines are given.
    Queries, keys and values may be one tensor, a projection's output [B, T, N + 2 M, H]; its
    gradient then is one, too."""

    @staticmethod
    def forward(
        ctx: Any, n_heads: int, cos: Tensor | None, sin: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        query, key, value = heads = _split_heads(inputs, n_heads)
        batch, seq_len, _, _ = query.shape
        out = query.new_empty(batch, seq_len, n_heads, value.shape[-1])
        probs = query.new_empty(batch * n_heads * native.lib().attention_kept(seq_len))
        native.call("attention_forward", *heads, cos, sin, out, probs, _shape(*heads))
        ctx.n_heads = n_heads
        ctx.save_for_backward(cos, sin, probs, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, probs, *inputs = ctx.saved_tensors
        d_inputs = [torch.empty_strided(x.shape, x.stride()) for x in inputs]
        heads, d_heads = (_split_heads(tensors, ctx.n_heads) for tensors in (inputs, d_inputs))
        arguments = *heads, cos, sin, probs, grads[0].contiguous(), *d_heads
        native.call("attention_backward", *arguments, _shape(*heads))
        return None, None, None, *d_inputs


def _split_heads(inputs: Sequence[Tensor], n_heads: int) -> Sequence[Tensor]:
    """Queries, keys and values."""
    if len(inputs) > 1:
        return inputs
    n_kv = (inputs[0].shape[2] - n_heads) // 2
    return inputs[0].split([n_heads, n_kv, n_kv], dim=2)


def _shape(query: Tensor, key: Tensor, value: Tensor) -> Any:
    strides = [stride for x in (query, key, value) for stride in x.stride()[:2]]
    return _Shape(*query.shape[:3], key.shape[2], query.shape[3], value.shape[3], *strides)


ops.attention.register("cpu", attention)
ops.rotary_attention.register("cpu", rotary_attention)
