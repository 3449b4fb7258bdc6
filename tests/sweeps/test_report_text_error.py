"""The text's own error stands beside the interval over seeds, and is not taken for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from sweeps.report.__main__ import report
from sweeps.report.collect import collect
from sweeps.report.comparable import error_of_text, text_errors
from sweeps.report.metrics import BITS_ERROR
from sweeps.report.read import read_sweep
from tests.sweeps.fixture_runs import evaluated, write_run

NOT = "it is not the error of a difference between runs on the same text"


def sweep(folder: Path, errors: dict[int, tuple[float | None, ...]], **more: Any) -> Path:
    """Depths with the text's errors of their seeds."""
    for depth, values in errors.items():
        for seed, error in enumerate(values):
            write_run(
                folder / f"d{depth}_s{seed}",
                {"mtp.depth": depth, "seed": seed},
                loss=2.0 - 0.1 * depth + 0.02 * seed,
                summary={BITS_ERROR: error, **evaluated("a" * 32), **more},
            )
    return folder


def test_it_is_the_mean_over_seeds(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {0: (0.010, 0.012), 1: (0.02, 0.02), 2: (0.5, None)})
    settings = collect([read_sweep(folder)])
    assert [error_of_text(s) for s in settings.all] == [pytest.approx(0.011), 0.02, None]
    text = text_errors(settings.all)
    assert "The text's own error in bits per byte is 0.0110 to 0.0200" in text and NOT in text


def test_the_table_has_both_errors_apart(tmp_path: Path) -> None:
    html = report([sweep(tmp_path, {0: (0.0101, 0.0121), 1: (0.02, 0.02)})])[0].read_text()
    cells = re.findall(
        r"<td[^>]*>([\d.]+) <span class=\"half\">± ([\d.]+)</span><br>"
        r'<span class="half">text: s.e. ([\d.]+)</span>',
        html,
    )
    # 1.0 and 1.01 bits: the interval over seeds is t(1) x 0.005.
    assert cells == [("1.0050", "0.0635", "0.0111"), ("0.9550", "0.0635", "0.0200")]
    where = html.index('<h2 id="settings">')
    assert NOT in html[where : html.index("</caption>", where)]
    where = html.index('<h2 id="differences">')
    assert "text: s.e." not in html[where:].split("</table>")[0]


def test_the_answer_in_bits_has_it_too(tmp_path: Path) -> None:
    sweep(tmp_path, {0: (0.01, 0.01)})
    data = {"fingerprint": "e" * 32, "tokenizer": {"fingerprint": "u" * 32}}
    sweep(tmp_path, {3: (0.02, 0.02)}, data=data)
    _, sentences = report([tmp_path])
    (best,) = [text for text in sentences if text.startswith("The lowest")]
    assert best.endswith("interval over 2 seeds); the text's own standard error is 0.0200.")


def test_runs_without_it_have_a_table_as_ever(tmp_path: Path) -> None:
    html = report([sweep(tmp_path, {0: (None, None)})])[0].read_text()
    assert "text: s.e." not in html and "bits per byte</small>" not in html
