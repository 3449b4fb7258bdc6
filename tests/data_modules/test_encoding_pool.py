"""Documents encoded by several processes: the same store as by one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules import encoding, encoding_pool
from data_modules.encoding import Piece, batches, encode_batch
from data_modules.encoding_pool import EncodingPool, pick_workers
from data_modules.overlap import LineOverlap
from data_modules.sources import SyntheticSource, TextSource
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store
from data_modules.tokenizers import BPETokenizer, ByteTokenizer
from data_modules.tokenizers.ids import IdTokenizer
from mtp_lightning.errors import UserError
from tests.data_modules.stores import contents


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> DocumentSplit:
    """Documents of one and several pieces, with repeated lines, and characters of 1 to 4 bytes."""
    folder = tmp_path_factory.mktemp("text")
    shared = "a line of forty characters and some more \u00fc \u4e16\n"
    for i, document in enumerate(SyntheticSource(size=600_000, documents=60).documents()):
        times = 20 if i % 9 == 0 else 1
        text = (shared * (i % 3) + document + f"\U0001f600{i}\n") * times
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return DocumentSplit(TextSource(folder), val_fraction=0.2)


BPE = pytest.param(BPETokenizer(300), marks=pytest.mark.slow)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_several_processes_build_the_store_of_one(tmp_path, monkeypatch, split, tokenizer):
    monkeypatch.setattr(encoding, "BATCH", 50_000)
    one, _ = prepare_store(tokenizer, split, tmp_path / "one", workers=0)
    pools = []
    monkeypatch.setattr(
        "data_modules.encoding_pool.EncodingPool",
        lambda *args: pools.append(EncodingPool(*args)) or pools[-1],
    )
    several, _ = prepare_store(tokenizer, split, tmp_path / "several", workers=2)
    assert len(pools) == 1 and several.folder.name == one.folder.name
    assert contents(several.folder) == contents(one.folder)
    assert 0 < one.meta["lines_in_training"] < 1
    assert all(process.returncode is not None for process in pools[0]._processes)


def test_results_keep_the_order_of_the_batches():
    """Batches of very different sizes, three times as many as may wait."""
    tokenizer, dtype = ByteTokenizer(), np.dtype(np.uint16)
    todo = [[Piece("val", chr(97 + i) * (1 + 200_000 * (i % 2)), True, True)] for i in range(18)]
    pool = EncodingPool(tokenizer, dtype, 2)
    try:
        results = list(pool.map(iter(todo)))
    finally:
        pool.close()
    for result, pieces in zip(results, todo, strict=True):
        (expected,) = encode_batch(pieces, tokenizer, dtype, LineOverlap())
        assert result[0].ids.tolist() == expected.ids.tolist() and result[0][2:] == expected[2:]


def test_a_text_that_the_tokenizer_refuses_is_refused_by_its_sentence():
    pool = EncodingPool(IdTokenizer(50, 0), np.dtype(np.uint16), 2)
    try:
        with pytest.raises(UserError, match="'word' is not an id: tokenizer=ids knows no text"):
            list(
                pool.map(
                    [[Piece("train", "1 2", True, True)], [Piece("train", "word", True, True)]]
                )
            )
    finally:
        pool.close()


def test_a_worker_that_cannot_start_is_reported_and_all_are_ended(monkeypatch):
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(command, **options):
        # The first one ends at once, the second one waits for its input.
        started.append(popen(["cat"] if started else ["false"], **options))
        if len(started) == 1:
            started[0].wait()
        return started[-1]

    monkeypatch.setattr(encoding_pool.subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match=r"ended with code 1: .*data.build_workers=0"):
        EncodingPool(ByteTokenizer(), np.dtype(np.uint16), 2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_killed_worker_is_reported_and_leaves_no_store(tmp_path, monkeypatch, split):
    monkeypatch.setattr(encoding, "BATCH", 20_000)

    def killed(*args):
        pool = EncodingPool(*args)
        os.kill(pool._processes[1].pid, signal.SIGKILL)
        return pool

    monkeypatch.setattr("data_modules.encoding_pool.EncodingPool", killed)
    with pytest.raises(RuntimeError, match=r"ended with code -9: .*data.build_workers=0"):
        prepare_store(ByteTokenizer(), split, tmp_path, workers=2)
    assert list((tmp_path / "stores").iterdir()) == []


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_worker_whose_main_process_was_killed_prints_nothing(has_begun):
    """It waits for its first input, or writes an answer that nobody reads."""
    state, batch = (ByteTokenizer().state(), "<u2"), [Piece("train", "text", True, True)]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "data_modules.encoding_pool"]
    questions = pickle.dumps(state) + pickle.dumps(batch) if has_begun else b""
    worker = subprocess.run(command, input=questions, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (worker.returncode, worker.stderr) == (0, b"")


class CustomTokenizer(ByteTokenizer):
    pass


def test_the_number_of_encoding_processes(monkeypatch):
    monkeypatch.setattr(encoding_pool, "cores", lambda: 3)
    for build_workers, size, workers in (
        (None, 10_000, 0), (None, 1 << 26, 3), (None, None, 3), (5, 10, 5), (0, 1 << 40, 0),
    ):  # fmt: skip
        assert pick_workers(build_workers, ByteTokenizer(), size) == workers
    assert pick_workers(4, CustomTokenizer(), 1 << 40) == 0


@given(st.data())
def test_merged_line_overlaps_equal_one(data):
    lines = st.integers(0, 30).map(lambda i: f"{i} is a line that is long enough to be counted {i}")
    names, texts = st.sampled_from(["train", "val"]), st.lists(lines, max_size=5).map("\n".join)
    documents = data.draw(st.lists(st.tuples(names, texts), max_size=12))
    whole, parts = LineOverlap(), [LineOverlap() for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_modules.overlap.LIMIT", data.draw(st.integers(1, 12)))
        for name, document in documents:
            whole.add(name, document)
            parts[data.draw(st.integers(0, 2))].add(name, document)
        for part in parts[1:]:
            parts[0].merge(part)
    assert parts[0].share() == whole.share()
    assert parts[0]._counts == whole._counts and parts[0]._below == whole._below


def test_batches_hold_every_piece_once(split):
    overlap = LineOverlap()
    pieces = [piece for batch in batches(split, overlap) for piece in batch]
    documents = list(split)
    assert "".join(piece.text for piece in pieces) == "".join(text for _, text in documents)
    assert sum(piece.first for piece in pieces) == len(documents) == sum(p.last for p in pieces)
    assert any(not piece.first for piece in pieces)
