"""Names of tensors in Hugging Face's layouts, and where each lies in this project's model.

One rule serves both directions. A tensor here is one or several tensors there, on top of each
other: rows of query, key and value; of gate and up; of one expert after another.

The layouts are Llama's (Qwen2's and Qwen3's too, with biases or norms on heads) and DeepSeek-V3's.
MTP depth k is layer L + k - 1 of either, as in README_WEIGHTS of DeepSeek-V3's release: the two
norms, the projection, the block, the output norm, and copies of embedding and head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig

Shape = tuple[int, ...]
Part = tuple[str, Shape]

_EMBEDDING, _HEAD = "trunk.embedding.weight", "head.weight"
# Tables that old checkpoints hold beside the weights; they follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor of this project's model and the tensors of a folder that it is made of.

    Attributes:
        own: its name here.
        parts: names and shapes there, in the order of their rows.
        copy: the folder may hold it, and then it must be equal to what ``own`` has already.
        precise: stays in float32 whatever the folder's dtype.
    """

    own: str
    parts: tuple[Part, ...]
    copy: bool = False
    precise: bool = False


def has_layout(config: ModelConfig) -> bool:
    """Whether transformers' MTP layers compute what this model's stack does (after :func:`plain`).

    They read the state after the final norm, and of a DeepSeek trunk they are mixtures of experts.
    """
    mtp = config.mtp
    if mtp.depth == 0:
        return True
    if not isinstance(mtp, SequentialConfig):
        return False
    dense_latent = config.trunk.latent_attention is not None and config.trunk.experts is None
    return mtp.branch == "final" and mtp.input_norm == "post" and not dense_latent


