"""Parameters and FLOPs of training in closed form, as references for what the product measures.

FLOPs are those of one position of a window of T; a multiply-add is two, and attention has no causal
discount. The objective is cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.selector import CANDIDATES
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig


def attention(trunk: TrunkConfig, seq_len: int) -> tuple[int, int]:
    """Parameters, and forward FLOPs."""
    c, n, a = trunk.d_model, trunk.n_heads, trunk.attention
    if isinstance(a, LatentAttentionConfig):
        head = a.d_nope + a.d_rope
        query = c * n * head if a.q_rank is None else a.q_rank * (c + n * head)
        down, up = c * (a.kv_rank + a.d_rope), a.kv_rank * n * (a.d_nope + a.d_value)
        matrices = query + down + up + n * a.d_value * c
        norms = a.kv_rank + (a.q_rank or 0)
        return matrices + norms, 2 * matrices + 2 * seq_len * n * (head + a.d_value)
    assert isinstance(a, GroupedQueryConfig)
    h, qkv = trunk.d_head, (n + 2 * trunk.n_kv_heads) * trunk.d_head
    matrices = c * (qkv + n * h)
    further = 2 * h * a.qk_norm + qkv * a.qkv_bias
    return matrices + further, 2 * matrices + 4 * seq_len * n * h


def feed_forward(trunk: TrunkConfig, layer: int | None) -> tuple[int, int]:
    """Parameters, and those of them that a token does not use."""
    f = trunk.feed_forward
    if not isinstance(f, ExpertsConfig) or (layer is not None and layer < f.first_k_dense):
        return 3 * trunk.d_model * trunk.d_ff, 0
    one = 3 * trunk.d_model * f.d_expert
    router = trunk.d_model * f.n_routed
    return router + (f.n_routed + f.n_shared) * one, (f.n_routed - f.top_k) * one


def block(trunk: TrunkConfig, seq_len: int, layer: int | None = None) -> tuple[int, int]:
    """Parameters, and forward FLOPs; ``layer`` None is a module's block."""
    (mixing, mixed), (params, idle) = attention(trunk, seq_len), feed_forward(trunk, layer)
    return mixing + params + 2 * trunk.d_model, mixed + 2 * (params - idle)


def trunk_params(trunk: TrunkConfig) -> int:
    blocks = sum(block(trunk, 0, layer)[0] for layer in range(trunk.n_layers))
    embeddings = 1 if trunk.tie_embeddings else 2
    return embeddings * trunk.vocab_size * trunk.d_model + blocks + trunk.d_model


def correction(mtp: MTPConfig, trunk: TrunkConfig, k: int) -> tuple[int, int]:
    """Parameters, and those of its matrices."""
    c, kind = trunk.d_model, getattr(mtp, "correction", "none")
    if kind in ("none", "selector"):
        return 0, 0
    if kind == "mlp":
        return (k + 2) * c * c, (k + 2) * c * c
    rank = mtp.columns  # type: ignore[attr-defined]
    return rank * (trunk.vocab_size + c), rank * c


def eagle(config: ModelConfig, seq_len: int) -> tuple[int, int, int]:
    """Numbers of the projection and of the head, and between them the layer's forward FLOPs."""
    mtp, trunk = config.mtp, config.trunk
    c, n, h = trunk.d_model, trunk.n_heads, trunk.d_head
    matrices = 2 * c * (n + 2 * trunk.n_kv_heads) * h + n * h * c + 3 * c * trunk.d_ff
    rows = getattr(mtp, "draft_vocab", None) or trunk.vocab_size
    return 3 * c * c, 2 * matrices + 4 * seq_len * n * h, rows * c


def dflash(config: ModelConfig, seq_len: int) -> tuple[int, int, int]:
    """Numbers of the projection, and of the layers; forward FLOPs of all blocks after a token."""
    mtp, trunk = config.mtp, config.trunk
    c, n, m, h = trunk.d_model, trunk.n_heads, trunk.n_kv_heads, trunk.d_head
    entries, width = 2 * c * m * h, mtp.depth + 1
    of_block = n * h * c + entries + n * h * c + 3 * c * trunk.d_ff
    gains = 2 * c + 2 * h
    flops = 2 * entries + width * (2 * of_block + 4 * (seq_len + width) * n * h)
    return 3 * c * c, mtp.blocks * (of_block + gains), mtp.blocks * flops


def selector_rank(mtp: MTPConfig) -> int:
    """Of the candidate selector; 0 without one."""
    selects = mtp.depth and getattr(mtp, "correction", "none") == "selector"
    return mtp.columns if selects else 0  # type: ignore[attr-defined]


def updates(config: ModelConfig) -> int:
    """Parameters of the low-rank updates of ``masked``."""
    trunk, total = config.trunk, 0
    c, n, h, f = trunk.d_model, trunk.n_heads, trunk.d_head, trunk.feed_forward
    for layer in range(trunk.n_layers):
        total += c + (n + 2 * trunk.n_kv_heads) * h + n * h + c
        if not isinstance(f, ExpertsConfig) or layer < f.first_k_dense:
            total += c + 2 * trunk.d_ff + trunk.d_ff + c
    return total * config.mtp.lora_rank  # type: ignore[attr-defined]


