"""The evaluation text: the same documents for every tokenizer, window, batch and depth, and each
token is a target once."""

from __future__ import annotations

import gzip
import hashlib
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokens
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_modules import TokenDataModule
from data_modules.encoding import pieces
from data_modules.evaluation_text import EvaluationText, EvaluationWindows, choose
from data_modules.sources import SyntheticSource, TextSource
from data_modules.tokenizers import BPETokenizer, ByteTokenizer, PretrainedTokenizer, Tokenizer
from tests.data_modules.loaders import token_file
from tests.models import target_counts


def module(folder: Path, source=None, tokenizer: Tokenizer | None = None, **options):
    source = source or SyntheticSource(size=60_000, documents=120)
    options = {"seq_len": 32, "batch_size": 4, "val_fraction": 0.2, "cache_dir": folder} | options
    return TokenDataModule(source, tokenizer or ByteTokenizer(), **options)


def documents_of(data: TokenDataModule) -> list[str]:
    """The evaluated documents, read back from the windows' targets."""
    ids = [i for b in data.val_dataloader() for i in b.targets(0)[b.valid(0)].tolist()]
    at = [i for i, token in enumerate(ids) if token == data.tokenizer.eot_id]
    ends = zip([0, *(i + 1 for i in at)], [*at, len(ids)], strict=True)
    return [data.tokenizer.decode(ids[a:b]) for a, b in ends if a < b]


