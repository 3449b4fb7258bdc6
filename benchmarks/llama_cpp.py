"""Decoding of a GGUF file: this project and llama.cpp on the same file and prompts, in turns.

    python -m benchmarks.llama_cpp MODEL.gguf [--heads RUN] [--threads 1 2] [--batches 1 8]

llama.cpp is llama-cpp-python, compiled for this CPU into an environment of its own:

    python -m venv native && CMAKE_ARGS=-DGGML_NATIVE=ON native/bin/pip install llama-cpp-python

and --python native/bin/python; or, where several texts are decoded at once, the wheel xllamacpp
(pip install -e '.[engines]'), whose code is for AVX2.

Each side is a process of its own and keeps its model open. A turn reads the prompts and writes one
token, then the same with all tokens; the difference is the time of the new tokens. Ratios of one
run count.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

# Reads prompts and writes n tokens for each; returns the texts.
Decode = Callable[[int], Sequence[Any]]


def ours(task: Row) -> Iterator[Row]:
    """This project's decoding, see :func:`_turns`; with ``drafts``, as generate.py drafts."""
    import torch

    from benchmarks.workloads import prepare_process
    from mtp_lightning.decoding import generate
    from mtp_lightning.decoding.fused import fused_passes
    from mtp_lightning.decoding.precision import use_precision
    from mtp_lightning.opening import open_model

    prepare_process()
    torch.set_num_threads(task["threads"])
    model = open_model(task["model"]).model
    use_precision(model, task["precision"])

    def decode(n: int) -> list[list[int]]:
        way = {"draft_depth": "auto"} if task["drafts"] else {"speculative": False}
        found = generate(model, task["prompts"], max_new_tokens=n, batch_size=task["batch"], **way)
        return [generation.token_ids for generation in found]

    with fused_passes(model):
        yield from _turns(decode, task, {})


def theirs(task: Row) -> Iterator[Row]:
    """llama.cpp inside the process, see :func:`_turns`."""
    native = find_spec("llama_cpp") is not None
    decode, about = _native(task) if native else _wheel(task)
    yield from _turns(decode, task, {"program": about})


def _native(task: Row) -> tuple[Decode, str]:
    """llama-cpp-python, which decodes one text at a time."""
    import llama_cpp

    (prompt,) = task["prompts"]
    model = llama_cpp.Llama(
        task["model"],
        n_ctx=len(prompt) + task["new_tokens"] + 8,
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        verbose=False,
    )

    def decode(n: int) -> list[list[int]]:
        model.reset()  # or it would keep the prompt that it has read
        return [list(islice(model.generate(prompt, temp=0.0, top_k=1), n))]

    return decode, f"llama-cpp-python {llama_cpp.__version__}"


