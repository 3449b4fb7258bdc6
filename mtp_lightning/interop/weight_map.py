"""The weight map: which tensors of a folder in Hugging Face's layout make up a weight here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import singledispatch

from mtp_lightning.errors import UserError
from mtp_lightning.nn.attention import GroupedQueryConfig, qkv_width
from mtp_lightning.nn.components import LayerConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import DenseConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MappedWeight:
    """A tensor of this project, and the tensors of a folder that it is made of."""

    own: str  # its name in this project
    parts: tuple[tuple[str, Shape], ...]  # names and shapes in the folder, in the order of the rows
    # The tensor is a stack of this many matrices, whose rows are concatenated in the folder; None
    # if it has the same number of axes as its parts.
    stacked: int | None = None
    # Row i of the tensor is row ``order[i]`` of the concatenated parts; None keeps the order.
    order: tuple[int, ...] | None = None
    # The folder may hold this tensor as a copy of ``own``, and must then agree with it.
    copy: bool = False

    def under(self, prefix: str, hf_prefix: str) -> MappedWeight:
        """The same with prefixes before the names."""
        parts = tuple((f"{hf_prefix}{name}", shape) for name, shape in self.parts)
        return replace(self, own=f"{prefix}{self.own}", parts=parts)


def renamed(name: str, hf_name: str, shape: Shape, *, copy: bool = False) -> MappedWeight:
    """A weight that the folder holds unchanged under another name."""
    return MappedWeight(own=name, parts=((hf_name, shape),), copy=copy)


@singledispatch
def layer_weights(
    config: LayerConfig, trunk: TrunkConfig, layer: int | None
) -> Iterable[MappedWeight]:
    """A layer's weights, by names within the layer. Your own layer can register here.

    Args:
        layer: its index in the trunk; None for the block of a prediction module.

    Raises:
        UserError: no layout has such a layer.
    """
    raise UserError(
        f"model.{config.family} of the variant {config.variant} cannot be exported: no layout of "
        "Hugging Face's has such a layer."
    )


@layer_weights.register
def _(config: GroupedQueryConfig, trunk: TrunkConfig, layer: int | None) -> Iterator[MappedWeight]:
    d_model, d_head = trunk.d_model, trunk.d_head
    heads = {"q": trunk.n_heads, "k": trunk.n_kv_heads, "v": trunk.n_kv_heads}
    rows = {f"{name}_proj": n * d_head for name, n in heads.items()}
    matrices = tuple((f"{name}.weight", (n, d_model)) for name, n in rows.items())
    order, qkv_order = _orders(config, trunk)
    yield MappedWeight(own="qkv.weight", parts=matrices, order=qkv_order)
    if config.qkv_bias:
        biases = tuple((f"{n}.bias", (w,)) for n, w in rows.items())
        yield MappedWeight(own="qkv_bias", parts=biases, order=qkv_order)
    yield renamed("out.weight", "o_proj.weight", (d_model, trunk.n_heads * d_head))
    if config.qk_norm:
        for norm, hf_norm in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            gains = ((f"{hf_norm}.weight", (d_head,)),)
            yield MappedWeight(own=f"{norm}.weight", parts=gains, order=order)


def _orders(
    config: GroupedQueryConfig, trunk: TrunkConfig
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The order of the dimensions in the folder: of one head, and of all heads of queries, keys and
    values; None if it is the same.

    The folder's rotary pairs are (j, j + R/2) in the first R dimensions, and here (j, j + H/2).
    """
    size, rotary_dim = trunk.d_head, config.rotary_dim(trunk)
    if rotary_dim == size:
        return None, None
    pairs, moving = size // 2, rotary_dim // 2
    order = tuple(
        j + side * moving if j < moving else j + moving + side * (pairs - moving)
        for side in (0, 1)
        for j in range(pairs)
    )
    n_rotary_heads = trunk.n_heads + trunk.n_kv_heads
    heads = [head * size + j for head in range(n_rotary_heads) for j in order]
    return order, (*heads, *range(n_rotary_heads * size, qkv_width(trunk)))


@layer_weights.register
def _(
    config: LatentAttentionConfig, trunk: TrunkConfig, layer: int | None
) -> Iterator[MappedWeight]:
    n_heads, d_model = trunk.n_heads, trunk.d_model
    queries = n_heads * config.d_head
    if config.q_rank is None:
        yield renamed("query.weight", "q_proj.weight", (queries, d_model))
    else:
        yield renamed("query_down.weight", "q_a_proj.weight", (config.q_rank, d_model))
        yield renamed("query_up.weight", "q_b_proj.weight", (queries, config.q_rank))
    kv_up = n_heads * (config.d_nope + config.d_value), config.kv_rank
    yield renamed("kv_down.weight", "kv_a_proj_with_mqa.weight", (config.d_cached, d_model))
    yield renamed("kv_up.weight", "kv_b_proj.weight", kv_up)
    yield renamed("out.weight", "o_proj.weight", (d_model, n_heads * config.d_value))
    if config.q_rank is not None:
        yield renamed("query_norm.weight", "q_a_layernorm.weight", (config.q_rank,))
    yield renamed("kv_norm.weight", "kv_a_layernorm.weight", (config.kv_rank,))


@layer_weights.register
def _(config: DenseConfig, trunk: TrunkConfig, layer: int | None) -> Iterator[MappedWeight]:
    return swiglu_weights(trunk.d_model, trunk.d_ff)


@layer_weights.register
def _(config: ExpertsConfig, trunk: TrunkConfig, layer: int | None) -> Iterator[MappedWeight]:
    d_model = trunk.d_model
    if config.is_dense(layer):
        yield from swiglu_weights(d_model, trunk.d_ff)
        return
    yield renamed("router.weight", "gate.weight", (config.n_routed, d_model))
    if config.scoring == "sigmoid":
        yield renamed("router.expert_bias", "gate.e_score_correction_bias", (config.n_routed,))
    experts = [
        [place.under("", f"experts.{i}.") for place in swiglu_weights(d_model, config.d_expert)]
        for i in range(config.n_routed)
    ]
    for places in zip(*experts, strict=True):  # gate_up of every expert, then down
        parts = tuple(part for place in places for part in place.parts)
        name = f"experts.{places[0].own.removesuffix('.weight')}"
        yield MappedWeight(own=name, parts=parts, stacked=config.n_routed)
    if config.n_shared:
        for place in swiglu_weights(d_model, config.n_shared * config.d_expert):
            yield place.under("shared.", "shared_experts.")


def swiglu_weights(d_model: int, d_ff: int) -> Iterator[MappedWeight]:
    """The weights of one :class:`~mtp_lightning.nn.feed_forward.FeedForward`."""
    up = tuple((f"{name}_proj.weight", (d_ff, d_model)) for name in ("gate", "up"))
    yield MappedWeight(own="gate_up.weight", parts=up)
    yield renamed("down.weight", "down_proj.weight", (d_model, d_ff))
