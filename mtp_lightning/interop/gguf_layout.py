"""The layouts of GGUF files: which of llama.cpp's architectures a model gets, and its tensors.

The architectures that llama.cpp drafts with (``draft-mtp``) and that compute what a model of this
project computes are ``glm4moe``, for grouped-query attention, and ``deepseek2``, for latent
attention. Both read one module of DeepSeek-V3's form after the trunk's layers, and both need a
mixture of experts in it. A dense module is therefore written as the mixture's shared expert, next
to one routed expert of zeros, which adds exactly 0.

A layout is a list of :class:`GGUFEntry`. Each names the tensors in Hugging Face's layout that a
tensor of the file is made of, so that one list serves the writer and the reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import eagle3
from mtp_lightning.interop.config_json import trunk_type
from mtp_lightning.interop.conversion import other_switch
from mtp_lightning.interop.weight_map import MappedWeight, Shape, weight_map
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig

# llama.cpp's architecture of a trunk by the type of its layout, and the one that has modules.
PLAIN = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "glm4_moe": "glm4moe",
    "deepseek_v3": "deepseek2",
}
DRAFTING = {**dict.fromkeys(PLAIN, "glm4moe"), "deepseek_v3": "deepseek2"}

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# The names of a layer's tensors, without the endings.
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in ("q", "k", "v", "q_a", "q_b")},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in ("q", "k")},
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")},
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    **{x: f"nextn.{x}" for x in ("enorm", "hnorm", "eh_proj", "embed_tokens")},
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
_DENSE = re.compile(r"mlp\.(gate|up|down)_proj$")
# The divisors of Llama's rotary frequencies, and the numbers besides the factor that llama.cpp's
# converter computes them from.
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": 8192}
# Width of the routed expert of zeros: one block of Q8_0, where it divides the dense layer's width.
_NARROW = 32


@dataclass(frozen=True, kw_only=True)
class GGUFEntry:
    """A tensor of a GGUF file."""

    name: str  # in the file
    shape: Shape  # outermost axis first
    # The tensors in Hugging Face's layout that it holds: one, several of one shape, which are
    # stacked, or none for a tensor of fixed numbers. If several entries hold pieces of one tensor,
    # the pieces are concatenated along the second axis.
    parts: tuple[str, ...] = ()
    fixed: Tensor | None = None  # these numbers; None for zeros
    pack: Callable[[Tensor], Tensor] = lambda part: part  # turns a part into the stored tensor
    unpack: Callable[[Tensor], Tensor] = lambda stored: stored  # the inverse of ``pack``
    copy: bool = False  # whether it is a copy of the trunk's tensor, which a file may leave out

    def assemble(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, from those in Hugging Face's layout."""
        if not self.parts:
            return torch.zeros(self.shape) if self.fixed is None else self.fixed
        packed = [self.pack(tensors[name]) for name in self.parts]
        return packed[0] if len(packed) == 1 else torch.stack(packed)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout in which a model is written."""

    arch: str  # llama.cpp's architecture
    config: ModelConfig  # the written part of the model, its modules in the layout's form
    dropped: str = ""  # what is left out, and why, in a sentence; empty if nothing is

    @property
    def experts(self) -> ExpertsConfig:
        """The mixture in the file, with the shared expert that ``glm4moe`` always has. If the
        layers are dense, that of a module is the shared expert of a mixture."""
        trunk, e = self.config.trunk, self.config.trunk.feed_forward
        if isinstance(e, ExpertsConfig):
            return e if e.n_shared or self.arch != "glm4moe" else replace(e, n_shared=1)
        n = math.gcd(trunk.d_ff, _NARROW)
        return ExpertsConfig(
            n_routed=1, n_shared=trunk.d_ff // n, top_k=1, d_expert=n, first_k_dense=trunk.n_layers
        )

    def sentences(self) -> Iterator[str]:
        """The use of the file in llama.cpp, in sentences."""
        if self.dropped:
            yield self.dropped
        mtp = self.config.mtp
        if not isinstance(mtp, SequentialConfig):
            return
        yield (
            "llama.cpp drafts with the module only where it is asked to (`llama-server --spec-type "
            "draft-mtp --spec-draft-n-max 1`), and decodes without drafts otherwise."
        )
        if self.experts != self.config.trunk.feed_forward:
            yield (
                f"llama.cpp has no architecture of this trunk with MTP modules, so the file is of "
                f"`{self.arch}`, which computes the same: an expert of zeros stands where it needs "
                "one and the model has none."
            )


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a model.

    Raises:
        UserError: no architecture of llama.cpp computes the same as its trunk.
    """
    trunk, mtp = config.trunk, config.mtp
    kind = trunk_type(trunk)
    _require_plain(trunk, kind)
    unread = _unread(config)
    if mtp.depth and not unread:
        assert isinstance(mtp, SequentialConfig)
        written = ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=1))
        further = " 2 is" if mtp.depth == 2 else f"s 2 to {mtp.depth} are"
        dropped = "" if mtp.n_modules == 1 else (
            f"MTP module{further} left out: llama.cpp reads one module of an "
            f"architecture such as {DRAFTING[kind]}, and drafts every token with it."
        )  # fmt: skip
        return Layout(arch=DRAFTING[kind], config=written, dropped=dropped)
    e = trunk.feed_forward
    uneven = kind == "qwen3_moe" and isinstance(e, ExpertsConfig) and e.first_k_dense
    trunk_alone = ModelConfig(trunk=trunk, mtp=NoMTPConfig())
    return Layout(arch=(DRAFTING if uneven else PLAIN)[kind], config=trunk_alone, dropped=unread)


