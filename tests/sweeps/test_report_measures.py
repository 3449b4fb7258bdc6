"""Floors, gaps and contexts in a report, and its curves of the use of distant context."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from sweeps.report.lines import long_range
from sweeps.report.read import RunRecord
from sweeps.report.settings import Setting, Settings
from sweeps.report.tables import of_floors, of_settings
from tests.sweeps.fixture_runs import write_run
from tests.sweeps.reported import settings_of

VALUES = {
    "val/rejection_depth_1": 0.5, "val/recall_16_depth_1": 0.75, "val/floor_depth_1_order_0": 0.3,
    "val/gap_depth_1_order_0": 0.2, "val/rejection_depth_2": 0.6, "val/recall_16_depth_2": 0.625,
    "val/floor_depth_2_order_0": 0.4, "val/gap_depth_2_order_0": 0.2,
    "val/floor_depth_2_order_1": 0.1, "val/gap_depth_2_order_1": 0.5,
    "val/floor_share_depth_2_order_1": 1 / 6,
}  # fmt: skip


def test_the_floor_table_has_a_row_per_setting_depth_and_order(tmp_path: Path) -> None:
    for depth, seed in product((1, 2), (0, 1)):
        shift = 0.02 * seed
        summary = {tag: value + shift for tag, value in VALUES.items() if f"depth_{depth}" in tag}
        summary |= {"val/context_score": -0.5 - shift, "val/effective_context": 64.0}
        config = {"mtp.depth": depth, "seed": seed}
        write_run(tmp_path / f"{depth}_{seed}", config, summary=summary)
    settings = settings_of(tmp_path)
    table = of_floors(settings)
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [
        ["mtp.depth=1", "1", "0", "51.0 %", "31.0 %", "21.0 %", "76.0 %"],
        ["mtp.depth=2", "2", "0", "61.0 %", "41.0 %", "21.0 %", "63.5 %"],
        ["mtp.depth=2", "2", "1", "61.0 %", "11.0 %", "51.0 %", "63.5 %"],
    ]
    assert all(cell.half for row in table.rows for cell in row[3:])
    head = [name for name, _ in of_settings(settings, []).head]
    assert {"Loss, late − early", "Effective context"} <= set(head)


def test_without_the_callback_there_is_no_table_and_no_figure(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    without = settings_of(tmp_path)
    assert of_floors(without).rows == [] == long_range(without)
    assert "Effective context" not in [name for name, _ in of_settings(without, []).head]


# Curves of the use of distant context.


def settings(*summaries: dict[str, float]) -> Settings:
    """The runs of one setting."""
    runs = [
        RunRecord(folder=Path(str(i)), state="done", summary=summary, config={"seed": i})
        for i, summary in enumerate(summaries)
    ]
    one = Setting(values={"mtp.depth": 2}, config={}, runs=runs)
    return Settings(all=[one], varied=["mtp.depth"], left_out=[], sweeps=[])


def test_every_measure_of_distant_context_has_a_curve() -> None:
    tags = {
        "loss_position": {"val/loss_position_1": 1, "val/loss_position_2-3": 2},
        "context_gain": {"val/context_gain_8": 8},
        "natural_repeats": {"val/accuracy_no_repeat": 1, "val/accuracy_repeat_1-64": 64},
        "random_repeats": {"val/accuracy_random_repeat_8": 8},
        "acceptance_position": {"decode/acceptance_at_8-15": 8},
        "acceptance_entropy": {
            "decode/acceptance_entropy_0.5-1": 0.5,
            "decode/acceptance_entropy_4-up": 4,
        },
    }
    others = ["val/loss_position_1_depth_1", "val/context_gain_8_se", "val/share_no_repeat"]
    all_tags = [*(tag for curve in tags.values() for tag in curve), *others]
    drawings = long_range(settings(dict.fromkeys(all_tags, 0.25), dict.fromkeys(all_tags, 0.75)))
    assert [drawing.name for drawing in drawings] == list(tags)
    axes = drawings[0].chart.axes
    assert axes.get_xscale() == "log", "with plain labels"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    for drawing in drawings:
        (container,) = drawing.chart.axes.containers
        line = container[0]
        assert list(line.get_xdata()) == list(tags[drawing.name].values())
        assert set(line.get_ydata()) == {0.5}
        (segments,) = container[2]
        assert all(s[1, 1] - s[0, 1] > 0.9 for s in segments.get_segments())
