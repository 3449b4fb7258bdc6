"""How fast the data goes: tokens a second out of the loader, megabytes a second into a store.

Run ``python -m benchmarks.data``. It prints a table and writes JSON (``--output``). Loader: whole
epochs in one process on the standard-library corpus, T = 256, D = 2, the median of ``--repeats``.
Store: the whole build with byte and with bpe, files written and synced, tokenizer training timed
apart. Page caches are warm.

``python -m benchmarks.data --megabytes 100`` builds the stores of so much invented text instead,
once by this process alone and once by ``--workers`` processes, in turns, and says what share of
the cores they were given: on a machine that others use, time says little without it. ``encode`` is
the CPU time of one thread that encodes the standard library again and again, words known.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from data_modules.loader import WindowLoader
from data_modules.sources import StdlibSource, SyntheticSource, TextSource
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store, prepare_tokenizer
from data_modules.token_store import TokenStore
from data_modules.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from data_modules.window_dataset import WindowDataset

SEQ_LEN, DEPTH = 256, 2


def time_store(
    tokenizer: Tokenizer, folder: Path, repeats: int
) -> tuple[dict[str, Any], TokenStore]:
    """Builds the store ``repeats`` times from nothing, each in a cache folder of its own."""
    split = DocumentSplit(StdlibSource())
    training, building, used = [], [], []
    for i in range(repeats):
        cache = folder / f"{tokenizer.kind}-{i}"
        begun = time.perf_counter()
        prepare_tokenizer(tokenizer, split, cache)
        training.append(time.perf_counter() - begun)
        cpu, begun = time.process_time(), time.perf_counter()
        store, _ = prepare_store(tokenizer, split, cache)
        building.append(time.perf_counter() - begun)
        used.append(time.process_time() - cpu)
    megabytes = sum(store[name].n_bytes for name in store.splits) / 1e6
    seconds = statistics.median(building)
    row = {
        "what": "store",
        "tokenizer": tokenizer.kind,
        "megabytes": round(megabytes, 3),
        "tokens": sum(store[name].n_tokens for name in store.splits),
        "seconds": seconds,
        "megabytes_per_second": megabytes / seconds,
        "megabytes_per_cpu_second": megabytes / statistics.median(used),
        "tokenizer_training_seconds": statistics.median(training),
    }
    return row, store


def time_loader(
    store: TokenStore, *, batch_size: int, document_mask: bool, workers: int, repeats: int
) -> dict[str, Any]:
    """Median rate of whole epochs; the first, which maps the file, is not counted."""
    dataset = WindowDataset(
        store["train"], seq_len=SEQ_LEN, depth=DEPTH, document_mask=document_mask
    )
    loader = WindowLoader(dataset, batch_size=batch_size, num_workers=workers)
    rates = []
    for _ in range(repeats + 1):
        begun, tokens = time.perf_counter(), 0
        for batch in loader:
            tokens += batch.batch_size * batch.seq_len
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


def time_workers(folder: Path, megabytes: int, workers: int, repeats: int) -> list[dict[str, Any]]:
    """Builds by one process and by several, in turns, in cache folders of their own."""
    text = folder / "text"
    text.mkdir()
    source = SyntheticSource(size=megabytes * 1_000_000, documents=megabytes * 50, words=20_000)
    for i, document in enumerate(source.documents()):
        (text / f"{i:06}.txt").write_text(document)
    split = DocumentSplit(TextSource(text))
    ready = prepare_tokenizer(BPETokenizer(), split, folder / "tokenizer")
    rows = []
    for i in range(repeats):
        for n in (0, workers):
            used, begun = _cpu_seconds(), time.perf_counter()
            store, _ = prepare_store(ready, split, folder / f"{i}-{n}", workers=n)
            seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - used
            size = sum(store[name].n_bytes or 0 for name in store.splits) / 1e6
            rows.append(
                {
                    "what": "workers",
                    "workers": n,
                    "megabytes": size,
                    "seconds": seconds,
                    "cpu_seconds": cpu,
                    "cores": cpu / seconds,
                }
            )
            shutil.rmtree(folder / f"{i}-{n}")
    return rows


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def time_encode(repeats: int) -> dict[str, Any]:
    """CPU time of one thread for text whose words are all known: the rate of a long corpus."""
    documents = list(StdlibSource().documents())
    tokenizer = BPETokenizer().train(documents)
    rates = []
    for _ in range(repeats + 1):
        begun = time.thread_time()
        for document in documents:
            tokenizer.encode(document)
        rates.append(sum(len(d.encode()) for d in documents) / 1e6 / (time.thread_time() - begun))
    return {"what": "encode", "tokenizer": "bpe", "megabytes_per_second": max(rates[1:])}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = argparse.ArgumentParser(description="Measures the loader and the token store.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, help="measure several processes on so much text")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory(prefix="mtp-bench-") as folder:
        if options.megabytes is None:
            rows = _measure(Path(folder), options.repeats)
        else:
            rows = time_workers(Path(folder), options.megabytes, options.workers, options.repeats)
    result = {
        "benchmark": "data",
        "seq_len": SEQ_LEN,
        "depth": DEPTH,
        "repeats": options.repeats,
        "rows": rows,
        "machine": common.machine(),
    }
    _print(rows)
    common.write_json(result, options.output)
    return result


def _measure(folder: Path, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [time_encode(repeats)]
    for tokenizer in (ByteTokenizer(), BPETokenizer()):
        row, store = time_store(tokenizer, folder, repeats)
        rows.append(row)
        for mask in (False, True):
            for size in (8, 64):
                rows.append(
                    time_loader(
                        store, batch_size=size, document_mask=mask, workers=0, repeats=repeats
                    )
                )
        # Workers have to be started in every epoch and send their batches: they only cost here.
        rows.append(
            time_loader(store, batch_size=64, document_mask=False, workers=2, repeats=repeats)
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    kinds = {row["what"] for row in rows}
    if "store" in kinds:
        print(
            f"\n{'store of':<10}{'MB':>8}{'tokens':>12}{'seconds':>9}{'MB/s':>8}{'a CPU s':>9}"
            f"{'training s':>12}"
        )
    for row in rows:
        if row["what"] == "store":
            print(
                f"{row['tokenizer']:<10}{row['megabytes']:>8.1f}{row['tokens']:>12,}"
                f"{row['seconds']:>9.2f}{row['megabytes_per_second']:>8.1f}"
                f"{row['megabytes_per_cpu_second']:>9.1f}{row['tokenizer_training_seconds']:>12.2f}"
            )
    if "loader" in kinds:
        print(f"\n{'loader of':<10}{'batch':>6}{'mask':>6}{'workers':>9}{'Mtokens/s':>11}")
    for row in rows:
        if row["what"] == "loader":
            print(
                f"{row['tokenizer']:<10}{row['batch_size']:>6}"
                f"{'yes' if row['document_mask'] else 'no':>6}{row['workers']:>9}"
                f"{row['tokens_per_second'] / 1e6:>11.1f}"
            )


if __name__ == "__main__":
    main()
