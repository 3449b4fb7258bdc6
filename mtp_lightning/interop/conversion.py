"""A model's weights as the tensors of a folder in Hugging Face's layout (``weight_map.py``), and
back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop.tensor_files import Assembled, StoredTensor, equal
from mtp_lightning.interop.weight_map import (
    DEEPSEEK,
    EMBEDDING,
    HEAD,
    MIMO,
    MappedWeight,
    is_mimo,
    weight_map,
)
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.weights import Stored, require_fitting

# Tables next to the weights in old checkpoints, which follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def other_switch(mtp: SequentialConfig) -> str:
    """The setting by which modules compute something else than DeepSeek-V3's; empty if none does.
    (:func:`plain` turns the order of a projection.)"""
    as_deepseeks = {
        f"mtp.token_dropout={mtp.token_dropout:g}": mtp.token_dropout < 1,
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
            original = originals.setdefault(place.own, originals[EMBEDDING])  # a tied head
            weights.setdefault(place.own, weights[EMBEDDING])
            if parts and not equal(parts[0].read(), original.read()):
                raise UserError(
                    f"{place.parts[0][0]} in {source} differs from the trunk's embedding or head: "
                    "every prediction shares them, and tie_word_embeddings=true makes them one."
                )
            continue
        weights[place.own] = Assembled(place, parts)
        if place.own in (EMBEDDING, HEAD):
            originals[place.own] = parts[0]
    return weights
