"""Beside a comparison of windows or tokenizers stands how many bytes of context each model had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from sweeps.report.__main__ import report
from sweeps.report.collect import collect
from sweeps.report.comparable import contexts
from sweeps.report.read import read_sweep
from tests.sweeps.fixture_runs import evaluated, write_run


def tokenized(name: str, rate: float | None = None) -> dict[str, Any]:
    """The data of a run: its tokenizer, and bytes per token of the validation split."""
    split = {} if rate is None else {"val": {"bytes_per_token": rate}}
    return {"data": {"fingerprint": name * 32, "tokenizer": {"fingerprint": name * 32}, **split}}


def of(folder: Path, *runs: tuple[str, int | None, dict[str, Any]]) -> list[str]:
    """What is said of runs with these tokenizers, windows and summaries."""
    for kind, seq_len, summary in runs:
        config = {"tokenizer.kind": kind, "data.seq_len": seq_len}
        write_run(folder / f"{kind}_{seq_len}", config, summary=summary)
    return contexts(collect([read_sweep(folder)]).all)


def test_equal_windows_of_tokens_are_unequal_in_bytes(tmp_path: Path) -> None:
    """256 x 1 byte against 256 x 3.9 bytes; the evaluated text's rate goes before the split's."""
    text = evaluated("a" * 32, bytes=3_900, tokens=1_000)
    said = of(
        tmp_path,
        ("byte", 256, {**tokenized("t", 9.0), **evaluated("a" * 32, bytes=3_900, tokens=3_900)}),
        ("bpe", 256, {**tokenized("u", 9.0), **text}),
    )
    assert len(said) == 1 and said[0].startswith("The context is not equal")
    assert "256 tokens x 1.00 bytes = 256 bytes with tokenizer.kind=byte" in said[0]
    assert "256 tokens x 3.90 bytes = 998 bytes with tokenizer.kind=bpe" in said[0]
    html = report([tmp_path])[0].read_text()
    assert html.count("The context is not equal") == 3  # notes and both tables


def test_windows_of_equal_bytes_are_called_so(tmp_path: Path) -> None:
    byte, bpe = tokenized("t", 1.0), tokenized("u", 4.0)
    said = of(tmp_path / "a", ("byte", 1000, byte), ("bpe", 256, bpe))
    assert len(said) == 1 and "equal in bytes, within 5 %" in said[0]
    assert "= 1,000 bytes" in said[0] and "= 1,024 bytes" in said[0]
    said = of(tmp_path / "b", ("byte", 970, byte), ("bpe", 256, bpe))  # 5.6 % less
    assert said[0].startswith("The context is not equal")


def test_windows_of_one_tokenizer(tmp_path: Path) -> None:
    rate = tokenized("t", 2.0)
    assert of(tmp_path / "same", ("byte", 128, rate)) == []
    (said,) = of(tmp_path / "two", ("byte", 128, rate), ("byte", 256, rate))
    assert "not equal" in said and "128 tokens x 2.00 bytes = 256 bytes" in said


def test_a_context_that_nobody_knows(tmp_path: Path) -> None:
    (said,) = of(tmp_path, ("byte", 128, tokenized("t", 1.0)), ("bpe", 128, tokenized("u")))
    assert said.startswith("Whether the context is equal in bytes is unknown")
    assert "128 tokens x unknown bytes" in said


def test_only_what_is_compared_has_a_context_to_equalise(tmp_path: Path) -> None:
    runs = [
        ("byte", 128, {**tokenized("t", 1.0), **evaluated("a" * 32)}),
        ("bpe", 128, {**tokenized("u", 4.0), **evaluated("b" * 32)}),
    ]
    assert of(tmp_path, *runs) == []
