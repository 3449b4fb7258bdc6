"""The model card of an export: what the model is, how it was trained, and which programs read its
MTP modules or silently ignore them.

This file collects the facts; ``card.md.jinja`` has the words. The sources on programs are their
loaders as of 2026-10: llama.cpp's ``conversion/``, vLLM's and SGLang's ``deepseek_v2.py``. Only
transformers and llama.cpp are tried when a model is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.interop import eagle3, gguf_layout, speculators, stack_file
from mtp_lightning.interop.gguf_writing import Written
from mtp_lightning.interop.transformers_model import one_line
from mtp_lightning.interop.writing import Contents
from mtp_lightning.markdown import plain
from mtp_lightning.model import ModelConfig
from mtp_lightning.settings import is_number

FILE = "README.md"
# Model types whose MTP layers servers use for drafting.
_SERVED = {"deepseek_v3": "DeepSeek-V3", "glm4_moe": "GLM-4.5"}
_INSTEAD = "`mtp-lightning export output=NAME.gguf` writes a file with which llama.cpp drafts."

_SUMMARY = (
    ("tokens trained on", "tokens", "{:,}"),
    ("optimizer steps", "step", "{:,}"),
    ("parameters of the run's model, each once", "parameters", "{:,}"),
    ("of them in trunk and head", "parameters_trunk", "{:,}"),
    ("training FLOPs", "flops", "{:.3e}"),
    ("seconds of training", "seconds", "{:,.0f}"),
    ("validation bits per byte (depth 0)", "val/bits_per_byte", "{:.4f}"),
    ("right answers, decoded greedily", "val/exact_match", "{:.1%}"),
    ("tokens per pass (greedy)", "decode/tokens_per_step", "{:.2f}"),
)
# The same for every depth.
_BY_DEPTH = (
    ("val/loss_depth", "{:.4f}"),
    ("val/accuracy_depth", "{:.1%}"),
    ("val/agreement_depth", "{:.1%}"),
    ("decode/acceptance_position", "{:.1%}"),
)


def render(
    name: str,
    config: ModelConfig,
    contents: Contents | Written,
    *,
    run_config: dict[str, Any],
    summary: dict[str, Any] | None,
    **facts: Any,
) -> str:
    """The card of a folder or a GGUF file, in Markdown. ``run_config`` is that with which the run
    was started; the ``facts`` are the run's own ``mtp``, which an export may leave out, the
    tensors' ``dtype``, the checkpoint's ``step``, and the ``model_type`` of a folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("mtp_lightning.interop", ".")
    jinja = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    jinja.filters |= {"plain": plain, "count": "{:,}".format}
    if isinstance(contents, Contents):
        kind, depth = facts["model_type"], contents.modules
        extra = stack_file.FILE if contents.heads == stack_file.FILE else ""
        facts["one_line"] = one_line(kind, config.trunk.n_layers, depth)
        facts["others"] = list(readers_of(config, kind, depth, extra=extra))
    # Only numbers, since anybody may have written the file.
    numbers = None if summary is None else {k: v for k, v in summary.items() if is_number(v)}
    return jinja.get_template("card.md.jinja").render(
        name=name,
        file=isinstance(contents, Written),
        config=config,
        trunk=config.trunk,
        run_config=run_config,
        data=run_config.get("data", {}),
        numbers=numbers,
        measured=_SUMMARY,
        by_depth=_BY_DEPTH,
        accepted=any(key.startswith("decode/acceptance") for key in numbers or ()),
        eagle3=eagle3,
        stack_file=stack_file,
        speculators=speculators,
        **vars(contents),
        **facts,
    )


def readers_of(config: ModelConfig, model_type: str, depth: int, *, extra: str) -> Iterator[str]:
    """What other programs do with a folder of ``depth`` MTP layers, in sentences. ``extra`` is the
    file or folder that holds the heads instead; empty if there is none."""
    if extra == eagle3.FOLDER:
        yield (
            f"vLLM and SGLang have loaders for {extra}/, which is EAGLE-3's layout; neither was "
            "tried. They draft with it only where a server is started with that folder as its "
            "draft model."
        )
    elif extra:
        yield (
            f"No other program reads {extra}: transformers, vLLM, SGLang and llama.cpp load "
            "the trunk and do not mention the heads."
        )
    if depth:
        yield from _readers_of_layers(model_type, depth)
        with suppress(UserError):  # no GGUF file states such a model
            if gguf_layout.layout_of(config).config.mtp.depth:
                yield _INSTEAD


def _readers_of_layers(model_type: str, depth: int) -> Iterator[str]:
    name = _SERVED.get(model_type)
    if model_type == "mimo":
        yield "vLLM and SGLang have loaders for MiMo's MTP layers; neither was tried."
        return
    if name is None:
        yield (
            "vLLM and SGLang draft with the MTP layers of some architectures, but not of "
            f"{model_type}, and llama.cpp's converter has no names for them: their loaders may "
            "stop at the unknown layers, which `depth=0` leaves out."
        )
        return
    yield (
        f"vLLM and SGLang have loaders for {name}'s MTP layers, which is this layout; neither was "
        "tried. Both silently ignore the layers unless a server is started with them (vLLM: "
        '`--speculative-config \'{"method": "mtp", "num_speculative_tokens": 1}\'`, SGLang: '
        "`--speculative-algorithm EAGLE`)."
    )
    if depth > 1:
        yield f"SGLang reads one MTP layer and refuses a folder of {depth}."
    if model_type == "deepseek_v3":
        yield "llama.cpp's converter silently ignores DeepSeek-V3's MTP layers."
    elif depth > 1:
        yield f"llama.cpp drafts with one MTP layer of GLM-4.5's, not with {depth}."
