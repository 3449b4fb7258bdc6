"""The weight map between Hugging Face's layouts and this project's model.

One rule serves both directions. A tensor here consists of one or several tensors there, stacked:
rows of query, key and value; of gate and up; of all experts. ``weight_map.py`` has the
tensors of attention and feed-forward layers.

The layouts are Llama's (also Qwen2's and Qwen3's, with biases or norms on heads), DeepSeek-V3's and
GLM-4.5's, which combines Llama's attention with DeepSeek's experts. MTP depth k is layer L + k - 1
of each, as in README_WEIGHTS of DeepSeek-V3's release: the two norms, the projection, the block,
the output norm, and copies of embedding and head. MiMo, on a Qwen2 trunk, has its own names:
``model.mtp_layers.{k - 1}``. Its modules read the state before the final norm, and their projection
reads the state before the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop.tensor_files import Assembled, StoredTensor, equal
from mtp_lightning.interop.weight_map import MappedWeight, layer_weights, renamed
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import DenseConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.weights import Stored, require_fitting

_EMBEDDING, _HEAD = "trunk.embedding.weight", "head.weight"
# Tables next to the weights in old checkpoints, which follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


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


def other_switch(mtp: SequentialConfig) -> str:
    """The setting by which modules compute something else than DeepSeek-V3's; empty if none does.
    (:func:`plain` turns the order of a projection.)"""
    as_deepseeks = {
        f"mtp.token_dropout={mtp.token_dropout:g}": mtp.reads_tokens,
        f"mtp.blocks={mtp.blocks}": mtp.blocks == 1,
        f"mtp.branch={mtp.branch}": mtp.branch == "final",
        f"mtp.input_norm={mtp.input_norm}": mtp.input_norm == "post",
    }
    return next((setting for setting, same in as_deepseeks.items() if not same), "")


def has_layout(config: ModelConfig) -> bool:
    """Whether transformers' MTP layers compute the same as this model's stack, after :func:`plain`.

    They read the state after the final norm (except MiMo's), and in a DeepSeek trunk they are
    mixtures of experts.
    """
    mtp = config.mtp
    if mtp.depth == 0:
        return True
    if not isinstance(mtp, SequentialConfig) or other_switch(replace(mtp, input_norm="post")):
        return False
    if mtp.input_norm == "pre":
        return is_mimo(config)
    attention, layers = config.trunk.attention.variant, config.trunk.feed_forward
    if isinstance(layers, ExpertsConfig) and attention == "grouped_query":
        # For Qwen3, transformers takes the first MTP layer for the trunk's first layer.
        return layers.scoring == "sigmoid" or not layers.first_k_dense
    return (attention, layers.variant) != ("latent", "dense")


def has_extra_file(config: ModelConfig) -> bool:
    """Whether a model's stack has weights, besides estimates of acceptance, but no layout."""
    bare = replace(config, mtp=replace(config.mtp, confidence=False))
    return bare.num_params() > bare.num_trunk_params() and not has_layout(config)


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


def weights_of(model: MTPModel) -> dict[str, Tensor]:
    """A model's weights by its own names, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def in_layers(config: ModelConfig) -> ModelConfig:
    """The part of a model that a folder's layers hold, in the form of :func:`plain`: only the trunk
    if the stack has no layout."""
    layout = MIMO if is_mimo(config) else DEEPSEEK
    mtp = layout.of_depth(config.mtp.depth) if has_layout(config) else NoMTPConfig()
    return ModelConfig(trunk=config.trunk, mtp=mtp)


def plain(model: MTPModel) -> dict[str, Tensor]:
    """The weights of the same model with its modules in their layout's form: one per depth, with
    the embedding first, or for MiMo the state first."""
    weights, mtp = weights_of(model), model.config.mtp
    if not isinstance(mtp, SequentialConfig):
        return weights
    weights.pop("mtp.blank", None)  # only for training
    if mtp.share_layers:
        first = {n: t for n, t in weights.items() if n.startswith("mtp.depths.0.")}
        for k in range(1, mtp.depth):
            weights.update({n.replace(".0.", f".{k}.", 1): t for n, t in first.items()})
    layout = MIMO if is_mimo(model.config) else DEEPSEEK
    if mtp.concat != layout.stack.concat:
        for k in range(mtp.depth):
            name = f"mtp.depths.{k}.eh_proj.weight"
            weights[name] = torch.cat(weights[name].chunk(2, dim=1)[::-1], dim=1)
    return weights


def weight_map(config: ModelConfig) -> Iterator[MappedWeight]:
    """All tensors of trunk and head, and of the modules of a sequential stack."""
    trunk, mtp = config.trunk, config.mtp
    wide, vector = (trunk.vocab_size, trunk.d_model), (trunk.d_model,)
    yield renamed(_EMBEDDING, "model.embed_tokens.weight", wide)
    for layer in range(trunk.n_layers):
        yield from _block(trunk, layer, f"trunk.blocks.{layer}.", f"model.layers.{layer}.")
    yield renamed("trunk.norm.weight", "model.norm.weight", vector)
    yield renamed(_HEAD, "lm_head.weight", wide, copy=trunk.tie_embeddings)
    if not isinstance(mtp, SequentialConfig):
        return
    layout = MIMO if is_mimo(config) else DEEPSEEK
    for k in range(mtp.depth):
        own, theirs = f"mtp.depths.{k}.", layout.prefix(trunk.n_layers, k)
        if not layout.apart:
            yield renamed(_EMBEDDING, f"{theirs}embed_tokens.weight", wide, copy=True)
        yield from module_weights(trunk, own, theirs, layout)
        if not layout.apart:
            yield renamed(_HEAD, f"{theirs}shared_head.head.weight", wide, copy=True)


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


def to_folder(model: MTPModel, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a folder, in order; it holds the part ``config`` of a model."""
    # A tied head is left out: the folder's config says that it is tied.
    places = weight_map(config)
    stored = (p for p in places if not (p.copy and p.parts[0][0] == "lm_head.weight"))
    return pieces(stored, plain(model), dtype)


def pieces(
    places: Iterable[MappedWeight], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a layout, in order, from those of this project."""
    tensors: dict[str, Tensor] = {}
    for place in places:
        tensor = weights[place.own]
        rows = tensor if place.stacked is None else tensor.flatten(0, 1)
        if place.order is not None:
            rows = rows[torch.tensor(place.order).argsort()]
        row_groups = rows.split([shape[0] for _, shape in place.parts])
        for (name, shape), piece in zip(place.parts, row_groups, strict=True):
            assert piece.shape == shape, name
            tensors[name] = piece.to(stored_dtype(place.own, dtype)).contiguous()
    return tensors


def stored_dtype(own: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a floating-point weight in a folder of ``dtype``, by its name here. The biases
    of experts stay in float32, since they move by small steps."""
    return torch.float32 if own.endswith("expert_bias") else dtype


def from_folder(
    places: Iterable[MappedWeight], tensors: Mapping[str, StoredTensor], *, source: str
) -> dict[str, Stored]:
    """This project's weights, from a folder's tensors, of which only copies are read.

    Raises:
        UserError: for a tensor that is missing, unknown, of another shape, or a copy that differs.
    """
    needed = list(places)
    require_fitting(
        {name: shape for place in needed for name, shape in place.parts},
        {name: part for name, part in tensors.items() if not _DERIVED.search(name)},
        optional={name for place in needed if place.copy for name, _ in place.parts},
        message=f"The tensors in {source} do not match its config.json",
    )
    weights: dict[str, Stored] = {}
    originals: dict[str, StoredTensor] = {}
    for place in needed:
        parts = tuple(tensors[name] for name, _ in place.parts if name in tensors)
        if place.copy:
            original = originals.setdefault(place.own, originals[_EMBEDDING])  # a tied head
            weights.setdefault(place.own, weights[_EMBEDDING])
            if parts and not equal(parts[0].read(), original.read()):
                raise UserError(
                    f"{place.parts[0][0]} in {source} differs from the trunk's embedding or head: "
                    "every prediction shares them, and tie_word_embeddings=true makes them one."
                )
            continue
        weights[place.own] = Assembled(place, parts)
        if place.own in (_EMBEDDING, _HEAD):
            originals[place.own] = parts[0]
    return weights