def test_whole_documents_are_chosen_in_digest_order_up_to_eval_bytes(tmp_path):
    data = module(tmp_path, eval_bytes=3000)
    expected = sorted(
        data.split.documents("val"),
        key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    )
    n = next(n for n in range(1, 99) if sum(len(d.encode()) for d in expected[:n]) >= 3000)
    assert 3 < n < len(expected) and documents_of(data) == expected[:n]
    text = "".join(expected[:n]).encode()
    assert data.evaluation_summary() == {
        "fingerprint": data.evaluation.text.fingerprint,
        "documents": n,
        "bytes": sum(len(d.encode()) for d in expected[:n]),
        "tokens": sum(len(d.encode()) + 1 for d in expected[:n]),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    assert documents_of(module(tmp_path, eval_bytes="all")) == expected
    assert documents_of(module(tmp_path, eval_bytes=10**9)) == expected
    assert len(documents_of(module(tmp_path, eval_bytes=1))) == 1


@pytest.mark.parametrize("document_mask", [False, True])
def test_tokenizers_windows_batches_and_depths_share_one_text(tmp_path, document_mask):
    byte, bpe = ByteTokenizer(), BPETokenizer(300)
    texts = []
    for tokenizer, seq_len, batch, depth in (
        (byte, 64, 1, 0), (byte, 256, 8, 3), (bpe, 64, 8, 3), (bpe, 256, 1, 1),
        (BPETokenizer(400), 256, 8, 0),
    ):  # fmt: skip
        reader = {"seq_len": seq_len, "eval_batch_size": batch, "depth": depth}
        reader |= {"eval_bytes": 5000, "document_mask": document_mask}
        data = module(tmp_path, tokenizer=tokenizer, **reader)
        summary = data.evaluation_summary()
        assert summary["tokens"] == sum(int(target_counts(b)[0]) for b in data.val_dataloader())
        n_bytes = sum(data.evaluation.text.bytes)
        texts.append((summary["fingerprint"], summary["documents"], n_bytes))
        if document_mask:  # without the first token of every document
            pieces = data.tokenizer.token_bytes()
            whole = documents_of(module(tmp_path, tokenizer=data.tokenizer, eval_bytes=5000))
            n_first = sum(len(pieces[data.tokenizer.encode(d)[0]]) for d in whole)
            assert summary["bytes"] == n_bytes - n_first < n_bytes
        else:
            assert summary["bytes"] == n_bytes
    assert len(set(texts)) == 1 and texts[0][2] >= 5000


def test_another_text_has_another_fingerprint(tmp_path):
    one = module(tmp_path).evaluation.text.fingerprint
    assert module(tmp_path, tokenizer=BPETokenizer(300)).evaluation.text.fingerprint == one
    others = [{"eval_bytes": 1000}, {"split_seed": 1}, {"val_fraction": 0.3}]
    others += [{"source": SyntheticSource(size=60_000, documents=120, seed=1)}]
    assert len({one, *(module(tmp_path, **o).evaluation.text.fingerprint for o in others)}) == 5


def test_a_long_document_is_evaluated_up_to_eval_bytes(tmp_path):
    """One large file is one document in two splits; its evaluation must not take hours."""
    text = "".join(f"line {i} of a long book\n" for i in range(16_000))
    (tmp_path / "book.txt").write_text(text)
    source = TextSource(str(tmp_path / "book.txt"))
    options = {"source": source, "val_fraction": 0.5, "seq_len": 256, "eval_batch_size": 32}
    whole = next(module(tmp_path, eval_bytes="all", **options).split.documents("val"))
    assert len(whole) > 150_000
    cuts = [piece for piece, _ in pieces(whole)]
    every = len(cuts)
    for n_bytes, taken in ((1, 1), (len(cuts[0]) + 1, 2), (len(whole), every), ("all", every)):
        for tokenizer in (ByteTokenizer(), *([BPETokenizer(300)] if taken == 2 else [])):
            data = module(tmp_path, tokenizer=tokenizer, eval_bytes=n_bytes, **options)
            assert documents_of(data) == ["".join(cuts[:taken])]
            assert data.evaluated_bytes == [sum(map(len, cuts[:taken]))]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_every_token_is_a_target_once_against_brute_force(tmp_path_factory, data):
    depth = data.draw(st.integers(0, 4))
    seq_len = data.draw(st.integers(max(depth, 1), 12))
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    masked = data.draw(st.booleans())
    ends = np.cumsum(lengths)
    file = token_file(tmp_path_factory.mktemp("file"), int(ends[-1]))
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    text = EvaluationText(file, (ends - lengths)[order], ends[order], ends, "")
    windows = EvaluationWindows(
        text, seq_len=seq_len, depth=depth, eot_id=9999, document_mask=masked
    )
    stream = [9999, *(i for a, b in zip(text.starts, text.ends, strict=True) for i in range(a, b))]
    owner = [-1, *(n for n, i in enumerate(order) for _ in range(lengths[i]))]
    batch = windows[np.arange(len(windows) + 1)]  # one after the last: padding
    assert windows.n_targets == int(target_counts(batch)[0])
    for k in range(depth + 1):
        expected = [
            (stream[i], owner[i])
            for i in range(k + 1, len(stream))
            if not masked or owner[i] == owner[i - k - 1]
        ]
        valid, texts = batch.valid(k), batch.shifted(batch.texts, k)
        scored = zip(batch.targets(k)[valid].tolist(), texts[valid].tolist(), strict=True)
        assert list(scored) == expected
    inputs = [row[:seq_len] for row in batch.tokens.tolist()]
    assert sum(inputs, [])[: len(stream) - 1] == stream[:-1]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_choice_of_documents_against_brute_force(tmp_path_factory, data):
    """Documents of one to three pieces with made-up digests, with or without one that has no
    text before them."""
    rows, documents, starts, start = [], [], [], 0
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            starts.append(start)
            start += 1
        starts.append(start)
        document = []
        for _ in range(data.draw(st.integers(1, 3))):
            n_bytes, name = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 99))
            rows.append((len(starts) - 1, start, n_bytes, f"{name:032x}".encode()))
            document.append(rows[-1])
            start += n_bytes
        start += 1  # the end-of-text token
        documents.append((document, start))
    file = token_file(tmp_path_factory.mktemp("file"), start, starts, rows)
    budget = data.draw(st.none() | st.integers(1, 60))
    expected, n_left = [], budget if budget is not None else 10**9
    for document, end in sorted(documents, key=lambda d: d[0][0][3]):
        taken = []
        for piece in document:
            if n_left > 0:
                taken.append(piece)
                n_left -= piece[2]
        if taken:
            last = end if len(taken) == len(document) else document[len(taken)][1]
            expected.append((taken[0][1], last, sum(piece[2] for piece in taken)))
    text = choose(file, budget)
    assert list(zip(text.starts, text.ends, text.bytes, strict=True)) == expected


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"<unk>": 0, "</s>": 1, "known": 2}, unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "know")], unk_id=0),
    ],
)
def test_text_that_the_tokenizer_does_not_know_is_said(tmp_path, caplog, model):
    library = Tokens(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PretrainedTokenizer(str(tmp_path))
    for words, unknown in (("known", False), ("known 5", True)):
        (tmp_path / "text.txt").write_text(f"{words}\n" * 2000)
        data = module(tmp_path, TextSource(tmp_path / "text.txt"), tokenizer)
        assert data.evaluation_summary()["bytes"]
        assert ("of the evaluated tokens are <unk>" in caplog.text) == unknown


def test_a_text_without_a_token_is_not_compressed(tmp_path):
    """A tokenizer of words drops white space."""
    library = Tokens(models.WordLevel({"<unk>": 0, "</s>": 1, "known": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    for name, text in (("train.txt", "known " * 2000), ("val.txt", "\n" * 9)):
        (tmp_path / name).write_text(text)
    source = TextSource(tmp_path / "train.txt", val_paths=tmp_path / "val.txt")
    tokenizer = PretrainedTokenizer(str(tmp_path))
    summary = module(tmp_path, source, tokenizer, val_fraction=0.05).evaluation_summary()
    assert (summary["bytes"], summary["tokens"]) == (9, 1) and "xz_bits_per_byte" not in summary


def test_a_space_that_the_tokenizer_adds_does_not_count_as_a_byte(tmp_path):
    """SentencePiece's tokenizers add one, and drop it in decoding."""
    words = Tokens(models.BPE(byte_fallback=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    texts = list(SyntheticSource(size=60_000, documents=120).documents())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], show_progress=False)
    words.train_from_iterator(texts, trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PretrainedTokenizer(str(tmp_path / "tokenizer.json"))
    whole = module(tmp_path, tokenizer=tokenizer)
    masked = module(tmp_path, tokenizer=tokenizer, document_mask=True)
    documents = documents_of(whole)
    first = [tokenizer.decode(tokenizer.encode(text)[:1]) for text in documents]
    assert all(map(str.startswith, documents, first))
    rests = [text.removeprefix(word) for text, word in zip(documents, first, strict=True)]
    assert masked.evaluated_bytes == [len(rest.encode()) for rest in rests]
    text = "".join(documents).encode()
    summary = whole.evaluation_summary()
    assert summary["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
