"""Reports of tasks: shares of seeds that solve, times to solve, and the sentences about them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_lightning.run.solved import EXACT
from sweeps.report.__main__ import main, report
from sweeps.report.chart import styled
from sweeps.report.compare import (
    OTHER_DATA,
    compare,
    smallest_p,
    solved_share,
    time_to_solve,
    wait_of,
)
from sweeps.report.figures import draw
from sweeps.report.read import RunRecord
from sweeps.report.statistics import Wait, holm, share_interval
from tests.sweeps.fixture_runs import depth_sweep, on_questions, task_run, write_run
from tests.sweeps.reported import (
    answer_of,
    cells,
    checked_page,
    csv_rows,
    drawings,
    notes_of,
    page_of,
    rows_of,
    settings_of,
    table_of,
)

EARLY, LATE, NEVER = (0.97, 0.99, 1.0), (0.4, 0.5, 0.96), (0.3, 0.5, 0.5)
FELL = (0.2, 0.98, 0.6)


def sweep(folder: Path, seeds: dict[int, tuple[tuple[float, ...], ...]], **options: Any) -> Path:
    """For every depth the exact match of seeds 0, 1, .. at steps 10, 20, .."""
    for depth, curves in seeds.items():
        for seed, rights in enumerate(curves):
            config = {"mtp.depth": depth, "seed": seed}
            task_run(folder / f"d{depth}_s{seed}", config, rights=rights, **options)
    return folder


def test_a_seed_solves_if_its_exact_match_is_above_the_level(tmp_path: Path) -> None:
    settings = settings_of(sweep(tmp_path, {0: (NEVER, NEVER, FELL), 1: (EARLY, LATE, NEVER)}))
    assert settings.is_task
    shares = [solved_share(s, settings.level) for s in settings.all]
    assert [(s.count, s.n) for s in shares if s] == [(0, 3), (2, 3)]
    assert shares[0] and shares[0].high == pytest.approx(1 - 0.025 ** (1 / 3))
    # The level itself is not above the level.
    assert [s.count for one in settings.all if (s := solved_share(one, 0.96))] == [0, 1]
    assert [s.count for one in settings.all if (s := solved_share(one, 0.5))] == [1, 2]
    # This also holds for values logged in single precision.
    logged = float(np.float32(0.98))
    (single,) = settings_of(sweep(tmp_path / "single", {0: ((logged, logged, logged),)})).all
    share = solved_share(single, 0.98)
    assert logged > 0.98 and share and share.count == 0


def test_unfinished_and_failed_runs_are_censored_and_in_no_share(tmp_path: Path) -> None:
    sweep(tmp_path, {0: (LATE, NEVER)})
    task_run(tmp_path / "runs", {"mtp.depth": 0, "seed": 2}, rights=(0.1, 0.2), done=False)
    status = {"state": "failed", "reason": "it broke"}
    config = {"mtp.depth": 0, "seed": 3}
    task_run(tmp_path / "fails", config, rights=(0.99,), done=False, status=status)
    task_run(tmp_path / "starts", {"mtp.depth": 0, "seed": 4}, rights=(), done=False)
    (setting,) = settings_of(tmp_path).all
    share, curve = solved_share(setting, 0.95), time_to_solve(setting, 0.95)
    assert (share.count, share.n) == (1, 2) and list(setting.runs) != setting.done
    assert (curve.n, curve.ended, curve.censored) == (4, 2, (20, 30))
    # 3/4 after step 10; one run has its last validation at 20; one of the other two solves at 30.
    assert curve.shares == pytest.approx((3 / 4, 3 / 4, 3 / 8)) and curve.median == 30


def test_validations_without_a_number_do_not_count(tmp_path: Path) -> None:
    nan = math.nan
    for rows, level, wait in (
        ([{"step": 10, EXACT: 0.1}, {"step": 20, EXACT: nan}], 0.95, Wait(10, False)),
        ([{"step": 10, EXACT: nan}], 0.95, None),
        ([{"step": 10, EXACT: 0.5}], 0.5, Wait(10, False)),
        ([{"step": 10, "val/loss_depth_0": 1.0}], 0.9, None),
    ):
        assert wait_of(RunRecord(folder=tmp_path, rows=rows), level) == wait
    settings = settings_of(sweep(tmp_path, {0: (LATE, NEVER), 1: (LATE, (0.5, nan))}))
    assert [solved_share(s, 0.95) is None for s in settings.all] == [False, True]
    (comparison,) = compare(settings)
    assert (comparison.verdict, comparison.solved) == ("no test: a share is missing", None)
    assert "not a number in 1 of 2" in [cell.gap for cell in cells(tmp_path)]


def test_shares_are_compared_by_fishers_test_with_holms_correction(tmp_path: Path) -> None:
    seeds = {0: 5 * (NEVER,), 1: 5 * (LATE,), 2: (LATE, *(4 * (NEVER,))), 3: 5 * (NEVER,)}
    settings = settings_of(sweep(tmp_path, seeds))
    comparisons = compare(settings)
    assert [c.against.label for c in comparisons] == 3 * ["mtp.depth=0"]
    p = [2 / 252, 1.0, 1.0]  # five and one of ten solve, none of ten
    assert [c.solved.p for c in comparisons if c.solved] == pytest.approx(p)
    assert [c.adjusted for c in comparisons] == pytest.approx(holm(p))
    assert [c.verdict for c in comparisons] == ["beyond noise", "within noise", "within noise"]
    assert smallest_p(comparisons) == pytest.approx(3 * 2 / 252)
    (other,) = {c.reference.label for c in compare(settings, reference="mtp.depth=1")}
    assert other == "mtp.depth=1"


SOLVES = "solves the task (a final val/exact_match above 0.95)"
# Curves, and parts of the answer; a part after "not" is missing from it.
ANSWERS = {
    "all of two settings": (
        {0: 5 * (NEVER,), 1: 5 * (LATE,), 2: 5 * (EARLY,)},
        f"The largest share of seeds {SOLVES} with D = 1: 5 of 5 seeds (95 % interval 47.8 % to "
        "100.0 %); an equal share with D = 2.|"
        "Half of the seeds have solved it earliest by step 10, with D = 2 (Kapl|"
        "D = 1 has a larger share of seeds that solve than D = 0: 5 of 5 against 0 of 5, beyond "
        "noise (Fisher's exact test, unpaired, Holm's p = 0.016)|"
        "not loss|not t-test|not So few seeds",
    ),
    "three seeds": (
        {0: 3 * (NEVER,), 1: 3 * (LATE,)},
        "Fisher, 1 exact test, unpaired, smallest p after Holm's correction 0.10|"
        "These seeds are too few|the correction would be 0.10",
    ),
    "none": (
        {0: 4 * (NEVER,), 1: 4 * (NEVER,)},
        f"No seed {SOLVES}: 0 of 4 seeds (95 % interval 0.0 % to 60.2 %) with D = 0; the same "
        "with D = 1.|Holm's correction 1.00|not Half of the seeds",
    ),
    "every": (
        {0: 4 * (EARLY,), 1: 4 * (EARLY,)},
        "4 of 4 seeds (95 % interval 39.8 % to 100.0 %); an equal share with",
    ),
    "one seed": (
        {0: (LATE,), 1: (NEVER,)},
        "1 of 1 seed (95 % interval 2.5 % to 100.0 %)|"
        "No difference can be tested: that takes two seeds of each setting, as by seed=0,1.",
    ),
    "one setting": ({0: (LATE,)}, f"{SOLVES} with all runs."),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_answer_has_shares_times_and_fishers_test(tmp_path: Path, case: str) -> None:
    curves, parts = ANSWERS[case]
    settings = settings_of(sweep(tmp_path, curves))
    for part in parts.split("|"):
        assert (part.removeprefix("not ") in answer_of(settings)) != part.startswith("not ")
    with styled():
        assert "gains" not in {drawing.name for drawing in draw(settings, compare(settings))}
    late = any(cell.beside == "not by step 30" for cell in cells(tmp_path))
    assert late == any(NEVER in of_depth for of_depth in curves.values())
    if case == "one seed":
        (comparison,) = compare(settings)
        assert comparison.verdict == "one seed: no test" and smallest_p([comparison]) is None


def test_a_report_without_a_finished_run_has_no_answer(tmp_path: Path) -> None:
    path, sentences, _ = report([sweep(tmp_path, {0: (LATE,)}, done=False)])
    assert sentences[-1] == "No setting has a finished run with val/exact_match yet."
    assert "Seeds that solve: no finished run has val/exact_match." in path.read_text()


def test_settings_with_other_questions_are_not_compared(tmp_path: Path) -> None:
    for length in (3, 4):
        for seed in range(4):
            config = {"data.task.length": length, "seed": seed, "mtp.depth": 0}
            evaluation = on_questions(str(length) * 32)
            matches = LATE if length == 3 else NEVER
            folder = tmp_path / f"{length}_{seed}"
            task_run(folder, config, rights=matches, chance=1 / length, summary=evaluation)
    (comparison,) = compare(settings := settings_of(tmp_path))
    assert comparison.verdict == OTHER_DATA and comparison.refused and comparison.solved is None
    text = answer_of(tmp_path)
    assert "different evaluation data" in text and "data.task.*" in text and "beyond" not in text
    assert "different text" not in page_of(tmp_path)
    axes = drawings(settings)["exact_match"].chart.axes
    chances = [line.get_ydata()[0] for line in axes.lines if line.get_label() == "chance"]
    assert chances == [1 / 4, 1 / 3]


def test_curves_have_means_seeds_and_chance(tmp_path: Path) -> None:
    axes = drawings(settings_of(sweep(tmp_path, {0: (LATE, NEVER)})))["exact_match"].chart.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["all runs"] == pytest.approx([0.35, 0.5, 0.73])
    assert set(lines["chance"]) == {0.5} and set(lines["solved"]) == {0.95}
    thin = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 0.7]
    assert thin == [list(LATE), list(NEVER)]
    xs = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 3}
    assert xs == {(10, 20, 30)}


def test_figures_show_shares_of_seeds_and_times_to_solve(tmp_path: Path) -> None:
    sweep(tmp_path, {0: 5 * (NEVER,), 1: (EARLY, EARLY, LATE, NEVER, FELL)})
    figures = drawings(tmp_path)
    axes = figures["solved"].chart.axes
    bars = {}
    for container in axes.containers:
        (point, _, (reach,)) = container.lines
        ends = reach.get_segments()[0][:, 0]
        bars[container.get_label()] = (point.get_xdata()[0], *ends)
    assert bars["D = 0"] == pytest.approx((0, 0, 1 - 0.025**0.2))
    assert bars["D = 1"] == pytest.approx((0.6, 0.1466, 0.9473), abs=1e-4)  # a table's
    assert [text.get_text() for text in axes.get_yticklabels()] == ["D = 1", "D = 0"]
    axes = figures["time_to_solve"].chart.axes
    curve = {line.get_label(): line for line in axes.lines}["D = 1"]
    assert list(curve.get_xdata()) == [0, 10, 20, 30]
    assert list(curve.get_ydata()) == pytest.approx([1, 0.6, 0.4, 0.2])
    assert curve.get_drawstyle() == "steps-post"
    assert "differences" not in figures


TAGS = {
    "val/accuracy_position_1": 0.9, "val/forced_accuracy_position_1": 0.95,
    "val/accuracy_position_2": 0.8, "val/forced_accuracy_position_2": 0.85,
    "val/accuracy_position_17-20": 0.5, "val/accuracy_period_1": 0.7,
    "val/accuracy_period_2-3": 0.6, "val/accuracy_distance_16-31": 0.4, "val/accuracy_depth_0": 0.1,
    "val/accuracy_repeat_1-64": 0.1, "val/accuracy_random_repeat_8": 0.1,
    "val/longer/exact_match": 0.25, "val/longer/accuracy_position_1": 0.2,
}  # fmt: skip


def test_accuracy_is_drawn_by_position_and_by_group(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.1)):
        summary = {tag: value + shift for tag, value in TAGS.items()}
        task_run(tmp_path / str(seed), {"seed": seed}, rights=LATE, summary=summary)
    figures = drawings(tmp_path)
    names = [n for n in figures if n.startswith("accuracy_")]
    assert names == ["accuracy_position", "accuracy_distance", "accuracy_period"]
    wanted = {
        "accuracy_position": ([1, 2, 17], [0.95, 0.85, 0.55]),
        "accuracy_period": ([1, 2], [0.75, 0.65]),
        "accuracy_distance": ([16], [0.45]),
    }
    for name, (xs, ys) in wanted.items():
        axes = figures[name].chart.axes
        (container,) = axes.containers
        assert list(container.lines[0].get_xdata()) == xs
        assert list(container.lines[0].get_ydata()) == pytest.approx(ys)
        (low, high) = container.lines[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx(share_interval([ys[0] - 0.05, ys[0] + 0.05]).ends)
    axes = figures["accuracy_position"].chart.axes
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(crosses[0].get_ydata()) == pytest.approx([1.0, 0.9])
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "17"]


def test_the_table_has_shares_medians_and_other_sets(tmp_path: Path) -> None:
    summary = {"val/longer/exact_match": 0.25, "val/wider/exact_match": 0.5}
    summary |= {"val/creativity": 0.125}
    sweep(tmp_path, {0: 5 * (NEVER,), 1: (EARLY, LATE, LATE, LATE, NEVER)}, summary=summary)
    html = page_of(tmp_path)
    table = table_of(html, "settings")
    heads = re.findall(r"<button type=\"button\">([^<]*)</button>(?:<small>([^<]*))?", table)
    wanted = "Solved of seeds|Median time steps to solve|Exact match of answers|"
    wanted += "Exact match on longer|Exact match on wider|Creativity of sampled answers"
    assert "|".join(map(" ".join, heads[2:8])) == wanted
    zero, one = rows_of(table)
    assert 'data-sort="0.8">80.0 %' in one and "4 of 5: 28.4 % to 99.5 %" in one
    assert 'data-sort="30' in one and "25.0 %" in one and "not by step" not in one
    assert "12.5 %" in one
    assert "0 of 5: 0.0 % to 52.2 %" in zero and "not by step 30" in zero
    table = table_of(html, "differences")
    assert "unpaired" in table and "Fisher" in table and "t-test" not in html
    assert "4 of 5<br>" in table and "0 of 5<br>" in table and ">0.048<" in table


def test_a_run_that_stopped_when_solved_counts_its_own_flops(tmp_path: Path) -> None:
    for name, steps, flops in (("short", 20, 2e9), ("whole", 40, 4e9)):
        early = {"stopped_early": True, "solved": True, "solved_at": {"step": steps}}
        summary = {"step": steps, "flops": flops} | (early if name == "short" else {})
        config = {"trainer.max_steps": 40, "mtp.depth": int(name == "short")}
        rights = (0.1,) * (steps // 10 - 1) + (1.0,)
        task_run(tmp_path / name, config, rights=rights, summary=summary)
    full, short = settings_of(tmp_path).all
    for setting, steps, flops in ((full, 40, 4e9), (short, 20, 2e9)):
        (run,) = setting.done
        assert wait_of(run, 0.95) == Wait(steps, True)
        assert setting.estimate("flops").interval.mean == flops


@pytest.mark.usefixtures("real_figures")
def test_the_page_of_a_task_is_complete(tmp_path: Path) -> None:
    sweep(tmp_path, {0: (NEVER, LATE), 1: (EARLY, LATE)}, summary=TAGS)
    report([tmp_path])
    checked_page(tmp_path)
    figures = [*(tmp_path / "figures").glob("accuracy_*.svg")]
    assert len(figures) == 3 and not any("mathdefault" in svg.read_text() for svg in figures)


def test_runs_csv_says_when_a_run_solved(tmp_path: Path) -> None:
    rows = csv_rows(sweep(tmp_path, {0: (EARLY, LATE, NEVER)}))
    assert [row["solved_at_step"] for row in rows] == ["10", "30", ""]
    assert [float(row[EXACT]) for row in rows] == [1.0, 0.96, 0.5]


def test_the_option_solved_sets_the_level(tmp_path, capsys):
    sweep(tmp_path, {0: (NEVER, NEVER)})
    main([str(tmp_path), "--solved", "0.4"])
    output = capsys.readouterr().out
    assert "2 of 2 seeds" in output and "above 0.4" in output
    assert f"{tmp_path} --solved 0.4</code>" in (tmp_path / "report.html").read_text()
    for level in ("1", "-0.1", "nan"):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--solved", level])
        message = f"--solved {float(level):g} must be at least 0 and below 1"
        assert message in capsys.readouterr().err


def test_text_runs_and_runs_without_their_curve_are_noted(tmp_path: Path) -> None:
    sweep(tmp_path, {0: (LATE, NEVER)})
    (tmp_path / "d0_s0" / "metrics.csv").unlink()
    write_run(tmp_path / "text", {"mtp.depth": 3})
    notes = notes_of(tmp_path)
    assert "The comparison leaves out settings without val/exact_match: D = 3." in notes
    assert "unknown where no validation with val/exact_match was logged: d0_s0." in notes
    share = solved_share(settings_of(tmp_path).all[0], 0.95)
    assert (share.count, share.n) == (1, 2)
    assert report([tmp_path])[0].is_file()


def test_a_report_of_text_runs_has_no_words_of_tasks(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1, 2.3), 1: (1.9, 2.0, 2.199)})
    assert not settings_of(tmp_path).is_task
    path, sentences, _ = report([tmp_path], level=0.5)
    assert "lowest validation loss" in " ".join(sentences)
    # The figures may be copies of another report's (conftest.py).
    html = re.sub(r"<figure.*?</figure>", "", path.read_text(), flags=re.DOTALL)
    assert "paired t-test" in html and "solve" not in html and "Fisher" not in html
    assert "solved_at_step" not in (tmp_path / "runs.csv").read_text()
    assert json.loads((tmp_path / "depth-0_seed-0" / "summary.json").read_text())["seed"] == 0
