"""The operations that layers are made of: plain formulas that faster code can replace.

Layers call ops and know no kernel. The plain formula runs on every device and in every dtype, and
is the one that ``torch.compile`` sees. A part, or a user's own package, registers a function for a
type of device:

    from mtp_lightning.nn import ops

    ops.rms_norm.register("cuda", my_rms_norm)

The function receives every call of the op on such a device. It checks its arguments and returns
``ops.rms_norm.plain(...)`` for those that it does not compute faster.

Shapes: B batch, T positions, S keys, N heads, M key-value heads, H head size, C d_model, F inner
width, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mtp_lightning import parts
from mtp_lightning.nn.document_attention import document_attention

P = ParamSpec("P")
Result = TypeVar("Result")


class Op(Generic[P, Result]):
    """A function (``plain``), and the functions that replace it, by type of device. The first
    argument must be a tensor; its device selects the function."""

    def __init__(self, plain: Callable[P, Result]) -> None:
        update_wrapper(self, plain)
        self.plain = plain
        self._on: dict[str, Callable[P, Result]] = {}

    def register(self, device: str, function: Callable[P, Result]) -> None:
        """Let ``function`` compute this op on devices of the type ``device``."""
        self._on[device] = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        return self._on.get(args[0].device.type, self.plain)(*args, **kwargs)  # type: ignore[attr-defined]


@Op
def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T`` for ``x`` of [..., K]: [..., N]."""
    # Held in bf16 only to save memory (Trunk.hold_in_bf16); autocast casts by itself.
    held = weight_NK.dtype == torch.bfloat16 and x.dtype != torch.bfloat16
    if held and not torch.is_autocast_enabled(x.device.type):
        weight_NK = weight_NK.to(x.dtype)
    return F.linear(x, weight_NK)


@Op
def matmul_transposed(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a @ b.T`` [M, N], without autograd; any strides."""
    return a_MK @ b_NK.t()


@Op
def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """``grad.T @ x`` [N, K], the gradient of a linear layer's weight."""
    return grad_MN.t() @ x_MK


@Op
def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis of ``x`` [..., C] (Zhang & Sennrich
    2019, eq. 4)."""
    return F.rms_norm(x, weight_C.shape, weight_C, eps)


@Op
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + H/2) of ``x`` [..., H] (Su et al. 2021, eq. 34); ``cos`` and ``sin``
    are those of the angles, broadcast against [..., H/2]."""
    left, right = x.chunk(2, dim=-1)
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return rotated.to(x.dtype)


@Op
def attention(
    query_BTNH: Tensor, key_BSMH: Tensor, value_BSMH: Tensor, mask: Tensor | BlockMask | None
) -> Tensor:
    """``softmax(q k^T / sqrt(H) + mask) v``, [B, T, N, H] of the values' width; query head n reads
    key head n // (N / M).

    The mask is broadcast against [B, N, T, S]: bool, True where a query attends to a key; or
    additive; or a block mask (``document_attention.py``). None is causal, with S = T.
    """
    if isinstance(mask, BlockMask):
        return document_attention(query_BTNH, key_BSMH, value_BSMH, mask)
    query, key, value = (x.transpose(1, 2) for x in (query_BTNH, key_BSMH, value_BSMH))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


@Op
def rotary_attention(
    qkv_BTNH: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | BlockMask | None,
    n_heads: int,
    n_kv: int,
) -> Tensor:
    """:func:`attention` of queries and keys after :func:`rotary`, over whole windows: [B, T, N, H].

    ``qkv_BTNH`` has ``n_heads`` heads of queries, then ``n_kv`` of keys and ``n_kv`` of values;
    ``cos`` and ``sin`` are [T, 1, H/2].
    """
    query_key, value = qkv_BTNH.split([n_heads + n_kv, n_kv], dim=2)
    query, key = rotary(query_key, cos, sin).split([n_heads, n_kv], dim=2)
    return attention(query, key, value, mask)


@Op
def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` for ``x`` of [..., C]: [..., C] (Shazeer 2020, eq. 6);
    ``gate_up`` is [2F, C], the gate's matrix first, and ``down`` [C, F]."""
    return linear(gated(linear(x, gate_up)), down)


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, [..., 2F] -> [..., F]: the first half gates the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@Op
def log_softmax_(logits_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """``log_softmax(logits)`` [R, V] in ``dtype``; the logits may be overwritten."""
    return torch.log_softmax(logits_RV, dim=-1, dtype=dtype)


@Op
def exp_(x: Tensor) -> Tensor:
    """``exp(x)``, in place."""
    return x.exp_()


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a chunk and its gradient, as one compiled kernel for a GPU.

    Compiled, no intermediate result is written to memory: otherwise the log-probabilities of
    half-precision logits would be written in fp32 and read twice.

    Returns:
        ``-log softmax(logits)[target]`` [R], at least fp32, and the gradient with respect to the
        logits [R, V], ``softmax - one_hot``, in the logits' dtype.
    """
    return _compiled_cross_entropy()(logits_RV, targets_R)


@cache
def _compiled_cross_entropy() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_cross_entropy)


def _cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1, dtype=dtype)
    target_R1 = targets_R.unsqueeze(-1)
    tokens_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    d_logits_RV = log_probs_RV.exp() - (tokens_V == target_R1).to(dtype)
    return -log_probs_RV.gather(1, target_R1).squeeze(-1), d_logits_RV.to(logits_RV.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype for products with ``x``: autocast's if it is on, else its own."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turn autocast off on the device of ``x``."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)  # type: ignore[return-value]


_describe: Callable[[], tuple[str, str]] | None = None


def register_code(describe: Callable[[], tuple[str, str]]) -> None:
    """Let :func:`code` return the result of ``describe``."""
    global _describe
    _describe = describe


def code() -> tuple[str, str]:
    """Name (stored in checkpoints) and description of the code that computes the ops on a CPU.
    Other code may give other last bits of a run."""
    parts.load_cpu()
    return _describe() if _describe else ("pytorch", "PyTorch's operators")
