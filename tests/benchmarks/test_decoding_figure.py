"""The figure of decoding speeds on every processor, from stored results."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from benchmarks.decoding_figure import best_of, digest, draw
from mtp_lightning.paths import ROOT
from sweeps.claims.pages import measured_heads

pytest.importorskip("matplotlib")


def text_of(results: list[dict[str, Any]]) -> str:
    """All text in the figure of these results."""
    return " ".join(ElementTree.fromstring(draw(results)).itertext())


def test_the_figure_shows_every_processor() -> None:
    results = measured_heads(ROOT)
    text = text_of(results)
    for result in results:
        rows = [row for row in result["rows"] if row["temperature"] == 0]
        gains = [row[best_of(rows)]["over_plain_cpu"] for row in rows]
        assert result["processor"] in text
        assert f"drafts make {min(gains):.2f} to {max(gains):.2f} x plain" in text
        for row in rows:
            assert f"{row['plain']['tokens_per_cpu_second']:.0f}" in text


def test_the_committed_figure_is_of_the_stored_results() -> None:
    figure = (ROOT / "docs/images/smollm2_heads.svg").read_text("utf-8")
    assert digest(measured_heads(ROOT)) in figure


def test_the_figure_leaves_out_sides_that_were_not_measured() -> None:
    speeds = {"tokens_per_cpu_second": 10.0, "over_plain_cpu": 1.0}
    row = {"kind": "code", "temperature": 0, "plain": speeds}
    row |= {"drafts_1": speeds | {"over_plain_cpu": 1.5}}
    result = {"processor": "One", "rows": [row | {"drafts_2": speeds}]}
    text = text_of([result])
    assert "1.50 to 1.50" in text and "llama.cpp" not in text and "reading" not in text
    with_llama_cpp = {"rows": [row | {"llama.cpp": speeds | {"tokens_per_cpu_second": 77.0}}]}
    text = text_of([result | with_llama_cpp | {"memory_limit": 90.0}])
    assert "llama.cpp" in text and "77" in text and "reading the weights" in text