def _wheel(task: Row) -> tuple[Decode, str]:
    """xllamacpp's server."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_parallel = task["batch"]
    params.n_ctx = task["batch"] * (len(task["prompts"][0]) + task["new_tokens"] + 8)
    params.warmup = params.cache_prompt = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def decode(n: int) -> list[str]:
        def ask(ids: Sequence[int]) -> str:
            asked = {"prompt": list(ids), "n_predict": n, "temperature": 0.0, "top_k": 1}
            asked |= {"ignore_eos": True, "cache_prompt": False}
            return str(server.handle_completions(asked)["choices"][0]["text"])

        with ThreadPoolExecutor(task["batch"]) as pool:
            return list(pool.map(ask, task["prompts"]))

    return decode, f"xllamacpp {version('xllamacpp')}"


def _turns(decode: Decode, task: Row, about: Row) -> Iterator[Row]:
    """Seconds of the prompts and of the new tokens; ``rss`` is the peak memory in bytes."""
    decode(2)
    yield about
    while True:
        first = harness.seconds_of(lambda: decode(1))
        whole = harness.seconds_of(lambda: decode(task["new_tokens"]))
        yield {"prompt": first, "new": whole - first, "rss": harness.peak_rss()}


def measure(
    model: str,
    *,
    heads: str | None,
    threads: int,
    batch: int,
    precisions: Sequence[str],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    turns: int,
    python: str,
) -> list[Row]:
    """A row for every side, with its rates over llama.cpp's."""
    base = {
        "model": model,
        "threads": threads,
        "batch": batch,
        "drafts": False,
        "precision": "fp32",
    }
    base |= {"prompts": prompts, "new_tokens": new_tokens}
    sides: dict[str, tuple[harness.Measurement, Row]] = {"llama.cpp": (theirs, base)}
    for precision in precisions:
        sides[f"plain, {precision}"] = ours, base | {"precision": precision}
        if heads is not None:
            own = base | {"model": heads, "precision": precision, "drafts": True}
            sides[f"drafts, {precision}"] = ours, own
    workers = {
        name: harness.Worker(side, task, python=python if side is theirs else sys.executable)
        for name, (side, task) in sides.items()
    }
    try:
        turn = {name: worker.turn for name, worker in workers.items()}
        found = harness.take_turns(turn, turns, say=f"{threads} threads, batch {batch}")
    finally:
        for worker in workers.values():
            worker.end()
    read, written = sum(map(len, prompts)), (new_tokens - 1) * len(prompts)
    times = {n: {k: [a[k] for a in own] for k in ("prompt", "new")} for n, own in found.items()}
    return [
        {
            "side": workers[name].first.get("program", name),
            "threads": threads,
            "batch": batch,
            "prompt_tokens_per_second": read / sorted(own["prompt"])[len(own["prompt"]) // 2],
            "tokens_per_second": written / sorted(own["new"])[len(own["new"]) // 2],
            "prompt_over": harness.ratio(times["llama.cpp"]["prompt"], own["prompt"]),
            "over": harness.ratio(times["llama.cpp"]["new"], own["new"]),
            "megabytes": max(answer["rss"] for answer in found[name]) / 1e6,
        }
        for name, own in times.items()
    ]


@cli.command(quick={"turns": 1, "new_tokens": 16}, cpu_time=True)
def llama_cpp(
    model: str,
    /,
    heads: str = "",
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32",),
    prompt_tokens: int = 64,
    new_tokens: int = 96,
    turns: int = 5,
    python: str = sys.executable,
) -> Row:
    """Tokens per second of every side, with llama.cpp's as the unit.

    Args:
        model: a GGUF file.
        heads: a run of heads for this model, which drafts.
        threads: of every side.
        batches: texts at once.
        precisions: of this project's weights; fp32 leaves the file's numbers as they are.
        prompt_tokens: of a prompt, from the source of Python's argparse.
        new_tokens: of a text.
        python: the interpreter of the environment that has llama.cpp.
    """
    from mtp_lightning.opening import open_model
    from mtp_lightning.system import processor

    ids = open_model(model).tokenizer.encode(inspect.getsource(argparse)).tolist()
    rows: list[Row] = []
    for batch in batches:
        prompts = [ids[i * 997 :][:prompt_tokens] for i in range(batch)]
        for n in threads:
            rows += measure(
                model, heads=heads or None, threads=n, batch=batch, precisions=precisions,
                prompts=prompts, new_tokens=new_tokens, turns=turns, python=python,
            )  # fmt: skip
    clock = "CPU" if harness.counts_cpu_time() else "wall"
    cli.print_table(
        f"{Path(model).name}, {clock} seconds",
        "side: side; threads: threads; texts: batch; tokens/s: tokens_per_second .1f; "
        "x llama.cpp: over .2f; prompt tokens/s: prompt_tokens_per_second .0f; "
        "x llama.cpp's: prompt_over .2f; MB: megabytes .0f",
        rows,
    )
    return {"rows": rows, "processor": processor()}


main = cli.program(llama_cpp)

if __name__ == "__main__":
    main()
