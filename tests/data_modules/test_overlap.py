"""The share of validation lines that also occur in training, against brute force."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_modules.overlap import LineOverlap


def line(i: int) -> str:
    return f"line {i} ".ljust(31, ".") + "!"


def share_of(documents: list[tuple[str, str]]) -> float | None:
    overlap = LineOverlap()
    for split, document in documents:
        overlap.add(split, document)
    return overlap.share()


def brute_force(documents: list[tuple[str, str]]) -> float | None:
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for split, document in documents:
        lines[split] += [t.strip() for t in document.splitlines() if len(t.strip()) >= 32]
    train = set(lines["train"])
    in_training = [text in train for text in lines["val"]]
    return sum(in_training) / len(in_training) if in_training else None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["train", "val"]),
            st.lists(st.sampled_from(["k" * 31, "", *map(line, range(6))]), max_size=8),
        ),
        max_size=8,
    ),
    st.sampled_from(["\n", "\r\n", " \n\t"]),
)
def test_share_equals_brute_force(documents, end):
    joined = [(split, end.join(lines)) for split, lines in documents]
    assert share_of(joined) == brute_force(joined)


def test_a_sampled_share_stays_within_its_limit_and_is_unbiased(monkeypatch):
    monkeypatch.setattr("data_modules.overlap.LIMIT", 1000)
    order = random.Random(0)
    errors = []
    for corpus in range(8):
        first = 10_000 * corpus
        # 3 of 10 validation lines, some of them repeated, among 9000 training lines.
        train = [line(first + i) for i in range(9000)]
        val = [line(first + i) for i in (*range(600), *range(9000, 9700), *range(9000, 9700))]
        texts = [("train", text) for text in train] + [("val", text) for text in val]
        exact = brute_force(texts)
        assert exact == pytest.approx(0.3)
        order.shuffle(texts)
        overlap = LineOverlap()
        for split, text in texts:
            overlap.add(split, text)
            assert max(map(len, overlap._counts.values())) <= 1000
        assert len(overlap._counts["train"]) > 300 and overlap.share() != exact
        # Which lines are in the sample is decided by the lines, not by their order or documents.
        whole = [
            (name, "\n".join(sorted(t for s, t in texts if s == name))) for name in ("val", "train")
        ]
        assert overlap.share() == share_of(whole)
        errors.append(overlap.share() - exact)
    mean = sum(errors) / len(errors)
    spread = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert 0 < spread < 0.1 and abs(mean) < 3 * spread / len(errors) ** 0.5
