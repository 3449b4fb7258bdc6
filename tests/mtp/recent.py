"""Heads of recent papers in float64, from their equations, one position at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_lightning.nn.config import TrunkConfig
from tests.reference import Weights, branch_point, linear, parallel, rms_norm, rotate


def joint(
    window: Tensor, w: Weights, c: TrunkConfig, depth: int, *, branch: str = "final"
) -> list[Tensor]:
    """Hidden states of depths 0 .. D of one window [T + D + 1] (JTP, arXiv 2503.21801).

    ``c_j = gamma h_t + E(x_{t+j})``, attention from j to 0 .. j, and a skip from ``h_t``.
    """
    final, h = branch_point(window, w, c, depth, branch, "post")
    size, n, m = c.d_head, c.n_heads, c.n_kv_heads
    rows: list[list[Tensor]] = [[] for _ in range(depth + 1)]
    for t in range(h.shape[0]):
        queries, keys, values = [], [], []
        for j in range(depth + 1):
            place = w["mtp.gamma"] * h[t] + w["trunk.embedding.weight"][window[t + j]]
            place = rms_norm(place, w["mtp.norm.weight"], c.norm_eps)
            parts = (w["mtp.attention.qkv.weight"] @ place).view(-1, size)
            queries.append([rotate(part, j, c.rope_theta) for part in parts[:n]])
            keys.append([rotate(part, j, c.rope_theta) for part in parts[n : n + m]])
            values.append(parts[n + m :])
        for k in range(1, depth + 1):
            heads = []
            for head in range(n):
                kv = head // (n // m)
                scores = [queries[k][head] @ keys[j][kv] / math.sqrt(size) for j in range(k + 1)]
                shares = torch.softmax(torch.stack(scores), 0)
                heads.append(sum(shares[j] * values[j][kv] for j in range(k + 1)))
            rows[k].append(h[t] + w["mtp.attention.out.weight"] @ torch.cat(heads))
    return [final, *(torch.stack(row) for row in rows[1:])]


def nextlat(
    window: Tensor, w: Weights, c: TrunkConfig, depth: int, *, branch: str = "final"
) -> list[Tensor]:
    """``h_t, g_{t+1}, .., g_{t+D}`` of one window (NextLat, arXiv 2511.05963)."""
    final, h = branch_point(window, w, c, depth, branch, "post")
    p = "mtp.depths.0."
    hidden, g = [final], h
    for k in range(1, depth + 1):
        rows = []
        for t in range(h.shape[0]):
            x = torch.cat((g[t], w["trunk.embedding.weight"][window[t + k]]))
            x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + c.norm_eps)
            x = x * w[f"{p}norm.weight"] + w[f"{p}norm.bias"]
            for layer in ("first", "second", "last"):
                x = w[f"{p}{layer}.weight"] @ x
                if layer != "last":
                    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            rows.append(g[t] + x)
        g = torch.stack(rows)
        hidden.append(g)
    return hidden


def corrected(
    window: Tensor,
    w: Weights,
    c: TrunkConfig,
    depth: int,
    *,
    head: str,
    correction: str,
    branch: str,
    input_norm: str = "post",
) -> list[Tensor]:
    """Parallel or linear heads with an MLP on branch and tokens (Hydra, arXiv 2402.05109), or with
    a table of the last token (arXiv 2607.05147)."""
    _, z = branch_point(window, w, c, depth, branch, input_norm)
    if head == "linear":
        hidden = linear(window, w, c, depth, branch=branch)
    else:
        hidden = parallel(window, w, c, depth, branch=branch, input_norm=input_norm)
    for k in range(1, depth + 1):
        p = f"mtp.corrections.{k - 1}."
        for t in range(z.shape[0]):
            if correction == "mlp":
                tokens = [w["trunk.embedding.weight"][window[t + j]] for j in range(1, k + 1)]
                inner = w[f"{p}up.weight"] @ torch.cat([z[t], *tokens])
                inner = inner / (1 + torch.exp(-inner))
            else:
                inner = w[f"{p}embedding.weight"][window[t + k]]
            hidden[k][t] = hidden[k][t] + w[f"{p}down.weight"] @ inner
    return hidden
