"""What a report says of floors, gaps and contexts."""

from __future__ import annotations

from pathlib import Path

from sweeps.report.collect import collect
from sweeps.report.metrics import is_share
from sweeps.report.read import read_sweep
from sweeps.report.tables import of_floors, of_settings
from tests.sweeps.fixture_runs import evaluated, write_run

VALUES = {
    "val/rejection_depth_1": 0.5,
    "val/recall_16_depth_1": 0.75,
    "val/floor_depth_1_order_0": 0.3,
    "val/gap_depth_1_order_0": 0.2,
    "val/rejection_depth_2": 0.6,
    "val/recall_16_depth_2": 0.625,
    "val/floor_depth_2_order_0": 0.4,
    "val/gap_depth_2_order_0": 0.2,
    "val/floor_depth_2_order_1": 0.1,
    "val/gap_depth_2_order_1": 0.5,
    "val/floor_share_depth_2_order_1": 1 / 6,
}


def test_a_row_a_setting_depth_and_order(tmp_path: Path) -> None:
    for depth in (1, 2):
        for seed in (0, 1):
            shift = 0.02 * seed
            own = {tag: value + shift for tag, value in VALUES.items() if f"depth_{depth}" in tag}
            own |= {"val/context_score": -0.5 - shift, "val/effective_context": 64.0}
            summary = {**evaluated("f" * 32), **own}
            folder = tmp_path / f"{depth}_{seed}"
            write_run(folder, {"mtp.depth": depth, "seed": seed}, summary=summary)
    settings = collect([read_sweep(tmp_path)])
    table = of_floors(settings)
    assert table is not None
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [
        ["mtp.depth=1", "1", "0", "51.0 %", "31.0 %", "21.0 %", "76.0 %"],
        ["mtp.depth=2", "2", "0", "61.0 %", "41.0 %", "21.0 %", "63.5 %"],
        ["mtp.depth=2", "2", "1", "61.0 %", "11.0 %", "51.0 %", "63.5 %"],
    ]
    assert all(cell.half for row in table.rows for cell in row[3:])
    head = [name for name, _ in of_settings(settings, []).head]
    assert {"Loss, late − early", "Effective context"} <= set(head)


def test_shares_are_known_and_differences_are_none() -> None:
    for tag in VALUES:
        assert is_share(tag) == ("gap" not in tag)
    assert not is_share("val/context_score")


def test_without_the_callback_there_is_no_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a", summary=evaluated("f" * 32))
    settings = collect([read_sweep(tmp_path)])
    assert of_floors(settings) is None
    assert "Effective context" not in [name for name, _ in of_settings(settings, []).head]
