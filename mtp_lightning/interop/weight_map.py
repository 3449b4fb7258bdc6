"""The weight map: which tensors of a folder in Hugging Face's layout make up a weight here.

One rule serves both directions. A tensor here consists of one or several tensors there, stacked:
rows of query, key and value; of gate and up; of all experts.

The layouts are Llama's (also Qwen2's and Qwen3's, with biases or norms on heads), DeepSeek-V3's and
GLM-4.5's, which combines Llama's attention with DeepSeek's experts. MTP depth k is layer L + k - 1
of each, as in README_WEIGHTS of DeepSeek-V3's release: the two norms, the projection, the block,
the output norm, and copies of embedding and head. MiMo, on a Qwen2 trunk, has its own names:
``model.mtp_layers.{k - 1}``. Its modules read the state before the final norm, and their projection
reads the state before the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig, qkv_width
from mtp_lightning.nn.components import LayerConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import DenseConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig

Shape = tuple[int, ...]
# The weights of which a folder may hold copies.
EMBEDDING, HEAD = "trunk.embedding.weight", "head.weight"


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


@dataclass(frozen=True)
class ModuleLayout:
    """The layout of MTP modules in a folder."""

    title: str  # the model whose layout it is
    # The layout's names for a module's two input norms, its projection and output norm.
    names: Mapping[str, str]
    stack: SequentialConfig  # the modules that it holds, one of them
    # Whether they have numbers of their own instead of those after the trunk's layers, and no
    # copies of embedding and head.
    apart: bool = False

    def prefix(self, n_layers: int, index: int) -> str:
        """Prefix of the names of a module's tensors; ``index`` counts from 0."""
        return f"model.mtp_layers.{index}." if self.apart else f"model.layers.{n_layers + index}."

    def of_depth(self, depth: int) -> MTPConfig:
        """The config of a folder's modules."""
        return replace(self.stack, depth=depth) if depth else NoMTPConfig()


DEEPSEEK = ModuleLayout(
    "DeepSeek-V3",
    {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"},
    SequentialConfig(depth=1),
)
MIMO = ModuleLayout(
    "MiMo",
    {
        "enorm": "token_layernorm",
        "hnorm": "hidden_layernorm",
        "eh_proj": "input_proj",
        "norm": "final_layernorm",
    },
    SequentialConfig(depth=1, input_norm="pre", concat="hidden_first"),
    apart=True,
)


def module_layout(model_type: str) -> ModuleLayout:
    """The layout of the modules in a folder of a model type."""
    return MIMO if model_type == "mimo" else DEEPSEEK


def is_mimo(config: ModelConfig) -> bool:
    """Whether a model has MiMo's layout: a Qwen2 trunk, and modules that read the state before the
    final norm."""
    trunk, mtp = config.trunk, config.mtp
    return (
        isinstance(mtp, SequentialConfig)
        and mtp.depth > 0
        and (mtp.input_norm, mtp.branch) == ("pre", "final")
        and isinstance(trunk.attention, GroupedQueryConfig)
        and trunk.attention.qkv_bias
        and not trunk.attention.qk_norm
        and isinstance(trunk.feed_forward, DenseConfig)
    )


def weight_map(config: ModelConfig) -> Iterator[MappedWeight]:
    """All tensors of trunk and head, and of the modules of a sequential stack."""
    trunk, mtp = config.trunk, config.mtp
    wide, vector = (trunk.vocab_size, trunk.d_model), (trunk.d_model,)
    yield renamed(EMBEDDING, "model.embed_tokens.weight", wide)
    for layer in range(trunk.n_layers):
        yield from _block(trunk, layer, f"trunk.blocks.{layer}.", f"model.layers.{layer}.")
    yield renamed("trunk.norm.weight", "model.norm.weight", vector)
    yield renamed(HEAD, "lm_head.weight", wide, copy=trunk.tie_embeddings)
    if not isinstance(mtp, SequentialConfig):
        return
    layout = MIMO if is_mimo(config) else DEEPSEEK
    for k in range(mtp.depth):
        own, theirs = f"mtp.depths.{k}.", layout.prefix(trunk.n_layers, k)
        if not layout.apart:
            yield renamed(EMBEDDING, f"{theirs}embed_tokens.weight", wide, copy=True)
        yield from module_weights(trunk, own, theirs, layout)
        if not layout.apart:
            yield renamed(HEAD, f"{theirs}shared_head.head.weight", wide, copy=True)


def module_weights(
    trunk: TrunkConfig, own: str, theirs: str, layout: ModuleLayout
) -> Iterator[MappedWeight]:
    """The tensors of one sequential module; ``own`` and ``theirs`` are the prefixes of their names
    here and in the layout."""
    names = layout.names
    vector, square = (trunk.d_model,), (trunk.d_model, 2 * trunk.d_model)
    for norm in ("enorm", "hnorm"):
        yield renamed(f"{own}{norm}.weight", f"{theirs}{names[norm]}.weight", vector)
    yield renamed(f"{own}eh_proj.weight", f"{theirs}{names['eh_proj']}.weight", square)
    yield from _block(trunk, None, f"{own}block.", theirs)
    yield renamed(f"{own}norm.weight", f"{theirs}{names['norm']}.weight", vector)


def _block(trunk: TrunkConfig, layer: int | None, own: str, theirs: str) -> Iterator[MappedWeight]:
    norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    for norm, name in norms.items():
        yield renamed(f"{own}{norm}.weight", f"{theirs}{name}.weight", (trunk.d_model,))
    for component, name in ((trunk.attention, "self_attn"), (trunk.feed_forward, "mlp")):
        for place in layer_weights(component, trunk, layer):
            yield place.under(f"{own}{component.family}.", f"{theirs}{name}.")


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
