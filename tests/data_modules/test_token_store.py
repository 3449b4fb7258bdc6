"""The token store: contents, split, and builds that are killed or run at the same time."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokens
from tokenizers import models, pre_tokenizers, trainers

from data_modules.cache import build_once, cache_folder
from data_modules.encoding import Piece, encode_batch, pieces
from data_modules.overlap import LineOverlap
from data_modules.prompts import take_prompts
from data_modules.sources import TextSource
from data_modules.splitting import DocumentSplit
from data_modules.store_builder import prepare_store, prepare_tokenizer
from data_modules.token_store import token_dtype
from data_modules.tokenizers import BPETokenizer, ByteTokenizer, PretrainedTokenizer
from tests.data_modules.stores import ListSource, store_of
from tests.integration.helpers import execute


def test_store_holds_every_document_once(tmp_path):
    documents = [f"document {i} \u00fc\n" * (i % 5 + 1) for i in range(300)]
    store = store_of(documents, tmp_path, val_fraction=0.1)
    split = DocumentSplit(ListSource(documents), val_fraction=0.1)
    tokenizer = ByteTokenizer()
    for name in ("train", "val"):
        file = store[name]
        expected = [d for d in documents if (split.hash(d) < 0.1) == (name == "val")]
        tokens, starts = file.tokens(), file.starts()
        assert tokens.dtype == np.uint16 and starts.dtype == np.int64
        bounds = [*starts.tolist(), len(tokens)]
        stored = [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        assert all(document[-1] == tokenizer.eot_id for document in stored)
        assert [tokenizer.decode(document[:-1]) for document in stored] == expected
        assert file.n_documents == len(expected)
        assert file.n_bytes == sum(len(d.encode()) for d in expected)
    assert 15 < store["val"].n_documents < 50


def test_the_store_has_the_share_of_validation_lines_in_training(tmp_path):
    header = "# One licence that every document of this corpus begins with.\n"
    documents = [header + f"{i} is all that document {i} has to say.\n{i}\n" for i in range(100)]
    store = store_of(documents, tmp_path)
    assert store["val"].n_documents > 1 and store.meta["lines_in_training"] == 0.5
    assert store_of(["short\n"] * 3 + ["lines\n"], tmp_path).meta["lines_in_training"] is None


def test_dtype_follows_the_vocabulary():
    assert [token_dtype(n).name for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_bpe_is_trained_once_and_on_training_documents_only(tmp_path, monkeypatch):
    documents = ["train words " * 40 if i % 2 else "zzqq" * 40 for i in range(10)]
    monkeypatch.setattr(DocumentSplit, "hash", lambda self, text: float("train" in text))
    split = DocumentSplit(ListSource(documents))
    store, tokenizer = prepare_store(BPETokenizer(290), split, tmp_path)
    assert len(tokenizer.encode(" words")) == 1 and len(tokenizer.encode("zzqq")) == 4
    ids = store["val"].tokens()
    assert tokenizer.decode(ids[: store["val"].starts()[1] - 1]) == documents[0]
    monkeypatch.setattr(BPETokenizer, "train", lambda *_: pytest.fail("trained twice"))
    again, same = prepare_store(BPETokenizer(290), split, tmp_path)
    assert again.folder == store.folder and same.fingerprint() == tokenizer.fingerprint()
    # Another val_fraction that sends the same documents to train would be another key: retrained.
    with pytest.raises(pytest.fail.Exception):
        prepare_store(BPETokenizer(291), split, tmp_path)


def test_a_trained_tokenizer_finds_the_store_of_its_training(tmp_path, monkeypatch):
    split = DocumentSplit(ListSource(["some words " * 40, "and others " * 40] * 5))
    store, trained = prepare_store(BPETokenizer(290), split, tmp_path)
    stored = BPETokenizer.from_state(trained.state())
    with monkeypatch.context() as patch:
        patch.setattr("data_modules.store_builder._encoded", None)  # nothing is encoded again
        assert prepare_store(stored, split, tmp_path)[0].folder == store.folder
    (name,) = (tmp_path / "store_names").iterdir()
    name.write_text("..")
    again, _ = prepare_store(stored, split, tmp_path)
    assert again.folder != store.folder
    assert np.array_equal(again["train"].tokens(), store["train"].tokens())


def test_encoding_in_pieces_gives_the_ids_of_the_whole_document():
    text = "".join(f"def f{i}():\n    return {i}\n\nx = {i}\ny = 1\n" for i in range(400))
    tokenizer = BPETokenizer(300).train([text])
    whole = tokenizer.encode(text).tolist()
    cut = [piece for piece, _ in pieces(text, 1000)]
    assert len(cut) > 10 and "".join(cut) == text
    assert np.concatenate([tokenizer.encode(piece) for piece in cut]).tolist() == whole


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_only_the_first_piece_begins_with_the_space_that_a_tokenizer_adds(tmp_path, scheme):
    library = Tokens(models.BPE(byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    lines = [f"line {i} of {i % 7}{' or' * (i % 3)}\n" for i in range(900)]
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["</s>"], show_progress=False)
    library.train_from_iterator(lines[:5], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = PretrainedTokenizer(str(tmp_path)), "".join(lines)
    cut = [Piece("val", part, not i, last) for i, (part, last) in enumerate(pieces(text, 1000))]
    encoded = encode_batch(cut, tokenizer, np.dtype("<u2"), LineOverlap())
    assert len(cut) > 10
    assert np.concatenate([piece.ids for piece in encoded]).tolist() == library.encode(text).ids


@given(st.text("ab \n", max_size=60), st.integers(1, 9))
def test_pieces_cover_any_text(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(piece for piece, _ in cut) == text
    assert all(0 < len(piece) <= limit for piece, last in cut if not last)
    assert [last for _, last in cut] == [False] * (len(cut) - 1) + [True]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer(300)], ids=["byte", "bpe"])
def test_a_lone_surrogate_is_refused_with_its_document(tmp_path, tokenizer):
    documents = ["", *(f"fine {i}" for i in range(100)), "no\ud800"]
    with pytest.raises(ValueError, match="document 101 of listed .* U\\+D800.* character 2"):
        store_of(documents, tmp_path, tokenizer=tokenizer)
    assert not list((tmp_path / "stores").iterdir())


class Edited(TextSource):
    """Its file gets one more word whenever it is read."""

    def documents(self) -> Iterator[str]:
        for document in super().documents():
            with open(self.paths[0], "a") as file:
                file.write("more ")
            yield document


@pytest.mark.parametrize(
    "read",
    [
        lambda split, cache: prepare_store(ByteTokenizer(), split, cache),
        lambda split, cache: prepare_store(BPETokenizer(270), split, cache),
        lambda split, cache: prepare_tokenizer(BPETokenizer(270), split, cache),
        lambda split, _: take_prompts(
            split, ByteTokenizer(), counts={"train": 3, "val": 2}, length=8
        ),
    ],
    ids=["store", "store and tokenizer", "tokenizer", "prompts"],
)
def test_text_that_changes_while_it_is_read_is_refused(tmp_path, read):
    """Its store would be kept under the digest of the text before."""
    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    source = Edited(tmp_path / "a.txt")
    before = source.fingerprint()
    with pytest.raises(ValueError, match="a file of 'text' was changed while it was read"):
        read(DocumentSplit(source), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*")) and source.fingerprint() != before


def test_each_text_split_and_tokenizer_has_its_own_store(tmp_path):
    documents = [f"text {i}" for i in range(100)]
    variants = [{}, {"val_fraction": 0.2}, {"seed": 3}]
    variants += [{"tokenizer": BPETokenizer(n)} for n in (270, 271)]
    stores = {store_of(documents, tmp_path, **options).folder for options in variants}
    stores.add(store_of(documents[1:], tmp_path).folder)
    assert len(stores) == 6 and store_of(documents, tmp_path).folder in stores


def test_cache_folder_is_the_argument_then_the_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "env"))
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == cache_folder("") == tmp_path / "env"
    assert cache_folder("~no-such-name/cache") == Path("~no-such-name/cache")
    monkeypatch.delenv("MTP_LIGHTNING_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "mtp-lightning"


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_failed_build_leaves_nothing_and_names_a_full_disk(tmp_path, full):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(full, os.strerror(full))

    remedy = "free some space, or set the environment variable MTP_LIGHTNING_CACHE"
    reason = re.escape(f"target ({os.strerror(full)}): {remedy}")
    with pytest.raises(OSError, match=reason):
        build_once(tmp_path / "target", fill)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write in the cache folder .*MTP_LIGHTNING_CACHE"):
        build_once(tmp_path / "file" / "target", fill)


FULL = """
import resource, sys
from pathlib import Path
from tests.data_modules.stores import store_of

most = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
try:
    store_of([str(i) for i in range(400)], Path(sys.argv[1]), val_fraction=0.8)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [500, 2_500, 10_000])
def test_any_file_of_a_store_may_be_the_one_that_fills_the_disk(tmp_path, most):
    """Ids, starts of documents, and pieces."""
    command = [sys.executable, "-c", FULL, str(tmp_path), str(most)]
    output = execute(command, imported=("tests.data_modules.stores",)).stdout
    assert re.match(r"cannot build .*stores/\w+ \(File too large\): free some space", output)
    assert list((tmp_path / "stores").iterdir()) == []


def test_a_cache_that_cannot_be_read_is_refused_with_the_remedy(tmp_path, monkeypatch):
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    remedy = "set the environment variable MTP_LIGHTNING_CACHE"
    with pytest.raises(OSError, match=rf"cache folder .* \(Permission denied\): {remedy}"):
        build_once(tmp_path / "target", lambda folder: None)


def test_the_progress_bar_of_a_failed_build_ends_before_the_error(tmp_path, monkeypatch):
    def fail(folder: Path, tokenizer, split, encoded, overlap) -> None:
        next(encoded)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("data_modules.store_builder.write_documents", fail)
    bar = MagicMock(n=0)
    monkeypatch.setattr("tqdm.tqdm", lambda **options: bar)
    with pytest.raises(OSError, match="Input/output") as raised:
        store_of(["a document"] * 3, tmp_path)
    assert bar.__exit__.called and raised.traceback  # whose frames would keep the bar open
