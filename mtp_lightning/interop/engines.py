"""Which programs read the MTP modules of an export, and which silently ignore them.

Said by ``export.py`` and by the model card. The sources are the loaders as of 2026-10: llama.cpp's
``conversion/``, vLLM's and SGLang's ``deepseek_v2.py``. Only transformers and llama.cpp are tried
when a model is exported.
"""

from __future__ import annotations

from collections.abc import Iterator

from mtp_lightning.interop import eagle3
from mtp_lightning.interop.gguf_layout import Layout
from mtp_lightning.mtp.sequential import SequentialConfig

# Model types whose MTP layers servers use for drafting.
SERVED = {"deepseek_v3": "DeepSeek-V3", "glm4_moe": "GLM-4.5"}
_INSTEAD = "`mtp-lightning export output=NAME.gguf` writes a file with which llama.cpp drafts"


def of_folder(model_type: str, depth: int, *, extra: str) -> Iterator[str]:
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
    name = SERVED.get(model_type)
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


def of_file(layout: Layout) -> Iterator[str]:
    """What llama.cpp does with a GGUF file, in sentences."""
    if layout.dropped:
        yield layout.dropped
    mtp = layout.config.mtp
    if not isinstance(mtp, SequentialConfig):
        return
    yield (
        "llama.cpp drafts with the module only where it is asked to (`llama-server --spec-type "
        "draft-mtp --spec-draft-n-max 1`), and decodes without drafts otherwise."
    )
    if layout.dense or layout.lacks_shared:
        yield (
            f"llama.cpp has no architecture of this trunk with MTP modules, so the file is of "
            f"`{layout.arch}`, which computes the same: an expert of zeros stands where it needs "
            "one and the model has none."
        )
