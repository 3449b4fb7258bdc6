"""The model again, in float64, from the papers' equations with loops and no shortcuts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_lightning.nn.config import TrunkConfig

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def rotate(x: Tensor, position: int, theta: float, rotary_dim: int | None = None) -> Tensor:
    """One head's vector [H], rotated: pairs (j, j + H/2) by the angle position * theta^(-2j/R), of
    which the first R/2; R is ``rotary_dim``, by default H."""
    half = x.shape[0] // 2
    rotary_dim = rotary_dim or x.shape[0]
    out = x.clone()
    for j in range(rotary_dim // 2):
        angle = position * theta ** (-2 * j / rotary_dim)
        a, b = x[j], x[j + half]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(
    x: Tensor,
    w: Weights,
    prefix: str,
    c: TrunkConfig,
    documents: list[int] | None,
    rotary_dim: int | None = None,
) -> Tensor:
    """x [T, C] of one window."""
    assert c.d_head is not None
    h, n, m = c.d_head, c.n_heads, c.n_kv_heads
    qkv = x @ w[f"{prefix}.qkv.weight"].T
    seq_len = x.shape[0]
    out = torch.zeros(seq_len, n * h, dtype=torch.float64)
    for head in range(n):
        kv = head // (n // m)
        for i in range(seq_len):
            q = rotate(qkv[i, head * h : (head + 1) * h], i, c.rope_theta, rotary_dim)
            scores, values = [], []
            for j in range(i + 1):
                if documents is not None and documents[i] != documents[j]:
                    continue
                start = (n + kv) * h
                k = rotate(qkv[j, start : start + h], j, c.rope_theta, rotary_dim)
                scores.append(q @ k / math.sqrt(h))
                start = (n + m + kv) * h
                values.append(qkv[j, start : start + h])
            weights = torch.softmax(torch.stack(scores), 0)
            out[i, head * h : (head + 1) * h] = weights @ torch.stack(values)
    return out @ w[f"{prefix}.out.weight"].T


def experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The routed experts' sum [M, C]: every token goes through every expert."""
    weight = torch.zeros(len(x), len(down), dtype=x.dtype).scatter(1, chosen, gates)
    gate, up = torch.einsum("mc,efc->emf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("emf,ecf,me->mc", gate * torch.sigmoid(gate) * up, down, weight)


def block(
    x: Tensor, w: Weights, prefix: str, c: TrunkConfig, documents: list[int] | None = None
) -> Tensor:
    normed = rms_norm(x, w[f"{prefix}.attention_norm.weight"], c.norm_eps)
    x = x + attention(normed, w, f"{prefix}.attention", c, documents)
    normed = rms_norm(x, w[f"{prefix}.feed_forward_norm.weight"], c.norm_eps)
    gate, up = (normed @ w[f"{prefix}.feed_forward.gate_up.weight"].T).split(c.d_ff, dim=-1)
    inner = gate * torch.sigmoid(gate) * up
    return x + inner @ w[f"{prefix}.feed_forward.down.weight"].T


def sequential(
    window: Tensor, w: Weights, c: TrunkConfig, depth: int, documents: list[int] | None = None
) -> list[Tensor]:
    """Hidden states h^0 .. h^D [T, C] of one window [T + D + 1] (DeepSeek-V3, eq. 21-23)."""
    seq_len = window.shape[0] - depth - 1
    x = w["trunk.embedding.weight"][window[:seq_len]]
    for layer in range(c.n_layers):
        x = block(x, w, f"trunk.blocks.{layer}", c, documents)
    hidden = [rms_norm(x, w["trunk.norm.weight"], c.norm_eps)]
    for k in range(1, depth + 1):
        p = f"mtp.depths.{k - 1}"
        rows = []
        for i in range(seq_len):
            e = rms_norm(
                w["trunk.embedding.weight"][window[i + k]], w[f"{p}.enorm.weight"], c.norm_eps
            )
            h = rms_norm(hidden[-1][i], w[f"{p}.hnorm.weight"], c.norm_eps)
            rows.append(w[f"{p}.eh_proj.weight"] @ torch.cat([e, h]))
        x = block(torch.stack(rows), w, f"{p}.block", c, documents)
        hidden.append(rms_norm(x, w[f"{p}.norm.weight"], c.norm_eps))
    return hidden
