"""Decoding of a GGUF file: this project and llama.cpp on the same file and prompts, in turns.

    python -m benchmarks.llama_cpp MODEL.gguf [--heads RUN] [--threads 1 2] [--batches 1 8]

llama.cpp is llama-cpp-python, compiled for this CPU into an environment of its own:

    python -m venv native && CMAKE_ARGS=-DGGML_NATIVE=ON native/bin/pip install llama-cpp-python

and ``--python native/bin/python``. Several texts at once are decoded by the wheel xllamacpp of this
environment (``pip install -e '.[engines]'``), whose code is for AVX2. Each side is a process of its
own, which keeps its model open.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row

# Reads the prompts and writes n tokens for each; returns the texts.
Decode = Callable[[int], Sequence[Any]]


def ours(task: Row) -> Iterator[Row]:
    """This project's decoding, see :func:`_turns`; with ``drafts``, as generate.py drafts."""
    import torch

    from benchmarks.workloads import prepare_process
    from mtp_lightning.decoding import generate
    from mtp_lightning.decoding.precision import split_precision
    from mtp_lightning.experiment.generating import open_for_decoding

    prepare_process()
    torch.set_num_threads(task["threads"])
    weights, activations = split_precision(task["precision"])
    model = open_for_decoding(task["model"], precision=weights, activations=activations).model
    way = {"draft_depth": "auto"} if task["drafts"] else {"speculative": False}

    def decode(n: int) -> list[list[int]]:
        found = generate(model, task["prompts"], max_new_tokens=n, batch_size=task["batch"], **way)
        return [generation.token_ids for generation in found]

    yield from _turns(decode, task, {})


def theirs(task: Row) -> Iterator[Row]:
    """llama.cpp's decoding inside the process, see :func:`_turns`."""
    alone = task["batch"] == 1 and find_spec("llama_cpp") is not None
    decode, program = _native(task) if alone else _wheel(task)
    yield from _turns(decode, task, {"program": program})


def _native(task: Row) -> tuple[Decode, str]:
    """llama-cpp-python, which decodes one text at a time."""
    (prompt,) = task["prompts"]
    longest = len(prompt) + task["new_tokens"]
    model, program = _native_model(task["model"], tokens=longest, threads=task["threads"])

    def decode(n: int) -> list[list[int]]:
        model.reset()  # forgets the prompt, which it would not read again
        return [list(islice(model.generate(prompt, temp=0.0, top_k=1), n))]

    return decode, program


def _native_model(path: str, *, tokens: int, threads: int) -> tuple[Any, str]:
    """llama-cpp-python's model for texts of at most some tokens, and the program's name."""
    import llama_cpp

    size = {"n_ctx": tokens + 8, "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(path, **size, verbose=False)
    return model, f"llama-cpp-python {llama_cpp.__version__}"


def texts(task: Row) -> Iterator[Row]:
    """One text a turn by llama-cpp-python, on one thread: CPU and wall seconds of its prompt and
    its tokens. ``jobs`` are their prompts, numbers of tokens and temperatures, in this order."""
    longest = max(len(prompt) + n for prompt, n, _ in task["jobs"])
    model, program = _native_model(task["model"], tokens=longest, threads=1)

    def decode(prompt: list[int], n: int, temperature: float) -> list[int]:
        model.reset()
        chosen = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} if temperature else {"top_k": 1}
        return list(islice(model.generate(prompt, temp=temperature, **chosen), n))

    yield {"program": program}
    for job in task["jobs"]:
        yield harness.timed(partial(decode, *job))


def _wheel(task: Row) -> tuple[Decode, str]:
    import xllamacpp

    from mtp_lightning import llama_server

    prompts, batch, threads = task["prompts"], task["batch"], task["threads"]
    longest = len(prompts[0]) + task["new_tokens"]
    params = llama_server.parameters(task["model"], batch=batch, tokens=longest, threads=threads)
    server = xllamacpp.Server(params)

    def decode(n: int) -> list[str]:
        return llama_server.decode(server, prompts, n, batch=batch)

    return decode, f"xllamacpp {version('xllamacpp')}"


