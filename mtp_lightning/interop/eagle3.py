"""The folder ``draft``: EAGLE-3's layer in the layout of its release, which SGLang and vLLM read.

``config.json`` names ``LlamaForCausalLMEagle3``. ``model.safetensors`` holds the layer as
``midlayer.*``, the projection of the trunk's states as ``fc``, the output norm, the head over the
draft vocabulary as ``lm_head``, and two tables: ``d2t`` [N] int64, a token's id minus its row, and
``t2d`` [V] bool, which tokens have a row. The embedding is the trunk's, which both servers share.

The layers whose states the layer reads are counted in two ways: for vLLM, the number of blocks
before a state; for SGLang (``eagle_config``), the index of the last block before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError, reason_of
from mtp_lightning.interop import config_reading, tensor_files
from mtp_lightning.interop.config_json import TRUNK, rope_type
from mtp_lightning.interop.conversion import from_folder, pieces, weights_of
from mtp_lightning.interop.tensor_files import CONFIG, SINGLE, StoredTensor, equal
from mtp_lightning.interop.weight_map import MappedWeight, renamed, swiglu_weights
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.inner_states import InnerStatesConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.settings import is_whole
from mtp_lightning.weights import Stored

FOLDER, ARCHITECTURE = "draft", "LlamaForCausalLMEagle3"
_OWN = "mtp_lightning"
_MODULE = "mtp.depths.0."
_TOKENS = f"{_MODULE}head.tokens"
# Steps of the training-time test in EAGLE-3's released code, which its folders do not name.
_RELEASED_STEPS = 7
# Settings of the trunk that the layer shares.
_SHARED = ("vocab_size", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "norm_eps",
           "rope_theta")  # fmt: skip
# Further fields that change what the layer computes, and their only values, besides those that
# ``config_reading`` refuses of every model.
_FIXED: dict[str, Any] = {
    "num_hidden_layers": 1,
    "norm_before_residual": False,
    "norm_output": False,
    "tie_word_embeddings": False,
}
# The values of missing fields.
_DEFAULTS = {**_FIXED, "rms_norm_eps": 1e-6}


def fits(config: ModelConfig) -> bool:
    """Whether servers can compute a model's stack from such a folder."""
    return isinstance(config.mtp, EagleConfig) and config.mtp.depth > 0 and not obstacle(config)


def obstacle(config: ModelConfig) -> str:
    """The setting of a stack on inner states that servers do not compute; empty if there is none.

    They rotate whole heads. They collect the states in the order of the blocks, each once, and
    none after the last block.
    """
    mtp, trunk = config.mtp, config.trunk
    assert isinstance(mtp, InnerStatesConfig)
    if mtp.confidence:
        return "objective.confidence=true"
    if (rotary_dim := trunk.attention.rotary_dim(trunk)) != trunk.d_head:
        return f"model.attention.d_rope={rotary_dim}"
    layers = list(mtp.layers_of(trunk.n_layers))
    ascending = layers == sorted(set(layers)) and layers[-1] < trunk.n_layers
    return "" if ascending else f"mtp.layers={layers}"


def is_there(folder: Path) -> bool:
    """Whether a folder has such a folder inside."""
    return (folder / FOLDER / CONFIG).is_file()


def write(folder: Path, model: MTPModel, dtype: torch.dtype, *, max_positions: int) -> None:
    """Write the folder inside the trunk's; arguments as of ``stack_file.write``, for a model whose
    config :func:`fits`."""
    fields = _fields(model.config, dtype, max_positions=max_positions)
    tensor_files.write_folder(folder / FOLDER, fields, layer_tensors(model, dtype))


