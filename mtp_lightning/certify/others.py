"""Asks other programs the same question: does a faster way of decoding change their own text?

Every program decodes the prompts one at a time without drafts, and again in a batch and with
drafts that it looks up in the text itself (prompt lookup, n-grams), since no program but this one
reads every kind of head. A text counts as equal if all its tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import llama_server
from mtp_lightning.certify.cells import BATCH
from mtp_lightning.certify.texts import Prompts
from mtp_lightning.errors import UserError, require_package
from mtp_lightning.parts import is_gguf

_DRAFTS = 4


@dataclass(frozen=True)
class Decoder:
    """Another program with a model."""

    program: str  # with its version
    weights: str  # the program's words for the weights' precision
    # Prompts and a length -> a text per prompt, as tokens or as a string. It also takes ``batch``,
    # the number of texts decoded together (1), and the settings ``drafts``.
    decode: Callable[..., Sequence[Any]]
    drafts_by: str  # how it looks drafts up, in words
    drafts: dict[str, Any]  # the settings that make it do so


@dataclass(frozen=True)
class Count:
    """The number of texts that a :class:`Decoder` decoded in another way than its plain one, and of
    those that equal the plain ones."""

    program: str
    weights: str
    way: str
    texts: int
    texts_equal: int


def compare_others(
    names: Sequence[str],
    path: Path,
    prompts: Prompts,
    length: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Count]:
    """Count the texts of other programs that differ from their own plain decoding. A program that
    fails is left out, since this project's part of the certificate may have taken hours.

    Args:
        names: keys of PROGRAMS, for which :func:`require_programs` has passed.
        path: a Hugging Face folder or a GGUF file.
        prompts, length: the prompts' tokens, and the number of new tokens per prompt.
        say: called with a line after every program and precision.
    """
    counts: list[Count] = []
    for name in names:
        try:
            for other in PROGRAMS[name].decoders(path):
                wanted = other.decode(prompts, length)
                ways = {f"drafts by {other.drafts_by}": other.drafts}
                ways[f"batch of {BATCH}"] = {"batch": BATCH}
                for way, settings in ways.items():
                    texts = other.decode(prompts, length, **settings)
                    equal = sum(a == b for a, b in zip(wanted, texts, strict=True))
                    counts.append(Count(other.program, other.weights, way, len(texts), equal))
                say(f"{other.program}, {other.weights}: {len(prompts):,} prompts")
        except Exception as error:  # another program may raise anything
            reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
            say(f"{name} cannot decode {path} and is left out from here on: {reason}.")
    return counts


def require_programs(names: Sequence[str], path: Path) -> None:
    """Check, before any model is opened, that programs are installed and read a path.

    Raises:
        UserError: a program is unknown or not installed, or does not read this path.
    """
    for name in names:
        if (program := PROGRAMS.get(name)) is None:
            raise UserError(f"--against {name} is unknown: give {' or '.join(PROGRAMS)}.")
        require_package(program.package, what=f"--against {name}", extra=program.extra)
        if not program.reads(path):
            raise UserError(f"{name} does not read {path}: give {program.wanted}.")


def _transformers(path: Path) -> Iterator[Decoder]:
    """transformers' own generate(), in fp32 and bf16."""
    for weights, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield _decoder(_opened(path, dtype), weights)


def _decoder(model: Any, weights: str) -> Decoder:
    """The decoding of transformers' model."""
    import transformers

    # generate() would read missing settings from here, such as an end of text.
    model.generation_config = transformers.GenerationConfig()

    def generate(rows: Prompts, length: int, **kwargs: Any) -> Any:
        """Continue rows, filled up on the left to the longest."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        greedy = transformers.GenerationConfig(
            max_new_tokens=length, do_sample=False, pad_token_id=0, **kwargs
        )
        out = model.generate(ids, attention_mask=mask, generation_config=greedy)
        return out[:, longest:].tolist()

    def decode(prompts: Prompts, length: int, *, batch: int = 1, **kwargs: Any) -> list[list[int]]:
        parts = (prompts[i : i + batch] for i in range(0, len(prompts), batch))
        return [row for part in parts for row in generate(part, length, **kwargs)]

    program = f"transformers {transformers.__version__}"
    drafts = {"prompt_lookup_num_tokens": _DRAFTS}
    return Decoder(program, weights, decode, "prompt lookup", drafts)


def _opened(path: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a folder or a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    local = {"local_files_only": True, "trust_remote_code": False}  # None would ask for code
    if not is_gguf(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **local).eval()
    # from_pretrained needs one more package for a GGUF file.
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **local)
    model = AutoModelForCausalLM.from_config(config)
    checkpoint = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    model.load_state_dict(checkpoint["tensors"], strict=False)  # a tied head is not in the file
    return model.to(dtype).eval()


def _llama_cpp(path: Path) -> Iterator[Decoder]:
    """llama.cpp's server, in the precision of the file."""
    import xllamacpp

    def decode(prompts: Prompts, length: int, *, batch: int = 1, drafts: Any = None) -> list[str]:
        longest, threads = max(map(len, prompts)) + length, torch.get_num_threads()
        params = llama_server.parameters(path, batch=batch, tokens=longest, threads=threads)
        if drafts is not None:
            params.speculative.types = [drafts]
            params.speculative.ngram_simple.size_n = 2
            params.speculative.ngram_simple.size_m = _DRAFTS
        return llama_server.decode(xllamacpp.Server(params), prompts, length, batch=batch)

    program = f"llama.cpp (xllamacpp {version('xllamacpp')})"
    kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE
    yield Decoder(program, "the file's", decode, "n-grams", {"drafts": kind})


@dataclass(frozen=True)
class OtherProgram:
    """Another program."""

    package: str  # the Python package that brings it
    extra: str  # this project's extra that has the package
    reads: Callable[[Path], bool]  # whether it reads a path
    wanted: str  # the paths that it reads, in words
    decoders: Callable[[Path], Iterator[Decoder]]  # a path -> its decoding in each precision


PROGRAMS = {
    "transformers": OtherProgram(
        "transformers",
        "hf",
        lambda path: is_gguf(path) or (path / "config.json").is_file(),
        "a GGUF file or a Hugging Face folder, which python export.py makes",
        _transformers,
    ),
    "llama.cpp": OtherProgram("xllamacpp", "engines", is_gguf, "a GGUF file", _llama_cpp),
}
