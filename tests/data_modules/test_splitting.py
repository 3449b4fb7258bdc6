"""The split: near copies are in one split, and neither split is empty."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules.sources import StdlibSource
from data_modules.sources.base import Source
from data_modules.splitting import DocumentSplit, cut_point
from mtp_lightning.errors import UserError
from tests.data_modules.stores import ListSource


class Projects(ListSource):
    """Documents that are called project/name, in groups by project."""

    def grouped(self):
        return ((text.split("/")[0], text) for text in self.documents())


def splits_of_groups(source: Source, **options) -> dict[str, set[str]]:
    """The splits that the documents of each group are in."""
    by_group: dict[str, set[str]] = {}
    groups = (group for group, _ in source.grouped())
    for group, (name, _) in zip(groups, DocumentSplit(source, **options), strict=True):
        by_group.setdefault(group, set()).add(name)
    return by_group


@given(
    st.lists(st.sampled_from("abcdef"), min_size=2).filter(lambda texts: len(set(texts)) > 1),
    st.integers(0, 50),
)
def test_exact_copies_are_in_one_split(texts, seed):
    by_group = splits_of_groups(ListSource(texts), seed=seed, val_fraction=0.5)
    assert all(len(splits) == 1 for splits in by_group.values())
    assert set().union(*by_group.values()) == {"train", "val"}


def test_each_group_is_in_one_split_in_proportion():
    texts = [f"{i % 500}/{i}" for i in range(2000)]
    by_group = splits_of_groups(Projects(texts), val_fraction=0.1)
    assert len(by_group) == 500 and all(len(splits) == 1 for splits in by_group.values())
    assert 30 < sum(splits == {"val"} for splits in by_group.values()) < 70


def test_added_documents_leave_the_others_in_their_splits():
    texts = [f"{i}" for i in range(100)]
    before = {text: name for name, text in DocumentSplit(ListSource(texts), val_fraction=0.3)}
    more = ListSource(["first", "", *reversed(texts), "last", *texts[:7], ""])
    after = {text: name for name, text in DocumentSplit(more, val_fraction=0.3)}
    assert before == {text: after[text] for text in texts} and "" not in after
    assert before != {text: name for name, text in DocumentSplit(ListSource(texts), seed=1)}


def test_no_text_and_fractions_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match="no text"):
        list(DocumentSplit(ListSource(["", ""])))
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match=rf"val_fraction .* in \(0, 1\), not {fraction}"):
            DocumentSplit(ListSource([]), val_fraction=fraction)


def test_validation_documents_of_their_own_are_all_held_out():
    source = ListSource(["a", "", "b"])
    source.held_out = ListSource(["c", "a"])
    pairs = [("train", "a"), ("train", "b"), ("val", "c"), ("val", "a")]
    assert list(DocumentSplit(source)) == pairs
    for options, key in (
        ({"val_fraction": 0.1}, "val_fraction=0.1"),
        ({"seed": 1}, "split_seed=1"),
    ):
        with pytest.raises(UserError, match=rf"data\.{key} chooses .* data\.val_paths names them"):
            DocumentSplit(source, **options)
    source.held_out = ListSource([""])
    with pytest.raises(UserError, match="no text"):
        list(DocumentSplit(source))


@pytest.mark.parametrize("groups", [2, 3, 20, 150])
@pytest.mark.parametrize("val_fraction", [1e-9, 0.05, 1 - 1e-9])
def test_any_number_of_groups_fills_both_splits(groups, val_fraction):
    texts = [f"{i % groups}/{i}" for i in range(300)]
    for seed in range(5):
        by_group = splits_of_groups(Projects(texts), val_fraction=val_fraction, seed=seed)
        assert all(len(splits) == 1 for splits in by_group.values())
        held_out = sum(splits == {"val"} for splits in by_group.values())
        assert 0 < held_out < groups
        assert {1e-9: held_out == 1, 1 - 1e-9: held_out == groups - 1}.get(val_fraction, True)


def test_a_corpus_of_one_group_is_cut_at_the_same_place_in_every_copy(caplog):
    text = "".join(f"line {i}\n" for i in range(100))
    with caplog.at_level(logging.INFO, logger="data_modules.splitting"):
        split = DocumentSplit(ListSource([text] * 3), val_fraction=0.1)
        (train,), (val,) = set(split.documents("train")), set(split.documents("val"))
    assert train + val == text and val.startswith("line ")
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.01)
    assert cut_point("x" * 100, 0.9) == 90 and cut_point("ab", 0.99) == 1
    assert cut_point("a\n" + "x" * 98, 0.9) == 90, "a line end in the first half"
    assert list(DocumentSplit(ListSource(["a"]))) == [("train", "a")]
    assert [record.getMessage() for record in caplog.records] == [
        "'listed' is one document, or one group: the last 10 % of each are for validation"
    ]
    project = DocumentSplit(Projects(["a/" + text, "a/" + 2 * text]), val_fraction=0.1)
    lengths = [len("".join(project.documents(name))) for name in ("train", "val")]
    assert lengths[1] / sum(lengths) == pytest.approx(0.1, abs=0.01)


def test_a_group_may_have_a_name_that_is_not_unicode():
    """As a file has whose name is not UTF-8."""

    class Files(ListSource):
        def grouped(self):
            return ((f"{text}\udcff", text) for text in self.documents())

    assert {text for _, text in DocumentSplit(Files(["a", "b"]))} == {"a", "b"}


def test_packages_of_the_standard_library_are_in_one_split():
    source = StdlibSource()
    documents = list(source.documents())
    assert [document for _, document in source.grouped()] == documents
    groups = dict(zip((name for name, _ in source.files), source.grouped(), strict=True))
    assert groups["json/decoder.py"][0] == groups["json/__init__.py"][0] == "json"
    assert groups["argparse.py"][0] == "argparse"
    by_package = splits_of_groups(source)
    assert len(by_package) > 150 and all(len(splits) == 1 for splits in by_package.values())
    held_out = list(DocumentSplit(source).documents("val"))
    assert len(held_out) >= 15 and sum(splits == {"val"} for splits in by_package.values()) >= 8
    assert 0.03 < sum(map(len, held_out)) / sum(map(len, documents)) < 0.1
