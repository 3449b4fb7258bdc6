"""DeepSeek-V3's layers again, in float64, written from the report's equations with loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp_lightning.nn.config import TrunkConfig
from tests.reference import Weights, rms_norm


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """[H] rotated in pairs (2j, 2j + 1), as complex numbers times e^(i position theta^(-2j/H))."""
    out = x.clone()
    for j in range(x.shape[0] // 2):
        angle = position * theta ** (-2 * j / x.shape[0])
        z = complex(x[2 * j], x[2 * j + 1]) * complex(math.cos(angle), math.sin(angle))
        out[2 * j], out[2 * j + 1] = z.real, z.imag
    return out


def latent_attention(
    x: Tensor, w: Weights, p: str, c: TrunkConfig, documents: list[int] | None = None
) -> Tensor:
    """x [T, C] of one window: eq. 1-11."""
    a = c.attention
    assert a is not None
    out = torch.zeros(x.shape[0], c.n_heads * a.d_value, dtype=torch.float64)
    queries, keys, values = [], [], []
    for t, h in enumerate(x):
        if a.q_rank is None:
            q = w[f"{p}.query.weight"] @ h
        else:
            c_q = rms_norm(w[f"{p}.query_down.weight"] @ h, w[f"{p}.query_norm.weight"], c.norm_eps)
            q = w[f"{p}.query_up.weight"] @ c_q
        down = w[f"{p}.kv_down.weight"] @ h
        c_kv = rms_norm(down[: a.kv_rank], w[f"{p}.kv_norm.weight"], c.norm_eps)
        k_rope = turn(down[a.kv_rank :], t, c.rope_theta)
        up = (w[f"{p}.kv_up.weight"] @ c_kv).view(c.n_heads, a.d_nope + a.d_value)
        q = q.view(c.n_heads, a.d_head)
        queries.append(
            [torch.cat((row[: a.d_nope], turn(row[a.d_nope :], t, c.rope_theta))) for row in q]
        )
        keys.append([torch.cat((row[: a.d_nope], k_rope)) for row in up])
        values.append([row[a.d_nope :] for row in up])
    for t in range(x.shape[0]):
        seen = [j for j in range(t + 1) if documents is None or documents[j] == documents[t]]
        for n in range(c.n_heads):
            scores = torch.stack([queries[t][n] @ keys[j][n] for j in seen]) / math.sqrt(a.d_head)
            weights = torch.softmax(scores, 0)
            mixed = sum(weights[i] * values[j][n] for i, j in enumerate(seen))
            out[t, n * a.d_value : (n + 1) * a.d_value] = mixed
    return out @ w[f"{p}.out.weight"].T


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * up)


def choose(scores: Tensor, bias: Tensor, c: TrunkConfig) -> list[int]:
    """Experts of one token, by sorting: eq. 16 with the groups of section 2.1.2."""
    e = c.feed_forward
    assert e is not None
    biased = (scores + bias).tolist()
    size = e.n_routed // e.n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(e.n_groups)]
    if e.n_groups > 1:
        groups.sort(key=lambda g: -sum(sorted((biased[i] for i in g), reverse=True)[:2]))
        groups = groups[: e.top_groups]
    allowed = [i for group in groups for i in group]
    return sorted(allowed, key=lambda i: -biased[i])[: e.top_k]


def moe(x: Tensor, w: Weights, p: str, c: TrunkConfig) -> Tensor:
    """x [T, C]: eq. 12-16."""
    e = c.feed_forward
    assert e is not None
    rows = []
    for u in x:
        scores = torch.sigmoid(w[f"{p}.router.weight"] @ u)
        chosen = choose(scores, w[f"{p}.router.expert_bias"], c)
        total = sum(scores[i] for i in chosen)
        out = torch.zeros_like(u)
        if e.n_shared:
            out = swiglu(u, w[f"{p}.shared.gate_up.weight"], w[f"{p}.shared.down.weight"])
        for i in chosen:
            gate = e.scaling * scores[i] / total
            out = out + gate * swiglu(u, w[f"{p}.experts.gate_up"][i], w[f"{p}.experts.down"][i])
        rows.append(out)
    return torch.stack(rows)


def balance_loss(scores: Tensor, c: TrunkConfig) -> Tensor:
    """One sequence's, scores [T, E]: eq. 17-20 without alpha. Eq. 18 knows no bias and no group."""
    e = c.feed_forward
    assert e is not None
    chosen = [sorted(range(e.n_routed), key=lambda i: -float(row[i]))[: e.top_k] for row in scores]
    seq_len = scores.shape[0]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(e.n_routed):
        f = e.n_routed / (e.top_k * seq_len) * sum(i in row for row in chosen)
        p = sum(scores[t, i] / scores[t].sum() for t in range(seq_len)) / seq_len
        total = total + f * p
    return total


def block(
    x: Tensor,
    w: Weights,
    p: str,
    c: TrunkConfig,
    *,
    experts: bool,
    documents: list[int] | None = None,
) -> Tensor:
    normed = rms_norm(x, w[f"{p}.attention_norm.weight"], c.norm_eps)
    x = x + latent_attention(normed, w, f"{p}.attention", c, documents)
    normed = rms_norm(x, w[f"{p}.feed_forward_norm.weight"], c.norm_eps)
    p = f"{p}.feed_forward"
    if experts:
        return x + moe(normed, w, p, c)
    return x + torch.stack(
        [swiglu(u, w[f"{p}.gate_up.weight"], w[f"{p}.down.weight"]) for u in normed]
    )
