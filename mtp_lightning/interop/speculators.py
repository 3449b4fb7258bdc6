"""The folder ``speculator``: trained heads in the layout of vLLM's library speculators (0.9).

Its model ``mtp`` applies one sequential module at every depth, on the layers of Qwen3, as
``mtp/sequential.py`` does: the embedding's half of the projection first, un-shifted positions, and
the normed output for the head and for the next depth. Depth 1 reads the state that a program gives
it, and vLLM gives the one after the trunk's final norm. Embedding and head are read from the
trunk's folder, which ``config.json`` names as the verifier. Its model ``eagle3`` is EAGLE-3's
layer, on the layers of Llama, with a head of its own and a copy of the trunk's embedding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import config_json, eagle3, tensor_files
from mtp_lightning.interop.conversion import other_switch, pieces, plain
from mtp_lightning.interop.tensor_files import SINGLE
from mtp_lightning.interop.verify import check_tensors
from mtp_lightning.interop.weight_map import MIMO, module_weights
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.feed_forward import DenseConfig

FOLDER, LAYOUT, VERSION = "speculator", "speculators", "0.9.0"
_CLASSES = {"mtp": "MTPDraftModel", "eagle3": "Eagle3DraftModel"}
# Fields of a trunk's config.json about MTP layers next to it.
_OF_MODULES = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_layer_types")


def kind(config: ModelConfig) -> str:
    """The library's name for the model that computes the same as the heads.

    Raises:
        UserError: it has none; the message names the setting and the reason.
    """
    if reason := _obstacle(config):
        raise UserError(f"layout={LAYOUT} cannot hold this model, and layout=own can: {reason}.")
    return "eagle3" if isinstance(config.mtp, EagleConfig) else "mtp"


def _obstacle(config: ModelConfig) -> str:
    """Why the library computes something else, beginning with the setting; empty if it does not."""
    mtp, trunk = config.mtp, config.trunk
    if mtp.variant == "dflash":
        return (
            "the mask of mtp=dflash is trained, and the library embeds its mask as a token of the "
            "verifier"
        )
    if mtp.depth == 0 or not isinstance(mtp, EagleConfig | SequentialConfig):
        return (
            f"mtp={mtp.variant} of depth {mtp.depth} has no heads of the library's kinds, "
            "which are those of mtp=sequential and mtp=eagle"
        )
    if isinstance(mtp, EagleConfig):
        setting = eagle3.obstacle(config)
        return setting and (
            f"{setting} has no place in it, since it has no estimates of acceptance, rotates whole "
            "heads, and reads three states in ascending order, none after the last block"
        )
    if mtp.n_modules > 1:
        return (
            f"mtp.depth={mtp.depth} has a module for every depth, and the library applies one at "
            "all depths, as mtp.depth=1 or mtp.share_layers=true trains it"
        )
    if setting := other_switch(mtp):
        return (
            f"{setting} has no place in it: the library's module has one block and reads, at every "
            "position, a token and the state after the trunk's final norm, which vLLM gives it"
        )
    layers = config_json.trunk_type(trunk)
    if layers != "qwen3":
        return (
            f"the trunk has the layers of {layers}, and the library has modules for those of qwen3 "
            "alone (model.attention.qk_norm=true, dense)"
        )
    return ""


def tensors(model: MTPModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The folder's tensors, by the library's names, of a model that has a :func:`kind`;
    floating-point ones in ``dtype``."""
    config = model.config
    if not isinstance(config.mtp, EagleConfig):
        places = module_weights(config.trunk, "mtp.depths.0.", "mtp_layers.0.", MIMO)
        return pieces(places, plain(model), dtype)
    draft = eagle3.layer_tensors(model, dtype)
    if config.mtp.draft_vocab in (None, config.trunk.vocab_size):  # then it has no such tables
        draft = {name: tensor for name, tensor in draft.items() if name not in ("d2t", "t2d")}
    layer = {name.replace("midlayer.", "layers.0.", 1): t for name, t in draft.items()}
    # Without the copy, version 0.9.0 may leave its own embedding as it was allocated.
    embedding = model.trunk.embedding.weight.detach().cpu().to(dtype)
    return {"embed_tokens.weight": embedding, **layer}


def write(
    folder: Path, model: MTPModel, *, verifier: Path, dtype: torch.dtype, **stated: Any
) -> int:
    """Write the folder inside ``folder`` for a model that has a :func:`kind`. Return the number of
    values in its tensors.

    Args:
        verifier: the path by which the trunk's folder will be found.
        stated: ``max_positions`` and ``eot_id`` of :func:`config_json.to_json`.
    """
    content = tensors(model, dtype)
    fields = _fields(model.config, str(verifier), dtype, **stated)
    tensor_files.write_folder(folder / FOLDER, fields, content)
    return sum(tensor.numel() for tensor in content.values() if tensor.is_floating_point())


def check(folder: Path, model: MTPModel, dtype: torch.dtype) -> str:
    """Checks that the tensors of the folder inside ``folder`` are a model's, each rounded once; see
    :func:`check_tensors`."""
    unread, _ = tensor_files.open_file(folder / FOLDER / SINGLE)
    stored = {name: part.read() for name, part in unread.items()}
    check_tensors(stored, tensors(model, dtype), folder / FOLDER)
    return f"{FOLDER}, read back, holds the heads; speculators was not started"


def _fields(
    config: ModelConfig, verifier: str, dtype: torch.dtype, **stated: Any
) -> dict[str, Any]:
    """The content of ``config.json``."""
    name, trunk, mtp = kind(config), config.trunk, config.mtp
    layer = trunk
    if isinstance(mtp, EagleConfig):
        kinds: dict[str, Any] = {"attention": GroupedQueryConfig(), "feed_forward": DenseConfig()}
        layer = replace(trunk, n_layers=1, tie_embeddings=False, **kinds)
    one_layer = ModelConfig(trunk=layer, mtp=NoMTPConfig())
    dtype_name = str(dtype).removeprefix("torch.")
    layer_fields = config_json.to_json(one_layer, depth=0, dtype=dtype_name, **stated)
    fields: dict[str, Any] = {
        "architectures": [_CLASSES[name]],
        "speculators_model_type": name,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": name,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": mtp.depth}],
            "verifier": {
                "name_or_path": verifier,
                "architectures": [config_json.ARCHITECTURES[config_json.trunk_type(trunk)]],
            },
        },
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "transformer_layer_config": {n: v for n, v in layer_fields.items() if n not in _OF_MODULES},
    }
    if not isinstance(mtp, EagleConfig):
        return fields | {"num_nextn_predict_layers": 1}
    switches = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return fields | {
        "draft_vocab_size": mtp.draft_vocab or trunk.vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(mtp.layers_of(trunk.n_layers)),
        **dict.fromkeys(switches, False),
    }
