"""The report's curves of how far back models look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sweeps.report.lines import long_range
from sweeps.report.statistics import interval


def settings(*summaries: dict[str, float]) -> Any:
    """Two runs of one setting."""
    runs = [SimpleNamespace(summary=s) for s in summaries]

    def estimate(tag: str) -> Any:
        values = [s[tag] for s in summaries if tag in s]
        return SimpleNamespace(interval=interval(values) if values else None)

    one = SimpleNamespace(done=runs, estimate=estimate, name="D = 2", values={"mtp.depth": 2})
    return SimpleNamespace(all=[one], names=[one.name])


def test_a_curve_of_every_measure_with_its_interval() -> None:
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
    every = [*(tag for curve in tags.values() for tag in curve), *others]
    drawings = long_range(settings(dict.fromkeys(every, 0.25), dict.fromkeys(every, 0.75)))
    assert [drawing.name for drawing in drawings] == list(tags)
    for drawing in drawings:
        assert drawing.figure is not None
        (container,) = drawing.figure.axes[0].containers
        line = container[0]
        assert list(line.get_xdata()) == list(tags[drawing.name].values())
        assert set(line.get_ydata()) == {0.5}
        (segments,) = container[2]
        assert all(s[1, 1] - s[0, 1] > 1 for s in segments.get_segments())


def test_places_that_double_are_equally_far_apart_and_written_plainly() -> None:
    tags = ["val/loss_position_1", "val/loss_position_2-3", "val/loss_position_512-1023"]
    (drawing,) = long_range(settings(dict.fromkeys(tags, 0.25)))
    assert drawing.figure is not None
    (axes,) = drawing.figure.axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "512"]


def test_without_the_callback_there_is_no_figure() -> None:
    assert long_range(settings({"val/loss_depth_0": 1.0})) == []