def _unread(config: ModelConfig) -> str:
    """Why llama.cpp reads none of a model's MTP modules; empty if it does, or if there are none."""
    mtp = config.mtp
    if not mtp.depth:
        return ""
    if config.trunk.rope_scaling is not None:
        setting = "model.rope_scaling"
    elif isinstance(mtp, EagleConfig):
        if not (setting := eagle3.obstacle(config)):
            return (
                "The MTP heads are left out: llama.cpp reads EAGLE's layer from a file of its own, "
                "which `mtp-lightning export output=DRAFT.gguf layout=eagle3` writes."
            )
    elif not isinstance(mtp, SequentialConfig):
        setting = f"mtp={mtp.variant}"
    elif not (setting := other_switch(mtp)):
        if getattr(config.trunk.attention, "q_rank", 1) is not None:
            return ""
        setting = "model.attention.q_rank=null"
    return (
        f"The MTP heads are left out: llama.cpp has no architecture that drafts with {setting} on "
        "such a trunk."
    )


def _require_plain(trunk: TrunkConfig, kind: str) -> None:
    """Refuse a trunk that the architectures do not compute."""
    scaling = {} if trunk.rope_scaling is None else asdict(trunk.rope_scaling)
    if scaling and (kind != "llama" or scaling != {**scaling, **LLAMA3}):
        raise UserError(
            "model.rope_scaling cannot be written as GGUF here, except Llama 3's in a trunk like "
            "Llama's: export the model as a folder."
        )
    latent = trunk.attention
    if isinstance(latent, LatentAttentionConfig) and latent.norm_eps not in (None, trunk.norm_eps):
        raise UserError(
            f"model.attention.norm_eps={latent.norm_eps:g} with model.norm_eps="
            f"{trunk.norm_eps:g} cannot be written as GGUF: deepseek2 has one epsilon for all."
        )
    # is_lite in llama.cpp's src/models/deepseek2.cpp
    lite = trunk.n_layers in (26, 27) or (trunk.n_layers, trunk.vocab_size) == (48, 128_256)
    if isinstance(latent, LatentAttentionConfig) and lite and latent.q_rank is not None:
        raise UserError(
            f"model.n_layers={trunk.n_layers} with model.attention.q_rank={latent.q_rank} cannot "
            "be written as GGUF: llama.cpp takes such a model for DeepSeek-V2-Lite, which has no "
            "query latent. Export a folder."
        )


