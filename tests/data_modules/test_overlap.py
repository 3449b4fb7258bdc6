"""The share of validation lines that stand in training documents, against brute force."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules.overlap import LineOverlap


def line(i: int) -> str:
    return f"line {i} ".ljust(31, ".") + "!"


def measured(documents: list[tuple[str, str]]) -> float | None:
    overlap = LineOverlap()
    for split, document in documents:
        overlap.add(split, document)
    return overlap.share()


def brute_force(documents: list[tuple[str, str]]) -> float | None:
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for split, document in documents:
        lines[split] += [t.strip() for t in document.splitlines() if len(t.strip()) >= 32]
    known = set(lines["train"])
    seen = [text in known for text in lines["val"]]
    return sum(seen) / len(seen) if seen else None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["train", "val"]),
            st.lists(st.sampled_from(["short", "", *map(line, range(6))]), max_size=8),
        ),
        max_size=8,
    ),
    st.sampled_from(["\n", "\r\n", " \n\t"]),
)
def test_share_equals_brute_force(documents, end):
    joined = [(split, end.join(lines)) for split, lines in documents]
    assert measured(joined) == brute_force(joined)


def test_a_line_counts_from_32_characters_on_and_as_often_as_it_stands():
    known, new = "k" * 32, "n" * 32
    assert measured([("val", f"  {known}\n{known}\n{new}\n{new}\n"), ("train", known)]) == 0.5
    assert measured([("train", known), ("val", "k" * 31)]) is None
    assert measured([("train", known)]) is None and measured([]) is None


def test_a_sample_keeps_within_its_limit_and_is_unbiased(monkeypatch):
    monkeypatch.setattr("data_modules.overlap.LIMIT", 1000)
    order = random.Random(0)
    errors = []
    for corpus in range(8):
        at = 10_000 * corpus
        # 3 of 10 validation lines, some of them repeated, among 9000 training lines.
        train = [line(at + i) for i in range(9000)]
        val = [line(at + i) for i in (*range(600), *range(9000, 9700), *range(9000, 9700))]
        texts = [("train", text) for text in train] + [("val", text) for text in val]
        exact = brute_force(texts)
        assert exact == pytest.approx(0.3)
        order.shuffle(texts)
        overlap = LineOverlap()
        for split, text in texts:
            overlap.add(split, text)
            assert max(map(len, overlap._counts.values())) <= 1000
        assert len(overlap._counts["train"]) > 300 and overlap.share() != exact
        # Which lines are in the sample is decided by the lines, not by their order.
        assert overlap.share() == measured(sorted(texts))
        whole = [(name, "\n".join(t for s, t in texts if s == name)) for name in ("val", "train")]
        assert overlap.share() == measured(whole)
        errors.append(overlap.share() - exact)
    mean = sum(errors) / len(errors)
    spread = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert 0 < spread < 0.1 and abs(mean) < 3 * spread / len(errors) ** 0.5
