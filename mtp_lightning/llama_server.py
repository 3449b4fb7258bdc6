"""llama.cpp's server inside this process, by the package xllamacpp of the extra ``engines``.

It decodes greedily, ends no text, and keeps no prompt for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def parameters(file: str | Path, *, batch: int, tokens: int, threads: int) -> Any:
    """Parameters for ``xllamacpp.Server``, which decodes ``batch`` texts of a GGUF file together,
    each of at most ``tokens`` tokens with its prompt and drafts."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel = batch
    params.n_ctx = batch * (tokens + 8)
    params.warmup = params.cache_prompt = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    return params


def request(ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """The request to continue a prompt by ``new_tokens`` tokens."""
    return {
        "prompt": list(ids), "n_predict": new_tokens, "temperature": 0.0, "top_k": 1,
        "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip


def decode(
    server: Any, prompts: Sequence[Sequence[int]], new_tokens: int, *, batch: int
) -> list[str]:
    """The texts of prompts, ``batch`` of them at a time."""

    def ask(ids: Sequence[int]) -> str:
        return str(server.handle_completions(request(ids, new_tokens))["choices"][0]["text"])

    with ThreadPoolExecutor(batch) as pool:
        return list(pool.map(ask, prompts))
