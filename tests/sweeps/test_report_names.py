"""What a report calls settings in figures and titles."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from sweeps.report.__main__ import report
from sweeps.report.metrics import BY_TAG, LOSS
from sweeps.report.names import axis_of, joined, name_of, question
from tests.sweeps.fixture_runs import depth_sweep


def test_keys_and_values_have_names() -> None:
    assert name_of("mtp", "linear") == "linear heads" and name_of("mtp", "none") == "no MTP"
    assert name_of("mtp.depth", "2") == "D = 2" and axis_of("mtp.depth") == "D"
    assert name_of("mtp.own", "x") == "mtp.own=x" and axis_of("mtp.own") == "mtp.own"
    assert [joined(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    asked = question(["mtp.depth", "mtp_lambda"], BY_TAG[LOSS], task=False)
    assert asked == "Which D and lambda give the lowest loss in nats per token?"
    assert question(["mtp"], None, task=True) == "Which kind of head solves the task?"
    assert question([], BY_TAG[LOSS], task=False) == ""


def test_a_report_begins_with_its_question(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1, 2.2), 1: (1.9, 2.05, 2.0)})
    html = report([tmp_path])[0].read_text(encoding="utf-8")
    assert "<h1>Which D gives the lowest loss in nats per token?</h1>" in html
    assert f"<code>mtp-lightning report {tmp_path}</code>" in html
    first = html.index('id="figure-')
    assert html[first:].startswith('id="figure-differences"')
    assert "difference in nats per token (lower is better)" in html
