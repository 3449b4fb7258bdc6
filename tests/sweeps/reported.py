"""Reports of folders of runs, and parts of their pages."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeps.report.__main__ import report
from sweeps.report.chart import styled
from sweeps.report.collect import collect
from sweeps.report.compare import Comparison, compare
from sweeps.report.drawing import Drawing
from sweeps.report.figures import draw
from sweeps.report.findings import answer, caveats
from sweeps.report.page import runs_csv
from sweeps.report.read import read_sweep
from sweeps.report.settings import Settings
from sweeps.report.tables import TableCell, of_settings


def settings_of(*folders: Path, **options: Any) -> Settings:
    """The settings of the runs in folders; several folders name their runs."""
    names = [folder.name if len(folders) > 1 else "" for folder in folders]
    sweeps = [read_sweep(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    return collect(sweeps, **options)


def run_counts(settings: Settings) -> list[tuple[str, int, int]]:
    """The label, the finished and the planned runs of every setting."""
    return [(one.label, len(one.done), one.planned) for one in settings.all]


def drawings(source: Path | Settings, comparisons: Sequence[Comparison] = ()) -> dict[str, Drawing]:
    """All figures of a report of a folder or of settings, by name."""
    settings = settings_of(source) if isinstance(source, Path) else source
    with styled():
        return {drawing.name: drawing for drawing in draw(settings, comparisons)}


def answer_of(source: Path | Settings) -> str:
    """The report's answer for a folder, or for settings."""
    settings = settings_of(source) if isinstance(source, Path) else source
    return " ".join(answer(settings, compare(settings)))


def notes_of(folder: Path) -> str:
    """The report's caveats, one per line."""
    return "\n".join(caveats(settings_of(folder)))


def csv_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of ``runs.csv``."""
    text = runs_csv(settings_of(folder))
    return list(csv.DictReader(text.splitlines()))


def page_of(folder: Path, **options: Any) -> str:
    """The HTML of a report that is made of a folder."""
    return report([folder], **options)[0].read_text(encoding="utf-8")


def checked_page(folder: Path) -> str:
    """The page of a report in a folder, after checks that its parts fit together."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 20
    references = re.findall(r'(?:xlink:href="|url\()#([^")]+)', html)
    assert references and set(references) <= set(ids)
    assert html.count("<figure") == len(list((folder / "figures").glob("*.png")))
    assert html.count('scope="col"') == html.count('aria-sort="none"')
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        columns = table.count('scope="col"')
        assert all(len(re.findall(r"<t[hd]\b", row)) == columns for row in rows_of(table))
    return html


def table_of(html: str, name: str) -> str:
    """The part of a page with one of its tables."""
    return html.split(f'<h2 id="{name}">')[1].split("</table>")[0]


def rows_of(table: str) -> list[str]:
    """The rows of a table's body."""
    return re.findall(r'<tr>\s*<th scope="row".*?</tr>', table, re.DOTALL)


def cells(folder: Path) -> list[TableCell]:
    """All cells of the table of settings."""
    return [cell for row in of_settings(settings_of(folder), []).rows for cell in row]