def layer_tensors(model: MTPModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the layer and its two tables, by the names of its release."""
    weights, vocab_size = weights_of(model), model.config.trunk.vocab_size
    tokens = weights[_TOKENS]
    tensors = pieces(_weight_map(model.config), weights, dtype)
    tensors["d2t"] = tokens - torch.arange(len(tokens))
    tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, tokens, 1)
    return tensors


def read(
    folder: Path, trunk: TrunkConfig, embedding: StoredTensor | None, *, allow: Collection[str] = ()
) -> tuple[MTPConfig, dict[str, Stored | Tensor]]:
    """The stack and its weights, by the model's own names; arguments as of ``stack_file.read``.

    Raises:
        UserError: the layer does not fit the trunk, or computes something else.
        OSError: a file is missing.
    """
    source = str(folder / FOLDER)
    fields = tensor_files.read_json(folder / FOLDER / CONFIG)
    if fields.get("architectures") != [ARCHITECTURE]:
        raise UserError(f"{source} is not the folder of a {ARCHITECTURE}: take it away.")
    tensors, _ = tensor_files.open_file(folder / FOLDER / SINGLE)
    mtp = _stack(fields, trunk, source, allow)
    config = ModelConfig(trunk=trunk, mtp=mtp)
    mtp.check_vocabulary(trunk)
    rows = mtp.draft_vocab or trunk.vocab_size
    wanted = _fields(config, torch.float32, max_positions=0)
    _, wanted["rope_scaling"] = config_reading.rope_settings(wanted, source)
    # Switches may also stand in eagle_config, where servers read them first.
    stated = {**fields, **_nested(fields), "model_type": "llama"}
    config_reading.require_known(stated, source=source)
    stated["rope_theta"], stated["rope_scaling"] = config_reading.rope_settings(stated, source)
    defaults = {**_DEFAULTS, "head_dim": trunk.d_model // trunk.n_heads}
    for name in (*(TRUNK[own] for own in _SHARED), *_FIXED, "rope_scaling"):
        value = defaults.get(name) if stated.get(name) is None else stated[name]
        if value != wanted[name]:
            raise UserError(
                f"{source} has {name}={value}, and a layer on this trunk has {wanted[name]}: it "
                "belongs to another model."
            )
    copy = tensors.pop("embed_tokens.weight", None)
    if copy is not None and (embedding is None or not equal(copy.read(), embedding.read())):
        raise UserError(f"{source} has an embedding of its own: only the trunk's can be used.")
    tensors.pop("t2d", None)
    offsets = tensors.pop("d2t", None)
    tokens = torch.arange(rows)
    if offsets is not None:
        if offsets.shape != tokens.shape or offsets.dtype not in (torch.int32, torch.int64):
            raise UserError(f"d2t in {source} is not a table of {rows:,} whole numbers.")
        tokens = tokens + offsets.read()
    weights = from_folder(_weight_map(config), tensors, source=source)
    return mtp, {**weights, _TOKENS: tokens}


def _fields(config: ModelConfig, dtype: torch.dtype, *, max_positions: int) -> dict[str, Any]:
    """The content of ``config.json``."""
    trunk, mtp = config.trunk, config.mtp
    assert isinstance(mtp, EagleConfig)
    layers = mtp.layers_of(trunk.n_layers)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **{TRUNK[own]: getattr(trunk, own) for own in _SHARED},
        **_FIXED,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "target_hidden_size": trunk.d_model,
        "draft_vocab_size": mtp.draft_vocab or trunk.vocab_size,
        "max_position_embeddings": max_positions,
        "rope_scaling": None if trunk.rope_scaling is None else rope_type(trunk),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eagle_aux_hidden_state_layer_ids": list(layers),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [n - 1 for n in layers],
        },
        _OWN: mtp.to_dict(),
    }


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of ``eagle_config``, SGLang's part of a ``config.json``."""
    nested = fields.get("eagle_config")
    return nested if isinstance(nested, dict) else {}


def _stack(
    fields: dict[str, Any], trunk: TrunkConfig, source: str, allow: Collection[str]
) -> EagleConfig:
    """The stack that a ``config.json`` describes: this project's own words, or a release's."""
    if _OWN in fields:
        try:
            mtp = MTPConfig.from_dict(fields[_OWN], allow=allow)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{source} does not describe its layer: {reason_of(error)}.") from error
        if not isinstance(mtp, EagleConfig):
            raise UserError(f"{source} describes mtp={mtp.variant}, and not EAGLE-3's layer.")
        return mtp
    vocab = fields.get("draft_vocab_size")
    layers = fields.get("eagle_aux_hidden_state_layer_ids")
    if layers is None:
        indices: Any = _nested(fields).get("eagle_aux_hidden_state_layer_ids")
        whole = isinstance(indices, list) and all(map(is_whole, indices))
        layers = [n + 1 for n in indices] if whole else indices
    if layers is not None and not (isinstance(layers, list) and all(map(is_whole, layers))):
        raise UserError(f"{source} names no layers of the trunk, but {layers}.")
    return EagleConfig(
        depth=_RELEASED_STEPS,
        layers=None if layers is None else tuple(layers),
        draft_vocab=None if vocab in (None, trunk.vocab_size) else vocab,
    )


def _weight_map(config: ModelConfig) -> Iterator[MappedWeight]:
    """The trained tensors of the layer."""
    trunk, mtp = config.trunk, config.mtp
    assert isinstance(mtp, EagleConfig)
    width, size = trunk.d_model, trunk.d_head
    heads = {"q": trunk.n_heads, "k": trunk.n_kv_heads, "v": trunk.n_kv_heads}
    attention = "midlayer.self_attn."
    parts = tuple((f"{attention}{x}_proj.weight", (n * size, 2 * width)) for x, n in heads.items())
    norms = {
        "token_norm": "midlayer.input_layernorm",
        "hidden_norm": "midlayer.hidden_norm",
        "feed_forward_norm": "midlayer.post_attention_layernorm",
        "norm": "norm",
    }
    places = [
        renamed("fuse.weight", "fc.weight", (width, mtp.n_states * width)),
        MappedWeight(own="attention.qkv.weight", parts=parts),
        renamed("attention.out.weight", f"{attention}o_proj.weight", (width, trunk.n_heads * size)),
        *(renamed(f"{own}.weight", f"{theirs}.weight", (width,)) for own, theirs in norms.items()),
        *(p.under("feed_forward.", "midlayer.mlp.") for p in swiglu_weights(width, trunk.d_ff)),
        renamed("head.weight", "lm_head.weight", (mtp.draft_vocab or trunk.vocab_size, width)),
    ]
    for place in places:
        yield place.under(_MODULE, "")