def _turns(decode: Decode, task: Row, about: Row) -> Iterator[Row]:
    """Seconds of the prompts and of the new tokens, and peak memory (``rss``) in bytes.

    A turn reads the prompts and writes one token, then the same with all tokens; the difference is
    the time of the new tokens.
    """
    decode(2)
    yield about
    while True:
        first = harness.seconds_of(lambda: decode(1))
        whole = harness.seconds_of(lambda: decode(task["new_tokens"]))
        yield {"prompt": first, "new": whole - first, "rss": harness.peak_rss()}


def measure(
    task: Row, *, heads: str, precisions: Sequence[str], turns: int, python: str
) -> list[Row]:
    """A row for every side, with its rates over llama.cpp's.

    The task has ``model``, ``threads``, ``batch``, ``prompts`` and ``new_tokens``; the other
    arguments are those of the command.
    """
    python = python if task["batch"] == 1 else sys.executable  # the wheel's
    sides = {"llama.cpp": partial(harness.Worker, theirs, task, python=python)}
    for precision in precisions:
        own = {**task, "precision": precision, "drafts": False}
        sides[f"plain, {precision}"] = partial(harness.Worker, ours, own)
        if heads:
            own = {**own, "model": heads, "drafts": True}
            sides[f"drafts, {precision}"] = partial(harness.Worker, ours, own)
    say = f"{task['threads']} threads, batch {task['batch']}"
    found = harness.race(sides, turns, say=say)
    prompts = task["prompts"]
    read, written = sum(map(len, prompts)), (task["new_tokens"] - 1) * len(prompts)
    times = {n: {k: [a[k] for a in own] for k in ("prompt", "new")} for n, own in found.items()}
    return [
        {
            "side": found[name][0].get("program", name),
            "threads": task["threads"],
            "batch": task["batch"],
            "prompt_tokens_per_second": read / median(own["prompt"]),
            "tokens_per_second": written / median(own["new"]),
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
    """Tokens per second of a GGUF file, with llama.cpp's as the unit.

    Args:
        model: a GGUF file.
        heads: a run of heads for this model, which drafts.
        batches: texts at once.
        precisions: of this project's weights; fp32 leaves the file's numbers as they are, and
            fp32/int8 multiplies them as integers (``activations=int8``), as llama.cpp does.
        prompt_tokens: tokens of a prompt, from the source of Python's argparse.
        python: the interpreter of the environment that has llama.cpp.
    """
    from mtp_lightning.decoding.precision import split_precision
    from mtp_lightning.errors import UserError
    from mtp_lightning.experiment.generating import open_for_decoding
    from mtp_lightning.system import processor

    for precision in precisions:  # refused before anything is measured
        weights, activations = split_precision(precision)
        opened = open_for_decoding(model, precision=weights, activations=activations)
    wheel_needed = max(batches) > 1 or (python == sys.executable and not find_spec("llama_cpp"))
    if wheel_needed and not find_spec("xllamacpp"):
        raise UserError("xllamacpp is not installed: pip install -e '.[engines]'.")
    if python != sys.executable and 1 in batches:
        imports = [python, "-c", "import llama_cpp"]
        if not which(python) or subprocess.run(imports, capture_output=True).returncode:
            raise UserError(
                f"{python} is not a Python that has llama-cpp-python: install it there."
            )
    ids = opened.tokenizer.encode(inspect.getsource(argparse)).tolist()
    rows: list[Row] = []
    for batch, n in itertools.product(batches, threads):
        prompts = [ids[i * 997 :][:prompt_tokens] for i in range(batch)]
        task = {"model": model, "threads": n, "batch": batch}
        task |= {"prompts": prompts, "new_tokens": new_tokens}
        options: Row = {"heads": heads, "precisions": precisions, "turns": turns, "python": python}
        rows += measure(task, **options)
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