def entries(layout: Layout) -> Iterator[GGUFEntry]:
    """All tensors of a file: the model's, and those that the architecture needs besides."""
    own = {entry.name: entry for entry in _entries(layout, layout.config)}
    yield from own.values()
    trunk = layout.config.trunk
    if layout.arch in DRAFTING.values():  # what its mixtures have and the model lacks is zero
        mixture = replace(layout.experts, scoring="sigmoid")
        whole = replace(layout.config, trunk=replace(trunk, feed_forward=mixture))
        lacking = (entry for entry in _entries(layout, whole) if entry.name not in own)
        yield from (GGUFEntry(name=entry.name, shape=entry.shape) for entry in lacking)
    if trunk.rope_scaling is not None:
        half, theta = trunk.attention.rotary_dim(trunk) // 2, trunk.rope_theta
        frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
        divisors = (frequency / trunk.rope_scaling.stretched(frequency, theta)).float()
        yield GGUFEntry(name=FREQUENCIES, shape=(half,), fixed=divisors)


def _entries(layout: Layout, config: ModelConfig) -> Iterator[GGUFEntry]:
    """The tensors of a model in the layout."""
    for place in weight_map(config):
        for entry in _single(layout, place) if place.stacked is None else _experts(place):
            yield replace(entry, copy=place.copy)


def _single(layout: Layout, place: MappedWeight) -> Iterator[GGUFEntry]:
    """The tensors that a weight is made of."""
    trunk = layout.config.trunk
    rotary_heads = {"self_attn.q_proj": trunk.n_heads, "self_attn.k_proj": trunk.n_kv_heads}
    for name, shape in place.parts:
        if name in _TOP:
            yield GGUFEntry(name=_TOP[name], shape=shape, parts=(name,))
            continue
        layer, rest, kind = _parsed(name)
        if rest == "self_attn.kv_b_proj":
            yield from _up(trunk, f"blk.{layer}.", name)
            continue
        if layer >= trunk.n_layers and _DENSE.match(rest):
            rest = rest.replace("mlp.", "mlp.shared_experts.")
        after_attention = layout.arch == "glm4moe" and rest == "post_attention_layernorm"
        theirs = "post_attention_norm" if after_attention else LAYER[rest]
        entry = GGUFEntry(name=f"blk.{layer}.{theirs}.{kind}", shape=shape, parts=(name,))
        if layout.arch == "llama" and rest in rotary_heads:
            entry = in_pairs(entry, rotary_heads[rest])
        yield entry


def in_pairs(entry: GGUFEntry, heads: int) -> GGUFEntry:
    """llama.cpp pairs neighbors of a head where the layout pairs its halves."""
    return replace(
        entry,
        pack=lambda x: x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2),
        unpack=lambda x: x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2),
    )


def _parsed(name: str) -> tuple[int, str, str]:
    """Layer, name within the layer, and ``weight`` or ``bias``."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)[._](weight|bias)", name)
    assert match is not None, name
    return int(match[1]), match[2], match[3]


def _up(trunk: TrunkConfig, block: str, name: str) -> Iterator[GGUFEntry]:
    """The matrix from the latent to keys and values, which llama.cpp holds apart, by heads."""
    a = trunk.attention
    assert isinstance(a, LatentAttentionConfig)
    heads, keys, both = trunk.n_heads, a.d_nope, a.d_nope + a.d_value
    yield GGUFEntry(
        name=f"{block}attn_k_b.weight",
        shape=(heads, a.kv_rank, keys),
        parts=(name,),
        pack=lambda x: x.unflatten(0, (heads, both))[:, :keys].transpose(1, 2),
        unpack=lambda x: x.transpose(1, 2),
    )
    yield GGUFEntry(
        name=f"{block}attn_v_b.weight",
        shape=(heads, a.d_value, a.kv_rank),
        parts=(name,),
        pack=lambda x: x.unflatten(0, (heads, both))[:, keys:],
    )


def _experts(place: MappedWeight) -> Iterator[GGUFEntry]:
    """A mixture's matrices of one kind, stacked."""
    kinds: dict[str, list[str]] = {}
    shapes = dict(place.parts)
    for name in shapes:
        kinds.setdefault(name.rsplit(".", 2)[1].removesuffix("_proj"), []).append(name)
    for kind, names in kinds.items():
        layer, _, _ = _parsed(names[0])
        yield GGUFEntry(
            name=f"blk.{layer}.ffn_{kind}_exps.weight",
            shape=(len(names), *shapes[names[0]]),
            parts=tuple(names),
        )