def stack_params(config: ModelConfig) -> int:
    mtp, trunk = config.mtp, config.trunk
    c, depth = trunk.d_model, mtp.depth
    one, layer = block(trunk, 0)[0], attention(trunk, 0)[0]
    corrections = sum(correction(mtp, trunk, k)[0] for k in range(1, depth + 1))
    confidence = depth * (c + 1) if mtp.confidence else 0
    match mtp.variant:
        case "sequential":
            assert isinstance(mtp, SequentialConfig)
            modules = min(depth, 1) if mtp.share_layers else depth
            total = modules * (one + 2 * c * c + 3 * c) + c * bool(mtp.token_dropout and depth)
        case "parallel":
            total = depth * (one + c) + corrections
        case "linear" if mtp.rank > 1:
            total = (mtp.rank * (depth + 1) - 1) * c * c + mtp.rank * c
        case "linear":
            total = depth * c * c + corrections
        case "joint":
            total = (layer + c + 1) * bool(depth)
        case "nextlat":
            total = (4 * c * c + 4 * c) * bool(depth)
        case "eagle":
            fused, layer, head = eagle(config, 0)
            total = (fused + layer // 2 + head + 4 * c) * bool(depth)
        case "dflash":
            fused, layers, _ = dflash(config, 0)
            total = (fused + layers + 3 * c + correction(mtp, trunk, 1)[0]) * bool(depth)
        case "masked":
            total = (updates(config) + 3 * c * c + c + depth * c) * bool(depth)
        case "top" | "bag":
            total = trunk.vocab_size * c
        case "registers":
            total = c
        case _:
            total = 0
    selector = selector_rank(mtp) * (2 * trunk.vocab_size + c)
    return total + confidence + selector


def stack_flops(config: ModelConfig, seq_len: int, active: Sequence[int]) -> tuple[int, int]:
    """Forward and backward FLOPs of the depths, without the shared head."""
    mtp, trunk = config.mtp, config.trunk
    c, deepest, n = trunk.d_model, max(active, default=0), len(active)
    one, reaches = block(trunk, seq_len)[1], mtp.trains_trunk and mtp.detach == "none"
    corrections = [2 * correction(mtp, trunk, k)[1] for k in active]
    backward = 2 * sum(corrections)
    if getattr(mtp, "correction", "none") == "mlp" and (mtp.freeze_trunk or mtp.detach == "all"):
        # The first matrix reads states and embeddings, which need no gradient.
        backward -= sum(2 * (k + 1) * c * c for k in active)
    match mtp.variant:
        case "sequential":
            total = deepest * (one + 4 * c * c)
        case "parallel":
            return n * one + sum(corrections), 2 * n * one + backward
        case "linear" if mtp.rank > 1:
            total = 2 * ((mtp.rank * (deepest + 1) - 1) * c * c + mtp.rank * c)
        case "linear":
            matrices = n * 2 * c * c
            return matrices + sum(corrections), (1 + reaches) * matrices + backward
        case "joint":
            places = deepest + 1 if active else 0
            total = places * attention(trunk, places)[1]
        case "nextlat":
            total = deepest * 8 * c * c
        case "eagle":
            fused, layer, head = eagle(config, seq_len)
            fused *= 2 * bool(active)
            total = deepest * layer + n * 2 * head
            return fused + total, (1 + reaches) * fused + 2 * total
        case "dflash":
            fused, _, total = dflash(config, seq_len)
            fused, total = 2 * fused * bool(active), total * bool(active) + sum(corrections)
            return fused + total, (1 + reaches) * fused + 2 * total
        case "masked":
            # D masks a token, whichever depths are active; they attend to T tokens and D masks.
            masks = mtp.depth * bool(active)
            blocks = [block(trunk, seq_len + mtp.depth, i)[1] for i in range(trunk.n_layers)]
            trunks, low = masks * sum(blocks), masks * 2 * updates(config)
            sampled = n * 6 * c * c
            if not mtp.freeze_trunk:
                return trunks + low + sampled, 2 * (trunks + low + sampled)
            # Matrices and the tokens' keys and values need no gradient; the masks' do.
            own_keys = masks * trunk.n_layers * 4 * mtp.depth * trunk.n_heads * trunk.d_head
            return trunks + low + sampled, trunks + own_keys + 2 * (low + sampled)
        case "top" | "bag":
            total = n * 2 * trunk.vocab_size * c
            return total, (1 + reaches) * total
        case _:
            total = 0
    return total, 2 * total


def training(config: ModelConfig, seq_len: int, active: Sequence[int]) -> int:
    """FLOPs per position: forward, and backward without gradients that are not needed."""
    mtp, trunk = config.mtp, config.trunk
    head = 2 * trunk.d_model * trunk.vocab_size
    tokens, wide = (2, 2 * seq_len) if mtp.variant == "registers" and active else (1, seq_len)
    blocks = tokens * sum(block(trunk, wide, layer)[1] for layer in range(trunk.n_layers))
    # How often a position goes through the shared head for the depths.
    passes = len(active)
    if mtp.variant in ("top", "bag", "eagle"):
        passes = 0
    elif mtp.variant in ("parameter_free", "teacherless"):
        # One pass serves all depths.
        passes = 0
    elif mtp.rank > 1:
        passes = mtp.rank * (max(active, default=0) + 1) - 1
    forward, backward = stack_flops(config, seq_len, active)
    # The candidates' scores, and the projection of the state.
    forward += len(active) * selector_rank(mtp) * 2 * (trunk.d_model + CANDIDATES)
    backward += 2 * len(active) * selector_rank(mtp) * 2 * (trunk.d_model + CANDIDATES)
    total = forward + backward + blocks + (2 if mtp.detach == "all" else 3) * passes * head
    if not mtp.trains_trunk:
        return forward + backward + blocks + 2 * passes * head
    return total + 2 * blocks + 3 * head
