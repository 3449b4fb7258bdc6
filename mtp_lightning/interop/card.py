"""The model card of an export: what the model is, how it was trained, and which programs read its
MTP modules or silently ignore them.

The sources on programs are their loaders as of 2026-10: llama.cpp's ``conversion/``, vLLM's and
SGLang's ``deepseek_v2.py``. Only transformers and llama.cpp are tried when a model is exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mtp_lightning.interop import eagle3, heads, speculators
from mtp_lightning.interop.config_json import STANDS_FOR
from mtp_lightning.interop.gguf_writing import Written
from mtp_lightning.interop.names import is_mimo
from mtp_lightning.interop.transformers_model import one_line
from mtp_lightning.interop.writing import Contents
from mtp_lightning.markdown import plain
from mtp_lightning.model import ModelConfig
from mtp_lightning.settings import is_number

FILE = "README.md"
# Model types whose MTP layers servers use for drafting.
_SERVED = {"deepseek_v3": "DeepSeek-V3", "glm4_moe": "GLM-4.5"}
_INSTEAD = "`mtp-lightning export output=NAME.gguf` writes a file with which llama.cpp drafts"

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


def render(
    name: str,
    config: ModelConfig,
    contents: Contents,
    *,
    model_type: str,
    dtype: str,
    step: int,
    run_config: dict[str, Any],
    summary: dict[str, Any] | None,
) -> str:
    """The card, in Markdown.

    Args:
        name: name of the export.
        config: config of the model.
        contents: the contents of the folder.
        model_type: model type in config.json.
        dtype: dtype of the tensors.
        step: optimizer steps of the checkpoint.
        run_config: the config that the run was started with.
        summary: the run's summary.json; None if there is none.
    """
    return _page(
        name,
        ["library_name: transformers", "pipeline_tag: text-generation"],
        description=_description(config, contents, dtype),
        use=_use(config, contents, model_type),
        training=_training(config, step, run_config, summary),
    )


def render_file(
    name: str,
    config: ModelConfig,
    written: Written,
    *,
    dtype: str,
    step: int,
    run_config: dict[str, Any],
    summary: dict[str, Any] | None,
) -> str:
    """The card of a GGUF file; arguments as of :func:`render`."""
    modules = written.layout.config.mtp.depth
    with_module = f", and {modules} MTP module of DeepSeek-V3's form" if modules else ""
    description = (
        f"A GGUF file for llama.cpp, architecture `{written.layout.arch}`, {written.parameters:,} "
        f"values in {dtype}: a decoder of {config.trunk.n_layers} layers (d_model "
        f"{config.trunk.d_model}){with_module}."
    )
    training = _training(config, step, run_config, summary)
    return _page(name, [], description=[description], use=written.notes, training=training)


def _page(
    name: str,
    tags: Iterable[str],
    *,
    description: Iterable[str],
    use: Iterable[str],
    training: Iterable[str],
) -> str:
    """The frame of a card: its tags and its three parts, by line."""
    parts = [
        "---",
        *tags,
        "tags: [multi-token-prediction, mtp-lightning]",
        "---",
        f"# {plain(name)}",
        "",
        *description,
        "",
        "## Use",
        "",
        *use,
        "",
        "## Training",
        "",
        *training,
    ]
    return "\n".join(parts) + "\n"


def _description(config: ModelConfig, contents: Contents, dtype: str) -> Iterator[str]:
    trunk = config.trunk
    kind = trunk.attention.variant.replace("_", "-")
    mixture = trunk.feed_forward.variant == "experts"
    feed = "mixtures of experts" if mixture else "dense feed-forward layers"
    yield (
        f"A decoder of {trunk.n_layers} layers (d_model {trunk.d_model}, {trunk.n_heads} heads, "
        f"{kind} attention, {feed}), vocabulary {trunk.vocab_size:,}. {_count(config, contents)}, "
        f"in {dtype}, in {contents.shards} file(s) of weights."
    )
    yield ""
    first = trunk.n_layers
    if contents.layer_depths and is_mimo(config):
        yield (
            f"It was trained to predict several tokens. Its {contents.layer_depths} MTP module(s) "
            "of MiMo's form are `model.mtp_layers.0` and on: `token_layernorm`, "
            "`hidden_layernorm`, `input_proj` (the hidden state first, before the final norm), the "
            "block, `final_layernorm`. Embedding and head are the trunk's."
        )
    elif contents.layer_depths:
        layers = f"`model.layers.{first}`"
        if contents.layer_depths > 1:
            layers += f" to `model.layers.{first + contents.layer_depths - 1}`"
        yield (
            f"It was trained to predict several tokens. Its {contents.layer_depths} MTP module(s) "
            f"of DeepSeek-V3's form are {layers}: "
            "`enorm`, `hnorm`, `eh_proj`, the block, `shared_head.norm`, and copies of the "
            "embedding and the head, which all depths share."
        )
    elif contents.heads == eagle3.FOLDER:
        yield (
            "It was trained with EAGLE-3's layer, which is in the folder "
            f"`{eagle3.FOLDER}` in the layout that SGLang "
            "(`--speculative-algorithm EAGLE3 --speculative-draft-model-path`) and vLLM "
            '(`"method": "eagle3"`) read; neither was tried with this folder. mtp-lightning '
            "reads it, too; transformers only sees the trunk."
        )
    elif contents.heads == heads.FILE:
        yield (
            f"It was trained with {config.mtp.depth} MTP head(s) of the variant "
            f"`{config.mtp.variant}`, which no layout of transformers, vLLM or SGLang has. They "
            f"are in `{heads.FILE}`, next to the plain trunk: tensors by mtp-lightning's names, "
            "and in the file's metadata under `mtp_lightning` the JSON of their switches. "
            "mtp-lightning reads them; other programs only see the trunk."
        )
    elif contents.heads == speculators.FOLDER:
        yield (
            f"It was trained with `mtp={config.mtp.variant}`, whose heads are in the folder "
            f"`{speculators.FOLDER}` in the layout of vLLM's library speculators "
            f"{speculators.VERSION}, as its model `{speculators.kind(config)}`. Its `config.json` "
            "names this folder as the verifier, by the path that it was written to."
        )
    else:
        yield "It has no MTP modules to draft with."


def _count(config: ModelConfig, contents: Contents) -> str:
    """What the stored values are."""
    trunk, whole = config.num_trunk_params(), config.num_params()
    text = f"{contents.parameters:,} values are stored: {trunk:,} of the trunk and its head"
    if whole > trunk:
        text += f", {whole - trunk:,} of the MTP modules"
    beyond = contents.parameters - whole
    if beyond > 0:
        text += (
            f", {beyond:,} that repeat others (each module's embedding and head), balance experts "
            "or translate token ids"
        )
    elif beyond < 0:
        text += f", without {-beyond:,} that only training or min_confidence needs"
    return text


def _use(config: ModelConfig, contents: Contents, model_type: str) -> Iterator[str]:
    depth, layers = contents.layer_depths, config.trunk.n_layers
    extra = heads.FILE if contents.heads == heads.FILE else ""
    others = list(readers_of(model_type, depth, extra=extra))
    if depth and model_type in STANDS_FOR:
        yield (
            "The MTP layers are read by mtp-lightning. transformers has no class for this model "
            "type: its `Qwen2ForCausalLM.from_pretrained(FOLDER)` is the trunk. " + " ".join(others)
        )
        return
    yield "```python"
    yield "import transformers"
    yield ""
    if depth:
        yield "# transformers knows the MTP layers of other models; this line names this one's:"
        yield one_line(model_type, layers, depth)
    yield "model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
    yield "tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)"
    yield 'inputs = tokenizer("text", return_tensors="pt")'
    mtp = ", use_mtp=True" if depth else ""
    yield f"model.generate(**inputs, max_new_tokens=100{mtp})"
    yield "```"
    yield ""
    if depth:
        yield (
            "`use_mtp=True` drafts with the MTP layers (one prompt at a time); the text is the "
            "same without it. Without the line above the trunk loads with a warning about unknown "
            "layers, and `use_mtp` does not work. `python -m mtp_lightning.interop.check FOLDER` "
            "checks all of this."
        )
        yield ""
        yield (
            "The MTP layers are read by transformers 5 (checked when this was written, unless the "
            "check was switched off) and mtp-lightning. " + " ".join(others)
        )
    else:
        yield f"The trunk is in {model_type}'s plain layout, which all servers of it read."
        yield from others


def readers_of(model_type: str, depth: int, *, extra: str) -> Iterator[str]:
    """What other programs do with a folder, in sentences.

    Args:
        model_type: in its config.json.
        depth: MTP depths among its layers.
        extra: the file or folder that holds the heads instead; empty if there is none.
    """
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
    if not depth:
        return
    name = _SERVED.get(model_type)
    if model_type == "mimo":
        yield "vLLM and SGLang have loaders for MiMo's MTP layers; neither was tried."
        return
    if name is None:
        yield (
            f"vLLM and SGLang draft with the MTP layers of some architectures, but not of "
            f"{model_type}, and llama.cpp's converter has no names for them: their loaders may "
            f"stop at the unknown layers, which `depth=0` leaves out. {_INSTEAD}."
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
        yield f"llama.cpp's converter silently ignores DeepSeek-V3's MTP layers: {_INSTEAD}."
    elif depth > 1:
        yield f"llama.cpp drafts with one MTP layer of GLM-4.5's, not with {depth}: {_INSTEAD}."


def _training(
    config: ModelConfig, step: int, run_config: dict[str, Any], summary: dict[str, Any] | None
) -> Iterator[str]:
    if not step:
        yield "It was converted from another model, whose card describes it."
        return
    yield f"The export is the checkpoint after {step:,} optimizer steps."
    data = run_config.get("data", {})
    if "seq_len" in data:
        yield f"It was trained on windows of {plain(data['seq_len'])} tokens."
    if "mtp_lambda" in run_config:
        yield (
            f"mtp: {config.mtp.variant}, depth {config.mtp.depth}, "
            f"mtp_lambda {plain(run_config['mtp_lambda'])}, seed {plain(run_config.get('seed'))}."
        )
    yield ""
    if summary is None:
        yield "The run left no summary.json, so there are no measurements, acceptance included."
        return
    # Only numbers, since anybody may have written the file.
    summary = {k: v for k, v in summary.items() if is_number(v)}
    yield f"Measured at the end of the run, after {summary.get('step', step):,} steps:"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for label, key, form in _SUMMARY:
        if key in summary:
            yield f"| {label} | {form.format(summary[key])} |"
    yield ""
    yield "| depth | loss (nats) | accuracy | agreement with depth 0 | drafts accepted |"
    yield "|---|---|---|---|---|"
    for k in range(config.mtp.depth + 1):
        loss = summary.get(f"val/loss_depth_{k}")
        shares = [
            summary.get(f"{name}_{k}")
            for name in ("val/accuracy_depth", "val/agreement_depth", "decode/acceptance_position")
        ]
        cells = ["" if loss is None else f"{loss:.4f}"]
        cells += ["" if share is None else f"{share:.1%}" for share in shares]
        yield f"| {k} | {' | '.join(cells)} |"
    yield ""
    if any(key.startswith("decode/acceptance") for key in summary):
        yield (
            "Drafts accepted: greedy, in the draft-and-verify loop, as a share of the drafts that "
            "reached the position."
        )
    else:
        yield "Acceptance in the draft-and-verify loop was not measured in this run."
