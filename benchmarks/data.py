"""Measures the tokens per second of the loader, and the megabytes per second of a token store.

    python -m benchmarks.data                    # loader, store, encoder
    python -m benchmarks.data --megabytes 100    # stores by one process and by several

``loader`` iterates whole epochs in one process on the standard library, T = 256, D = 2. ``store``
builds the whole token store with byte and with bpe, files written and synced; the training of the
tokenizer is timed apart. Page caches are warm. ``encode`` is the CPU time of one thread on the
standard library, its words known. With ``--megabytes`` stores are built from generated text, by one
process and by ``--workers`` processes in turns; ``cores`` are those that they used.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import cli, harness
from benchmarks.harness import Row
from data_modules.loader import WindowLoader
from data_modules.sources import StdlibSource, SyntheticSource, TextSource
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store, prepare_tokenizer
from data_modules.token_store import TokenStore
from data_modules.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from data_modules.window_dataset import WindowDataset

SEQ_LEN, DEPTH = 256, 2


def time_store(tokenizer: Tokenizer, folder: Path, repeats: int) -> tuple[Row, TokenStore]:
    """Build the store ``repeats`` times, each in an empty cache folder."""
    split = DocumentSplit(StdlibSource())
    trained, built = [], []
    for i in range(repeats):
        given = tokenizer, split, folder / f"{tokenizer.kind}-{i}"
        trained.append(harness.timed(partial(prepare_tokenizer, *given)))
        built.append(harness.timed(partial(prepare_store, *given)))
    store, _ = built[0]["result"]
    megabytes = sum(store[name].n_bytes for name in store.splits) / 1e6
    seconds = statistics.median(one["wall"] for one in built)
    row = {
        "what": "store",
        "tokenizer": tokenizer.kind,
        "megabytes": round(megabytes, 3),
        "tokens": sum(store[name].n_tokens for name in store.splits),
        "seconds": seconds,
        "megabytes_per_second": megabytes / seconds,
        "megabytes_per_cpu_second": megabytes / statistics.median(one["cpu"] for one in built),
        "tokenizer_training_seconds": statistics.median(one["wall"] for one in trained),
    }
    return row, store


def time_loader(
    store: TokenStore, *, batch_size: int, document_mask: bool, workers: int, repeats: int
) -> Row:
    """The median rate of whole epochs, without the first, which maps the file."""
    dataset = WindowDataset(
        store["train"], seq_len=SEQ_LEN, depth=DEPTH, document_mask=document_mask
    )
    loader = WindowLoader(dataset, batch_size=batch_size, num_workers=workers)
    rates = []
    for _ in range(repeats + 1):
        begun, tokens = time.perf_counter(), 0
        for batch in loader:
            tokens += len(batch) * batch.seq_len
        rates.append(tokens / (time.perf_counter() - begun))
    return {
        "what": "loader",
        "tokenizer": store.meta["tokenizer"]["kind"],
        "batch_size": batch_size,
        "document_mask": document_mask,
        "workers": workers,
        "tokens_per_second": statistics.median(rates[1:]),
        "slowest": min(rates[1:]),
        "fastest": max(rates[1:]),
    }


def time_workers(folder: Path, megabytes: int, workers: int, repeats: int) -> list[Row]:
    """Build stores by one process and by several, in turns, each in an empty cache folder."""
    text = folder / "text"
    text.mkdir()
    source = SyntheticSource(size=megabytes * 1_000_000, documents=megabytes * 50, words=20_000)
    for i, document in enumerate(source.documents()):
        (text / f"{i:06}.txt").write_text(document)
    split = DocumentSplit(TextSource(text))
    ready = prepare_tokenizer(BPETokenizer(), split, folder / "tokenizer")

    def build(n: int) -> Row:
        used, begun = _cpu_seconds(), time.perf_counter()
        store, _ = prepare_store(ready, split, folder / "store", workers=n)
        seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - used
        size = sum(store[name].n_bytes or 0 for name in store.splits) / 1e6
        shutil.rmtree(folder / "store")
        times = {"seconds": seconds, "cpu_seconds": cpu, "cores": cpu / seconds}
        return {"what": "workers", "workers": n, "megabytes": size, **times}

    builds = harness.take_turns({n: partial(build, n) for n in (0, workers)}, repeats)
    return [row for turn in zip(*builds.values(), strict=True) for row in turn]


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the children that it waited for."""
    return sum(os.times()[:4])


def time_encode(repeats: int) -> Row:
    """The rate of one thread's CPU time on text whose words are all known, as in a long corpus."""
    documents = list(StdlibSource().documents())
    tokenizer = BPETokenizer().train(documents)
    rates = []
    for _ in range(repeats + 1):
        begun = time.thread_time()
        for document in documents:
            tokenizer.encode(document)
        rates.append(sum(len(d.encode()) for d in documents) / 1e6 / (time.thread_time() - begun))
    return {"what": "encode", "tokenizer": "bpe", "megabytes_per_second": max(rates[1:])}


def measure(folder: Path, repeats: int) -> list[Row]:
    """The encoder, and store and loader of both tokenizers."""
    rows: list[Row] = [time_encode(repeats)]
    for tokenizer in (ByteTokenizer(), BPETokenizer()):
        row, store = time_store(tokenizer, folder, repeats)
        rows.append(row)
        # Batch, document mask, workers, which start again in every epoch and send their batches.
        for size, mask, workers in (
            *((size, mask, 0) for mask in (False, True) for size in (8, 64)),
            (64, False, 2),
        ):
            how: Row = {"batch_size": size, "document_mask": mask, "workers": workers}
            rows.append(time_loader(store, **how, repeats=repeats))
    return rows


COLUMNS = {
    "encode": "tokenizer: tokenizer; MB a CPU s: megabytes_per_second .1f",
    "store": "tokenizer: tokenizer; MB: megabytes .1f; tokens: tokens ,; seconds: seconds .2f; "
    "MB/s: megabytes_per_second .1f; MB a CPU s: megabytes_per_cpu_second .1f; "
    "tokenizer training, s: tokenizer_training_seconds .2f",
    "loader": "tokenizer: tokenizer; batch: batch_size; document mask: document_mask; "
    "workers: workers; tokens/s: tokens_per_second ,.0f; slowest: slowest ,.0f; "
    "fastest: fastest ,.0f",
    "workers": "workers: workers; MB: megabytes .1f; seconds: seconds .2f; "
    "CPU seconds: cpu_seconds .2f; cores: cores .2f",
}


@cli.command(quick={"repeats": 1})
def data(repeats: int = 5, megabytes: int = 0, workers: int = 2) -> Row:
    """The loader and the token store.

    Args:
        megabytes: build only stores of so much generated text.
        workers: processes that build such a store.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as name:
        if megabytes:
            rows = time_workers(Path(name), megabytes, workers, repeats)
        else:
            rows = measure(Path(name), repeats)
    for what, columns in COLUMNS.items():
        if own := [row for row in rows if row["what"] == what]:
            cli.print_table(what, columns, own)
    return {"seq_len": SEQ_LEN, "depth": DEPTH, "rows": rows}


main = cli.program(data)


if __name__ == "__main__":
    main()
