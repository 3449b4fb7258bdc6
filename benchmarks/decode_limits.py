"""What decoding is held against: the rate of memory, and transformers with the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from data_modules.tokenizers.byte import ByteTokenizer
from mtp_lightning.cpu.packed import PackedWeight, packed_copy
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.session import Session, decoding_passes
from mtp_lightning.interop.config_json import model_type
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.config import TrunkConfig

Ways = Mapping[str, Mapping[str, Any]]


def smollm2_shape() -> MTPModel:
    """Random weights in SmolLM2-135M's shape: half a gigabyte, which no cache holds."""
    trunk = TrunkConfig(
        vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536
    )
    model = MTPModel(ModelConfig(trunk=trunk, mtp=NoMTPConfig()))
    model.initialise(0)
    return model.eval()


def _packed(model: MTPModel) -> list[Tensor]:
    """The matrices that the trunk's passes over few tokens read, the head's included."""
    parameters = nn.ModuleList([model.trunk, model.head]).parameters()  # shared ones once
    copies = [packed_copy(weight) for weight in parameters]
    return [copy.numbers for copy in copies if isinstance(copy, PackedWeight)]


def _as_fp32(numbers: Tensor) -> Tensor:
    """The same bytes, but for a few at the end."""
    whole = numbers.view(torch.uint8)
    return whole[: whole.numel() // 4 * 4].view(torch.float32)


def memory_rate(model: MTPModel, prompt: list[int], *, repeats: int) -> dict[str, float]:
    """How fast the trunk's passes at batch 1 read its weights, next to a plain read of the same
    memory, its sum, in turns. Empty without the layers' C++."""
    with decoding_passes(model):
        weights = [_as_fp32(x) for x in _packed(model)]
        if not weights:
            return {}
        session = Session(model, slots=1, capacity=len(prompt) + 8, max_draft=0)
        session.join([prompt])

        def read() -> None:
            for weight in weights:
                weight.sum()

        widths = {f"pass_of_{width}": width - 1 for width in (1, 3)}
        passes = {name: partial(session.verify, n_drafts) for name, n_drafts in widths.items()}
        seconds = harness.median_times({"read": read, **passes}, repeats=repeats)
    n_bytes = sum(weight.nbytes for weight in weights)
    rates = {f"{name}_gb_per_s": n_bytes / s / 1e9 for name, s in seconds.items()}
    share = {f"share_of_{name}": seconds["read"] / seconds[name] for name in widths}
    return {"megabytes": n_bytes / 1e6, **rates, **share}


@contextmanager
def in_transformers(
    model: MTPModel, tokenizer: Any, *, positions: int, depth: int
) -> Iterator[Any]:
    """transformers' model with the same weights in fp32; its folder exists meanwhile."""
    from mtp_lightning.interop.transformers_model import Loaded
    from mtp_lightning.interop.writing import write_folder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(
            folder, model, tokenizer, dtype="float32", max_positions=positions, shard_bytes=2**30
        )
        kind, n_layers = model_type(model.config), model.config.trunk.n_layers
        yield Loaded(folder, model_type=kind, n_layers=n_layers, depth=depth)


def against_transformers(
    model: MTPModel, prompt: list[int], ways: Ways, *, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """transformers' decoding of an exported model in fp32, next to this project's, in turns.

    ``use_mtp=True`` of transformers, too, where it has it: a DeepSeek-V3 trunk with sequential
    modules.

    Args:
        model: that can be exported.
        prompt: token ids.
        ways: name -> options of ``generate``; those with drafts are compared with its drafts.
        new_tokens: greedy ones.
        repeats: medians over them.
    """
    kind = model_type(model.config)
    drafts = kind == "deepseek_v3" and model.config.mtp.variant == "sequential"
    ids, passes = torch.tensor(prompt), 0
    texts: dict[str, list[int]] = {}
    positions, depth = len(prompt) + new_tokens + model.depth, model.depth if drafts else 0
    with in_transformers(model, ByteTokenizer(), positions=positions, depth=depth) as theirs:

        def decode_theirs(name: str) -> float:
            nonlocal passes
            use_mtp = name.endswith("use_mtp")
            # With use_mtp, generate() reads the modules from the folder in every call.
            began = harness.clock()
            texts[name], n_passes = theirs.greedy(ids, new_tokens, use_mtp=use_mtp)
            passes = n_passes if use_mtp else passes
            return harness.clock() - began

        def decode_ours(name: str) -> float:
            began = harness.clock()
            (own,) = generate(model, [prompt], max_new_tokens=new_tokens, **ways[name])
            texts[name] = own.token_ids
            return harness.clock() - began

        kinds = ("plain", "use_mtp") if drafts else ("plain",)
        sides = {f"transformers_{kind}": decode_theirs for kind in kinds}
        sides |= dict.fromkeys(ways, decode_ours)
        turns = {name: partial(decode, name) for name, decode in sides.items()}
        # The first turn warms up.
        seconds = {n: own[1:] for n, own in harness.take_turns(turns, repeats + 1).items()}

    def over(slow: str, names: Iterable[str]) -> dict[str, float]:
        return {name: harness.ratio(seconds[slow], seconds[name]) for name in names}

    result: dict[str, Any] = {
        "tokens_per_second": {name: new_tokens / median(s) for name, s in seconds.items()},
        "over_transformers_plain": over("transformers_plain", ways),
    }
    if drafts:
        drafting = [name for name in ways if not name.endswith("plain")]
        use_mtp = "transformers_use_mtp"
        result["over_transformers_use_mtp"] = over(use_mtp, drafting)
        result["transformers_use_mtp_over_plain"] = over("transformers_plain", [use_mtp])[use_mtp]
        result["transformers_tokens_per_step"] = new_tokens / passes
    # Rounding may part two implementations at a near-tie.
    return result | {"greedy_equal": all(text == texts["plain"] for text in texts.values())}


def of_wide_model(prompt: list[int], *, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Plain decoding of SmolLM2's shape in fp32 and, rounded, in bf16 and int8."""
    from mtp_lightning.decoding.precision import use_precision

    model, results = smollm2_shape(), {}
    for precision in ("fp32", "bf16", "int8"):
        use_precision(model, precision)
        found = against_transformers(
            model, prompt, {"plain": {}}, new_tokens=new_tokens, repeats=repeats
        )
        results[precision] = memory_rate(model, prompt, repeats=4 * repeats) | found
    return results
