"""The figure of decoding shows the stored results of every processor."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.decoding_figure import best_of, digest, draw
from mtp_lightning.paths import ROOT
from sweeps.claims.pages import measured_heads

pytest.importorskip("matplotlib")


def test_every_processor_is_drawn() -> None:
    results = measured_heads(ROOT)
    said = " ".join(ElementTree.fromstring(draw(results)).itertext())
    for result in results:
        rows = [row for row in result["rows"] if row["temperature"] == 0]
        gains = [row[best_of(rows)]["over_plain_cpu"] for row in rows]
        assert result["processor"] in said
        assert f"drafts make {min(gains):.2f} to {max(gains):.2f} x plain" in said
        for row in rows:
            assert f"{row['plain']['tokens_per_cpu_second']:.0f}" in said


def test_the_page_shows_the_stored_results() -> None:
    assert digest(measured_heads(ROOT)) in (ROOT / "docs/images/smollm2_heads.svg").read_text(
        "utf-8"
    )


def test_a_side_that_was_not_measured_has_no_bar_and_no_name() -> None:
    way = {"tokens_per_cpu_second": 10.0, "over_plain_cpu": 1.0}
    row = {
        "kind": "code",
        "temperature": 0,
        "plain": way,
        "drafts_1": way | {"over_plain_cpu": 1.5},
    }
    result = {"processor": "One", "rows": [row | {"drafts_2": way}]}
    said = " ".join(ElementTree.fromstring(draw([result])).itertext())
    assert "1.50 to 1.50" in said and "llama.cpp" not in said and "reading" not in said
    theirs = {"rows": [row | {"llama.cpp": way | {"tokens_per_cpu_second": 77.0}}]}
    said = " ".join(
        ElementTree.fromstring(draw([result | theirs | {"memory_limit": 90.0}])).itertext()
    )
    assert "llama.cpp" in said and "77" in said and "reading the weights" in said