def plain(config: ModelConfig, weights: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same model with modules as the layouts have them: one a depth, embedding first."""
    mtp = config.mtp
    if not isinstance(mtp, SequentialConfig):
        return config, weights
    weights = dict(weights)
    if mtp.share_layers:
        first = {n: t for n, t in weights.items() if n.startswith("mtp.depths.0.")}
        for k in range(1, mtp.depth):
            weights.update({n.replace(".0.", f".{k}.", 1): t for n, t in first.items()})
    if mtp.concat == "hidden_first":
        for k in range(mtp.depth):
            name = f"mtp.depths.{k}.eh_proj.weight"
            weights[name] = torch.cat(weights[name].chunk(2, dim=1)[::-1], dim=1)
    return ModelConfig(trunk=config.trunk, mtp=SequentialConfig(depth=mtp.depth)), weights


def places(config: ModelConfig) -> Iterator[Place]:
    """Every tensor of trunk and head, and of the modules of a sequential stack."""
    trunk, mtp = config.trunk, config.mtp
    wide, vector = (trunk.vocab_size, trunk.d_model), (trunk.d_model,)
    yield _one(_EMBEDDING, "model.embed_tokens.weight", wide)
    for layer in range(trunk.n_layers):
        yield from _block(trunk, layer, f"trunk.blocks.{layer}.", f"model.layers.{layer}.")
    yield _one("trunk.norm.weight", "model.norm.weight", vector)
    yield _one(_HEAD, "lm_head.weight", wide, copy=trunk.tie_embeddings)
    if not isinstance(mtp, SequentialConfig):
        return
    for k in range(mtp.depth):
        own, theirs = f"mtp.depths.{k}.", f"model.layers.{trunk.n_layers + k}."
        yield _one(_EMBEDDING, f"{theirs}embed_tokens.weight", wide, copy=True)
        for norm in ("enorm", "hnorm"):
            yield _one(f"{own}{norm}.weight", f"{theirs}{norm}.weight", vector)
        square = (trunk.d_model, 2 * trunk.d_model)
        yield _one(f"{own}eh_proj.weight", f"{theirs}eh_proj.weight", square)
        yield from _block(trunk, None, f"{own}block.", theirs)
        yield _one(f"{own}norm.weight", f"{theirs}shared_head.norm.weight", vector)
        yield _one(_HEAD, f"{theirs}shared_head.head.weight", wide, copy=True)


def _one(own: str, theirs: str, shape: Shape, *, copy: bool = False) -> Place:
    return Place(own=own, parts=((theirs, shape),), copy=copy)


def _block(trunk: TrunkConfig, layer: int | None, own: str, theirs: str) -> Iterator[Place]:
    for norm, name in (
        ("attention_norm", "input_layernorm"),
        ("feed_forward_norm", "post_attention_layernorm"),
    ):
        yield _one(f"{own}{norm}.weight", f"{theirs}{name}.weight", (trunk.d_model,))
    attention = _grouped if trunk.latent_attention is None else _latent
    yield from attention(trunk, f"{own}attention.", f"{theirs}self_attn.")
    if trunk.has_experts(layer):
        yield from _mixture(trunk, f"{own}feed_forward.", f"{theirs}mlp.")
    else:
        yield from _dense(trunk.d_model, trunk.d_ff, f"{own}feed_forward.", f"{theirs}mlp.")


def _grouped(trunk: TrunkConfig, own: str, theirs: str) -> Iterator[Place]:
    d_model, d_head = trunk.d_model, trunk.d_head
    assert d_head is not None
    heads = {"q": trunk.n_heads, "k": trunk.n_kv_heads, "v": trunk.n_kv_heads}
    rows = {f"{theirs}{name}_proj": n * d_head for name, n in heads.items()}
    matrices = tuple((f"{name}.weight", (n, d_model)) for name, n in rows.items())
    yield Place(own=f"{own}qkv.weight", parts=matrices)
    if trunk.qkv_bias:
        yield Place(own=f"{own}qkv_bias", parts=tuple((f"{n}.bias", (w,)) for n, w in rows.items()))
    yield _one(f"{own}out.weight", f"{theirs}o_proj.weight", (d_model, trunk.attention_width))
    if trunk.qk_norm:
        yield _one(f"{own}query_norm.weight", f"{theirs}q_norm.weight", (d_head,))
        yield _one(f"{own}key_norm.weight", f"{theirs}k_norm.weight", (d_head,))


def _latent(trunk: TrunkConfig, own: str, theirs: str) -> Iterator[Place]:
    a, d_model, n_heads = trunk.latent_attention, trunk.d_model, trunk.n_heads
    assert a is not None
    named: list[tuple[str, str, Shape]] = []
    if a.q_rank is None:
        named.append(("query", "q_proj", (n_heads * a.d_head, d_model)))
    else:
        named += [
            ("query_down", "q_a_proj", (a.q_rank, d_model)),
            ("query_norm", "q_a_layernorm", (a.q_rank,)),
            ("query_up", "q_b_proj", (n_heads * a.d_head, a.q_rank)),
        ]
    named += [
        ("kv_down", "kv_a_proj_with_mqa", (a.d_cached, d_model)),
        ("kv_norm", "kv_a_layernorm", (a.kv_rank,)),
        ("kv_up", "kv_b_proj", (n_heads * (a.d_nope + a.d_value), a.kv_rank)),
        ("out", "o_proj", (d_model, n_heads * a.d_value)),
    ]
    for here, there, shape in named:
        yield _one(f"{own}{here}.weight", f"{theirs}{there}.weight", shape)


def _dense(d_model: int, d_ff: int, own: str, theirs: str) -> Iterator[Place]:
    up = tuple((f"{theirs}{name}_proj.weight", (d_ff, d_model)) for name in ("gate", "up"))
    yield Place(own=f"{own}gate_up.weight", parts=up)
    yield _one(f"{own}down.weight", f"{theirs}down_proj.weight", (d_model, d_ff))


def _mixture(trunk: TrunkConfig, own: str, theirs: str) -> Iterator[Place]:
    e, d_model = trunk.experts, trunk.d_model
    assert e is not None
    yield _one(f"{own}router.weight", f"{theirs}gate.weight", (e.n_routed, d_model))
    bias = (f"{theirs}gate.e_score_correction_bias", (e.n_routed,))
    yield Place(own=f"{own}router.expert_bias", parts=(bias,), precise=True)
    experts = [f"{theirs}experts.{i}." for i in range(e.n_routed)]
    up = (e.d_expert, d_model)
    gate_up = tuple((f"{x}{n}_proj.weight", up) for x in experts for n in ("gate", "up"))
    yield Place(own=f"{own}experts.gate_up", parts=gate_up)
    down = tuple((f"{x}down_proj.weight", (d_model, e.d_expert)) for x in experts)
    yield Place(own=f"{own}experts.down", parts=down)
    if e.n_shared:
        width = e.n_shared * e.d_expert
        yield from _dense(d_model, width, f"{own}shared.", f"{theirs}shared_experts.")


def to_folder(
    config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a folder, in order; ``config`` and ``weights`` as :func:`plain` gives them."""
    found: dict[str, Tensor] = {}
    for place in places(config):
        if place.copy and place.parts[0][0] == "lm_head.weight":
            continue  # tied: the folder's config says so
        tensor = weights[place.own]
        rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
        pieces = rows.split([shape[0] for _, shape in place.parts])
        for (name, shape), piece in zip(place.parts, pieces, strict=True):
            assert piece.shape == shape, name
            found[name] = piece.to(torch.float32 if place.precise else dtype).contiguous()
    return found


def from_folder(
    config: ModelConfig, tensors: dict[str, Tensor], *, source: str
) -> dict[str, Tensor]:
    """This project's weights, float32, of a folder's tensors; ``tensors`` is emptied.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or a copy that is none.
    """
    needed = list(places(config))
    problems = list(_misfits(needed, tensors))
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ValueError(f"The tensors in {source} do not fit its config.json: {shown}.")
    weights: dict[str, Tensor] = {}
    for place in needed:
        if place.copy:
            copied = tensors.pop(place.parts[0][0], None)
            own = weights.setdefault(place.own, weights[_EMBEDDING])  # a tied head
            if copied is not None and not torch.equal(copied.float(), own):
                raise ValueError(
                    f"{place.parts[0][0]} in {source} differs from the trunk's: here every "
                    "prediction shares the trunk's embedding and head."
                )
            continue
        parts = [tensors.pop(name).float() for name, _ in place.parts]
        weights[place.own] = torch.cat(parts) if len(parts) > 1 else parts[0]
    for name in weights:
        if name.endswith((".experts.gate_up", ".experts.down")):
            assert config.trunk.experts is not None
            weights[name] = weights[name].unflatten(0, (config.trunk.experts.n_routed, -1))
    return weights


def _misfits(needed: Iterable[Place], tensors: dict[str, Tensor]) -> Iterator[str]:
    for name in [name for name in tensors if _DERIVED.search(name)]:
        del tensors[name]
    known = set()
    for place in needed:
        for name, shape in place.parts:
            known.add(name)
            if name not in tensors:
                if not place.copy:
                    yield f"{name} is missing"
            elif tensors[name].shape != shape:
                found = list(tensors[name].shape)
                yield f"{name} has the shape {found} where {list(shape)} is needed"
    yield from (f"{name} is unknown" for name in tensors if name not in known)
