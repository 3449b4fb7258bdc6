"""Token files of other programs: the ids that are read, and the files that are refused."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules import TokenDataModule, TokenFilesDataModule
from data_modules.shards import Shard, ShardedTokens, cut, stamp_of
from data_modules.sources import SyntheticSource, TextSource
from data_modules.token_files.formats import read_header
from data_modules.token_files.view import scan
from data_modules.tokenizers import BPETokenizer, ByteTokenizer, IdTokenizer
from tests.data_modules.token_formats import litdata, llm_c, megatron, nanogpt, numpy_file

EOT = 256
WRITERS = {
    "raw": lambda path, documents: nanogpt(path.with_suffix(".bin"), documents),
    "llm.c": lambda path, documents: llm_c(path.with_suffix(".bin"), documents),
    "llama": lambda path, documents: llm_c(path.with_suffix(".bin"), documents, llama=True),
    "raw npy": lambda path, documents: nanogpt(path.with_suffix(".npy"), documents),
    "npy": lambda path, documents: numpy_file(path.with_suffix(".npy"), documents),
    "megatron": lambda path, documents: megatron(path.with_suffix(".bin"), documents, sentences=3),
    "int32": lambda path, documents: megatron(path.with_suffix(".bin"), documents, code=4),
    "litdata": lambda path, documents: litdata(path, documents).with_name("chunk-0-0.bin"),
    "litdata int64": lambda path, ids: litdata(path, ids, code=18).with_name("chunk-0-0.bin"),
}


def texts(n: int = 60, *, size: int = 30_000, seed: int = 0) -> list[str]:
    return list(SyntheticSource(size=size, documents=n, seed=seed).documents())


def ids_of(documents: list[str]) -> list[list[int]]:
    return [[*document.encode(), EOT] for document in documents]


def module(cache: Path, path, tokenizer=None, **options) -> TokenFilesDataModule:
    options = {"seq_len": 32, "batch_size": 4, "depth": 2, "cache_dir": cache} | options
    return TokenFilesDataModule(tokenizer or ByteTokenizer(), path=path, **options)


def assert_refused(match: str, cache: Path, *arguments, **options) -> None:
    """Checks that these files are refused with this message."""
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        module(cache, *arguments, **options).prepare()


def assert_header_refused(match: str, path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        read_header(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_tokens_of_the_text(tmp_path, kind):
    train, val = ids_of(texts()), ids_of(texts(20, seed=1))
    files = [WRITERS[kind](tmp_path / name, ids) for name, ids in (("a", train), ("b", val))]
    data = module(tmp_path / "cache", str(files[0]), val_path=files[1])
    for name, documents in (("train", train), ("val", val)):
        file = data.store[name]
        tokens = file.tokens()[:]
        assert tokens.tolist() == sum(documents, [])
        assert not tokens.flags.writeable and not tokens.flags.owndata  # a view of the map
        lengths = [len(document) for document in documents]
        assert file.starts().tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
        assert file.n_bytes == sum(lengths) - len(lengths) and file.n_documents == len(lengths)
    # A view: no file in the cache is of the size of the tokens.
    size = files[0].stat().st_size
    assert max(p.stat().st_size for p in tmp_path.rglob("cache/views/*/*")) < size / 2
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape == (4, 35)
    flat = sum(train, [])
    first = data.training.order(data.seed, 0)[0]
    assert batch.tokens[0].tolist() == flat[first * 32 : first * 32 + 35]


def test_token_files_evaluate_like_the_text_that_they_encode(tmp_path):
    """Documents, bytes and fingerprint."""
    documents = texts(40, size=60_000, seed=3)
    (tmp_path / "text").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "text" / f"{i:03}.txt").write_text(document)
    bpe = BPETokenizer(300).train(documents)
    source = TextSource(tmp_path / "text")
    for tokenizer in (ByteTokenizer(), bpe):
        for masked in (False, True):
            options = {"seq_len": 64, "eval_bytes": 4000, "document_mask": masked}
            options |= {"depth": 2, "batch_size": 4}
            text = TokenDataModule(source, tokenizer, cache_dir=tmp_path / "c", **options)
            eot = tokenizer.eot_id
            train, val = (
                [[*tokenizer.encode(d).tolist(), eot] for d in text.split.documents(name)]
                for name in ("train", "val")
            )
            # Another order than that of the corpus: the evaluation sorts by digests.
            random.Random(0).shuffle(val)
            options["val_path"] = megatron(tmp_path / f"val-{tokenizer.kind}.bin", val)
            trained = nanogpt(tmp_path / f"train-{tokenizer.kind}.bin", train)
            files = module(tmp_path / "c", trained, tokenizer, **options)
            assert files.evaluation_summary() == text.evaluation_summary()
            assert files.evaluated_bytes == text.evaluated_bytes
            batch, expected = next(iter(files.val_dataloader())), next(iter(text.val_dataloader()))
            assert (batch.tokens == expected.tokens).all() and (batch.texts == expected.texts).all()


def test_a_long_document_is_evaluated_in_the_pieces_of_its_text(tmp_path):
    text = "".join(f"line {i} of a long book \u00fc\n" for i in range(20_000))
    book = tmp_path / "book.txt"
    book.write_text(text, encoding="utf-8")
    for tokenizer in (ByteTokenizer(), BPETokenizer(300).train([text])):
        plain = TokenDataModule.from_text(
            str(book), tokenizer, cache_dir=tmp_path / "c", eval_bytes=70_000, val_fraction=0.5
        )
        train, val = plain.split.documents("train"), plain.split.documents("val")
        train_file, val_file = (
            nanogpt(tmp_path / f"{name}.bin", [[*tokenizer.encode(d).tolist()] for d in documents])
            for name, documents in (("t", train), ("v", val))
        )
        options = {"val_path": val_file, "eval_bytes": 70_000}
        files = module(tmp_path / "c", train_file, tokenizer, **options)
        assert len(files.store["val"].pieces()) == len(plain.store["val"].pieces()) > 3
        assert files.evaluation_summary() == plain.evaluation_summary()


def test_documents_without_text_are_not_evaluated(tmp_path):
    train, val = ids_of(texts()), [[EOT], *ids_of(texts(2)), [EOT]]
    paths = [megatron(tmp_path / f"{len(ids)}.bin", ids) for ids in (train, val)]
    data = module(tmp_path / "c", paths[0], val_path=paths[1])
    summary = data.evaluation_summary()
    assert (summary["documents"], summary["tokens"]) == (2, sum(map(len, val)) - 2)


def test_ids_of_one_byte_have_an_end_of_text_beyond_their_type(tmp_path):
    """Their end of text, 256, does not fit into their type."""
    np.save(tmp_path / "t.npy", np.arange(2_000, dtype=np.uint8))
    data = module(tmp_path / "c", tmp_path / "t.npy")
    batch = next(iter(data.val_dataloader()))
    assert batch.tokens[0, :2].tolist() == [256, *data.store["val"].tokens()[:1]]


@pytest.mark.parametrize("kind", ["raw", "megatron", "litdata"])
def test_shards_equal_one_file(tmp_path, kind):
    documents = ids_of(texts())
    whole = WRITERS[kind](tmp_path / "whole", documents)
    flat = sum(documents, [])
    shards = f"{tmp_path}/s/*.bin"
    if kind == "litdata":  # whose names are not in order
        shards = litdata(tmp_path / "s", documents, chunks=12)
    else:
        (tmp_path / "s").mkdir()
    if kind == "raw":  # llm.c's shards end anywhere
        for at in range(0, len(flat), 7001):
            llm_c(tmp_path / "s" / f"{at:06}.bin", [flat[at : at + 7001]])
    elif kind == "megatron":
        for i in range(0, len(documents), 13):
            megatron(tmp_path / "s" / f"{i:06}.bin", documents[i : i + 13])
    one = module(tmp_path / "c", whole, document_mask=True)
    many = module(tmp_path / "c", shards, document_mask=True)
    # A folder stands for all files in it.
    assert module(tmp_path / "c", tmp_path / "s", document_mask=True).store.meta == many.store.meta
    for name in ("train", "val"):
        a, b = one.store[name], many.store[name]
        assert np.array_equal(a.tokens()[:], b.tokens()[:]) and a.n_bytes == b.n_bytes
        assert np.array_equal(a.starts(), b.starts())
    assert one.evaluation_summary() == many.evaluation_summary()
    for x, y in zip(one.train_dataloader(), many.train_dataloader(), strict=True):
        assert (x.tokens == y.tokens).all() and (x.documents == y.documents).all()
    assert one.evaluated_bytes == many.evaluated_bytes
    for x, y in zip(one.held_out_prompts(3, 9), many.held_out_prompts(3, 9), strict=True):
        assert x.tolist() == y.tolist()
    a, b = one.training_text, many.training_text
    assert (a.token_frequency(300) == b.token_frequency(300)).all()
    assert (a.document_frequency(300) == b.document_frequency(300)).all()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_sharded_tokens_against_one_array(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    folder = tmp_path_factory.mktemp("shards")
    flat = np.arange(sum(sizes), dtype=np.uint16)
    shards, start = [], 0
    for i, n in enumerate(sizes):
        head = data.draw(st.integers(0, 5))
        (folder / str(i)).write_bytes(bytes(head) + flat[start : start + n].tobytes())
        shards.append(Shard(folder / str(i), "<u2", head, n, stamp_of(folder / str(i))))
        start += n
    tokens = ShardedTokens(shards)
    first = data.draw(st.integers(0, len(flat)))
    last = data.draw(st.integers(0, len(flat)))
    assert len(tokens) == len(flat) and np.array_equal(tokens[first:last], flat[first:last])
    places = np.array(data.draw(st.lists(st.integers(0, len(flat) - 1), min_size=1)))
    length = data.draw(st.integers(1, len(flat)))
    begins = places.clip(max=len(flat) - length)
    assert np.array_equal(tokens.windows(begins, length), flat[begins[:, None] + np.arange(length)])
    path, offset = tokens.locate(int(places[0]))
    begin = sum(sizes[: int(path.name)])
    assert begin + offset == places[0] and offset < sizes[int(path.name)]
    for part, expected in zip(cut(shards, first), (flat[:first], flat[first:]), strict=True):
        lists = [shard.tokens()[:].tolist() for shard in part]
        assert sum(lists, []) == expected.tolist() and all(lists)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_documents_of_files_without_index_against_brute_force(tmp_path_factory, data):
    """A document starts at the first token and after end-of-text tokens. Those at the beginning,
    where llm.c writes one, are not a document."""
    flat = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30))
    at = sorted({0, len(flat), *data.draw(st.lists(st.integers(0, len(flat)), max_size=3))})
    folder = tmp_path_factory.mktemp("text")
    files = [
        read_header(nanogpt(folder / f"{i}.bin", [flat[a:b]]))
        for i, (a, b) in enumerate(zip(at, at[1:], strict=False))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_modules.token_files.view._BLOCK", data.draw(st.integers(1, 8)))
        text = scan(files, IdTokenizer(3, eot_id=0))
        held_out = data.draw(st.floats(0.01, 0.99))
        parts = text.cut(held_out) if len(flat) > 1 else ()
    expected = [0]
    for i in range(1, len(flat)):
        if flat[i] != 0 and flat[i - 1] == 0 and any(flat[:i]):
            expected.append(i)
    assert text.starts.tolist() == expected
    assert text.counts.tolist() == [flat.count(i) for i in range(3)]
    if parts:
        train, val = parts
        assert 0 < train.n_tokens < len(flat) and train.n_tokens + val.n_tokens == len(flat)
        assert train.counts.tolist() == [flat[: train.n_tokens].count(i) for i in range(3)]
        assert val.counts.tolist() == [flat[train.n_tokens :].count(i) for i in range(3)]
        later = {s - train.n_tokens for s in expected if s > train.n_tokens}
        assert val.starts.tolist() == sorted({0, *later})
        wanted = min(max(1, round(len(flat) * (1 - held_out))), len(flat) - 1)
        later_starts = [s for s in expected if s >= wanted]
        assert not later_starts or train.n_tokens == later_starts[0]


def test_the_end_is_held_out_in_whole_documents(tmp_path):
    documents = ids_of(texts(50))
    data = module(tmp_path / "c", nanogpt(tmp_path / "x.bin", documents), held_out=0.2)
    n = data.store["train"].n_documents
    assert data.store["train"].tokens()[:].tolist() == sum(documents[:n], [])
    assert data.store["val"].tokens()[:].tolist() == sum(documents[n:], [])
    share = data.store["val"].n_tokens / sum(map(len, documents))
    assert 0.15 < share <= 0.2 and data.summary()["held_out"] == 0.2
    # One document without an end is cut at that share.
    single = module(tmp_path / "c", nanogpt(tmp_path / "y.bin", [list(range(200)) * 10]))
    assert (single.store["train"].n_tokens, single.store["val"].n_tokens) == (1900, 100)
    assert_refused("z.bin has only one token", tmp_path / "c", nanogpt(tmp_path / "z.bin", [[7]]))


def test_ids_without_a_text_have_no_bytes(tmp_path, caplog):
    documents = [[*range(1, 200), 0]] * 100
    path = nanogpt(tmp_path / "x.bin", documents)
    data = module(tmp_path / "c", path, IdTokenizer(50257, eot_id=0), eval_bytes=1600)
    assert data.evaluated_bytes is None and not data.has_text
    assert "no bits per byte" in caplog.text
    # A token counts as four bytes: 199 of a document are 796.
    evaluated, summary = data.evaluation_summary(), data.summary()
    assert (evaluated["documents"], evaluated["tokens"]) == (3, 600) and "bytes" not in evaluated
    assert summary["train"]["bytes"] is summary["train"]["bytes_per_token"] is None
    assert data.tokenizer.decode([5, 17]) == " 5 17"
    assert data.tokenizer.encode("5 17").tolist() == [5, 17]
    with pytest.raises(ValueError, match="'def' is not an id: tokenizer=ids knows no text"):
        data.tokenizer.encode("def f")
    for text in ("50257", "-1", "\u00b2", "9" * 5000):
        with pytest.raises(ValueError, match="is not an id"):
            data.tokenizer.encode(text)
    for arguments, message in (
        ((5, 5), r"tokenizer.eot_id must be a whole number in \[0, 4\], not 5"),
        ((1, 0), r"vocab_size must be a whole number in \[2, 1048576\], not 1"),
        ((5, "3"), "eot_id must be a whole number .*, not '3'"),
    ):
        with pytest.raises(ValueError, match=message):
            IdTokenizer(*arguments)


def test_chunks_written_by_litdata_are_read(tmp_path):
    """litdata 0.2.76: twelve tensors of uint16, chunk_size=30, TokensLoader(). Its
    StreamingDataset of blocks of 5 begins with [0, 1, 4, 256, 7], [8, 11, 16, 256, 14]."""
    folder = Path(__file__).parent / "litdata"
    documents = [[*((7 * i + j * j) % 256 for j in range(3 + i % 4)), EOT] for i in range(12)]
    data = module(tmp_path / "c", folder, held_out=0.3, seq_len=4)
    train, val = (data.store[name] for name in ("train", "val"))
    n = train.n_documents
    assert train.tokens()[:].tolist() == sum(documents[:n], [])
    assert val.tokens()[:].tolist() == sum(documents[n:], [])
    starts = np.cumsum([0, *map(len, documents)])
    assert [*train.starts(), *(val.starts() + train.n_tokens)] == starts[:-1].tolist()


def test_litdata_chunks_without_token_ids_are_refused(tmp_path):
    index = litdata(tmp_path / "a", [[1, 2, 0], [3, 0]])
    index_content = json.loads(index.read_text())
    types = [f"no_header_tensor:{number}" for number in ("0", "\u00b2", "9" * 5000, "")]
    for change, message in (
        ({"compression": "zstd"}, r"chunks with compression \(zstd\).*write them again without"),
        ({"encryption": {"algorithm": "fernet"}}, "chunks with encryption"),
        ({"data_format": ["int", "str"]}, "not rows of token ids: write one tensor of ids"),
        *(({"data_format": [name]}, "not rows of token ids") for name in types),
        ({"item_loader": "PyTreeLoader"}, "item_loader PyTreeLoader"),
    ):
        index.write_text(json.dumps({**index_content, "config": index_content["config"] | change}))
        for path in (index, index.parent / "chunk-0-0.bin", index.parent):
            assert_refused(message, tmp_path / "c", path)
    for name in ("../x.bin", "a\\b.bin", "\0.bin"):
        outside = [index_content["chunks"][0] | {"filename": name}]
        index.write_text(json.dumps({**index_content, "chunks": outside}))
        assert_refused("names chunks outside its folder", tmp_path / "c", index)
    index.write_text(json.dumps({**index_content, "chunks": []}))
    assert_refused("names no chunk", tmp_path / "c", index)
    index.write_text('{"other": 1}')
    assert_refused(r"index\.json is not a file of token ids", tmp_path / "c", index)


def test_a_litdata_chunk_without_its_index_is_refused(tmp_path):
    """Its header would be read as ids."""
    index = litdata(tmp_path / "a", ids_of(texts(8)), chunks=2)
    chunk, content = index.parent / "chunk-0-0.bin", index.read_text()
    for damaged in (content[:-20], "[" * 100_000):
        index.write_text(damaged)
        assert_refused(r"index\.json is not JSON, or is truncated", tmp_path / "c", chunk)
    other = nanogpt(tmp_path / "a" / "x.bin", [[1, 2, 0]])
    index.write_text(content)
    assert_refused(r"x\.bin is not among the chunks of", tmp_path / "c", other)
    index.unlink()
    chunks = f"{tmp_path}/a/chunk*.bin"
    assert_refused(r"is a chunk of litdata without its index\.json", tmp_path / "c", chunks)
    empty = litdata(tmp_path / "b", [[]])
    assert_refused("chunk-0-0.bin holds no ids: leave it out", tmp_path / "c", empty)


def test_megatron_documents_without_end_of_text_are_reported(tmp_path, caplog):
    documents = [document[:-1] for document in ids_of(texts())]
    data = module(tmp_path / "c", str(megatron(tmp_path / "x.bin", documents).with_suffix("")))
    data.prepare()
    assert "of the first 59 documents 59 do not end in the end-of-text token 256" in caplog.text
    assert data.store["train"].n_documents + data.store["val"].n_documents == 60
    n_bytes = data.store["train"].n_bytes + data.store["val"].n_bytes
    assert n_bytes == sum(map(len, documents))


def test_a_folder_of_the_home_comes_before_a_pair_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    for name, first in (("x/a.bin", 1), ("x.bin", 2), ("y.bin", 3)):
        nanogpt(tmp_path / name, [[first, *range(100)]])
    read = {path: module(tmp_path / "c", f"~/{path}").store["train"].tokens()[0:1] for path in "xy"}
    assert (read["x"].tolist(), read["y"].tolist()) == ([1], [3])


def test_the_fingerprint_follows_content_not_path(tmp_path):
    """A moved file keeps its results, a changed one does not."""
    documents = ids_of(texts())
    data = module(tmp_path / "c", nanogpt(tmp_path / "x.bin", documents))
    first = data.fingerprint
    (tmp_path / "x.bin").rename(tmp_path / "y.bin")
    moved = module(tmp_path / "c", tmp_path / "y.bin")
    assert moved.fingerprint == first and moved.store["train"].shards[0].path.name == "y.bin"
    documents[0][0] = 7
    assert module(tmp_path / "c", nanogpt(tmp_path / "y.bin", documents)).fingerprint != first
    assert module(tmp_path / "c", tmp_path / "y.bin", IdTokenizer(257, 256)).fingerprint != first


@pytest.mark.parametrize(("size", "workers"), [(30_000, 0), (20_000, 0), (40_000, 0), (20_000, 1)])
def test_a_file_that_is_replaced_after_it_was_looked_through_is_refused(tmp_path, size, workers):
    """Windows would be cut from other ids, by the bounds of the file before."""
    file = nanogpt(tmp_path / "x.bin", ids_of(texts()))
    data = module(tmp_path / "c", file, num_workers=workers)
    data.prepare()
    nanogpt(tmp_path / "y.bin", ids_of(texts(seed=1, size=size))).replace(file)
    message = r"^\S+x\.bin was written to or replaced while it was being read: start again\.$"
    with pytest.raises(ValueError, match=message):
        next(iter(data.train_dataloader()))
    assert len(next(iter(module(tmp_path / "c", file).train_dataloader()))) == 4


def test_ids_of_another_byte_order_have_the_type_that_is_asked_for(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(256, dtype=">u2").repeat(9))
    data = module(tmp_path / "c", tmp_path / "x.npy", dtype="uint16")
    assert data.store["train"].tokens()[:20].tolist() == [0] * 9 + [1] * 9 + [2] * 2
    assert next(iter(data.train_dataloader())).tokens.max() < 256


def test_ids_beyond_the_vocabulary_are_named(tmp_path):
    nanogpt(tmp_path / "a.bin", [[1, 2, 3]] * 50)
    nanogpt(tmp_path / "b.bin", [[1, 2, 300]] * 50)
    message = r"b\.bin has the id 300 at token 2, .*byte\) has ids from 0 to 256: set"
    assert_refused(message, tmp_path / "c", f"{tmp_path}/*.bin")
    megatron(tmp_path / "d.bin", [[1, -2, 3]] * 50, code=4)
    assert_refused("has the id -2 at token 1", tmp_path / "c", tmp_path / "d.bin")


def test_options_that_do_not_fit_are_refused(tmp_path):
    good = nanogpt(tmp_path / "x.bin", ids_of(texts()))
    (linked := tmp_path / "linked.bin").symlink_to(good)
    message = "tokenizer=bpe would have to be trained on text: .* or tokenizer=ids with .*eot_id$"
    assert_refused(message, tmp_path, good, BPETokenizer(300))
    for options, message in (
        ({"val_path": good, "held_out": 0.1}, "=0.1 has no meaning with data.val_path"),
        ({"held_out": 1}, r"held_out .* must be a number in \(0, 1\), not 1"),
        ({"val_path": str(good)}, "x.bin is in data.path and in data.val_path"),
        ({"val_path": str(linked)}, "x.bin is in data.path and in data.val_path"),
        ({"val_path": "nowhere.bin"}, "nowhere.bin does not exist.*data.val_path"),
        ({"val_path": "~no-such-name/x.bin"}, "~no-such-name/x.bin does not exist.*data.val_path"),
        ({"dtype": "float32"}, "data.dtype must be uint16.*not 'float32'"),
    ):
        assert_refused(message, tmp_path, good, **options)
    assert_refused("data.path must name a file", tmp_path, [])
    both = [megatron(tmp_path / "m.bin", ids_of(texts())), good]
    assert_refused(r"x\.bin has none: use them in separate runs", tmp_path, both)
    np.save(tmp_path / "none.npy", np.zeros(0, np.int64))
    assert_refused(r"none\.npy is empty: leave the file out", tmp_path, tmp_path / "none.npy")
    short = llm_c(tmp_path / "l.bin", [[1]])
    assert_refused("its ids are uint16, not data.dtype=uint32", tmp_path, short, dtype="uint32")
    notes = tmp_path / "notes.md"
    notes.write_text("x")
    assert_refused(r"notes\.md is not a file of token ids: .*/\*\.bin'", tmp_path, notes)


def test_raw_ids_of_32_bits_need_data_dtype(tmp_path):
    path = nanogpt(tmp_path / "x.bin", ids_of(texts()), code="I")
    assert_refused("looks like ids of 32 bits: set data.dtype=uint32", tmp_path / "c", path)
    longer = nanogpt(tmp_path / "y.bin", ids_of(texts()), code="q")
    assert_refused("looks like ids of 64 bits: set data.dtype=int64", tmp_path / "c", longer)
    data = module(tmp_path / "c", path, dtype="uint32")
    assert data.store["train"].tokens()[:1].dtype == np.uint32


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_of_other_formats_are_named_and_nothing_is_executed(tmp_path):
    path = tmp_path / "x.bin"
    for content, message in (
        (b"", "is empty"),
        (b"\x01", "truncated, or its ids are not uint16"),
        (b"PK\x03\x04" + b"0" * 60, "is a zip or .npz archive"),
        (b"\x1f\x8b\x08" + b"0" * 61, "is compressed by gzip"),
        (b"MMIDIDX\x00\x00" + b"0" * 60, "is Megatron's index"),
        ((20240522).to_bytes(4, "little") + bytes(2000), "multiple-choice questions"),
        ((20240520).to_bytes(4, "little") + bytes(9), "truncated in its llm.c header"),
        (np.array([20240520, 2, 1] + [0] * 253, "<i4").tobytes(), "version 2 of llm.c's format"),
        (np.array([20240520, 1, 9] + [0] * 253, "<i4").tobytes() + b"12", "truncated or damaged"),
        (np.array([20240520, 1, -1] + [0] * 253, "<i4").tobytes(), "truncated or damaged"),
    ):
        path.write_bytes(content)
        assert_header_refused(f"x.bin.* {message}", path)
    path = tmp_path / "x.npy"
    np.save(path, np.array([Bomb()], object), allow_pickle=True)
    assert_header_refused(r"x\.npy is not a \.npy file of ids", path)
    path.write_bytes(b"\x93NUMPY" + pickle.dumps(Bomb()))
    assert_header_refused(r"x\.npy is not a \.npy file of ids", path)
    path.write_bytes(b"PK\x03\x04" + b"0" * 60)
    assert_header_refused(r"x\.npy holds no token ids but is a zip or \.npz archive", path)
    path.write_bytes(b"123")
    assert_header_refused(r"x\.npy is truncated, or its ids are not uint16", path)
    for array in (np.zeros(3), np.zeros((2, 3), int)):
        np.save(path, array)
        assert_header_refused("not a one-dimensional array of integers", path)


def test_a_first_id_of_two_bytes_of_gzip_is_an_id(tmp_path):
    path = tmp_path / "x.bin"
    np.array([0x8B1F, 5, 6], "<u2").tofile(path)
    assert read_header(path).shard.n_tokens == 3


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_headers_are_refused_or_fit_the_file(tmp_path_factory, data):
    """Bytes are changed, cut off or added."""
    folder = tmp_path_factory.mktemp("fuzz")
    documents = [[1, 2, 3, 0], [4, 5, 0], [6, 0]]
    kind = data.draw(st.sampled_from(["megatron", "llm.c", "npy", "litdata"]))
    path = WRITERS[kind](folder / "x", documents)
    damaged = path.with_suffix(".idx") if kind == "megatron" else path
    content = bytearray(damaged.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    damaged.write_bytes(bytes(content[:end]) + data.draw(st.binary(max_size=3)))
    try:
        header = read_header(path)
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    shard = header.shard
    end = shard.offset + shard.n_tokens * np.dtype(shard.dtype).itemsize
    assert end <= path.stat().st_size and len(shard.tokens()) == shard.n_tokens > 0
    if header.starts is not None:
        starts = header.starts.tolist()
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < shard.n_tokens
