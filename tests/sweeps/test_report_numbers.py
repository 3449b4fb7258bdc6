"""Means, comparisons and the CSV of a report, against numbers by hand."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest

from sweeps.report.compare import FACT, compare, pareto, references
from sweeps.report.metrics import LOSS, number, p_value
from tests.sweeps.fixture_runs import NO_MTP, depth_sweep, write_plan, write_run
from tests.sweeps.reported import answer_of, csv_rows, settings_of


def test_settings_are_sorted_by_number_with_means_over_seeds(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1, 2.3), 2: (1.9, 2.0, 2.1), 10: (1.5, 1.6, 1.7)})
    settings = settings_of(tmp_path)
    assert settings.varied == ["mtp.depth"]
    means = {s.label: s.estimate(LOSS).interval.mean for s in settings.all}
    assert list(means) == ["mtp.depth=0", "mtp.depth=2", "mtp.depth=10"]
    assert list(means.values()) == pytest.approx([6.4 / 3, 2.0, 1.6])


def test_comparisons_tell_differences_from_noise(tmp_path: Path) -> None:
    # Depth 1 differs by -0.1, -0.1, -0.101, beyond noise; depth 2 by 0.1, -0.1, 0.05, within it.
    depth_sweep(tmp_path, {0: (2.0, 2.1, 2.3), 1: (1.9, 2.0, 2.199), 2: (2.1, 2.0, 2.35)})
    settings = settings_of(tmp_path)
    one, two = compare(settings)
    assert one.reference.label == two.reference.label == "mtp.depth=0"
    assert one.result.difference.mean == pytest.approx(-0.301 / 3)
    assert one.adjusted == pytest.approx(2 * one.result.p) and one.verdict == "beyond noise"
    assert two.adjusted == two.result.p and two.verdict == "within noise"
    text = answer_of(settings)
    assert "D = 1 is better than D = 0 by 0.1003 nats per token, beyond noise" in text
    assert "1 other difference is within noise" in text
    assert "D = 1 has the lowest validation loss for the next token: 2.0330 ±" in text
    assert "D is the number of tokens after the next one that a model is trained to predict" in text
    speed = "1.20 times as fast as plain decoding with D = 2 (95 % interval 1.20 to 1.20)"
    assert f"{speed}, the best of these settings, at 2.00 ± 0.00 tokens" in text


NOTHING = "The interval contains 1: neither a gain nor a loss is shown.\n"


@pytest.mark.parametrize(
    ("speeds", "sentence_end"),
    [
        ((1.25, 1.26), " pass.\n"),
        ((1.0, 1.3), NOTHING),
        ((0.6, 0.9), NOTHING),
        ((0.8, 0.81), " pass: no gain.\n"),
        ((0.9,), " pass: no gain.\n"),
    ],
)
def test_a_speed_is_judged_by_its_interval(tmp_path, speeds, sentence_end):
    for seed, speed in enumerate(speeds):
        summary = {"decode/tokens_per_step": 1.5, "decode/speedup": speed}
        write_run(tmp_path / str(seed), {"seed": seed, "mtp.depth": 1}, summary=summary)
    settings = settings_of(tmp_path)
    assert sentence_end in answer_of(settings) + "\n"
    mean = settings.all[0].estimate("decode/speedup").interval.mean
    assert mean == pytest.approx(math.prod(speeds) ** (1 / len(speeds))), "a geometric mean"


CONSTANT = {0: (2.0, 2.1, 2.3), 1: (1.9, 2.0, 2.2), 2: (2.0, 2.1, 2.3)}
# Losses, the verdicts, and parts of the answer; a part after "not" is missing from it.
VERDICTS = {
    "within noise": (
        {0: (2.0, 2.1), 1: (2.05, 2.0)},
        ["within noise"],
        "No setting's loss differs from its reference's by more than the seeds' noise|"
        "fewer than five seeds|not better than",
    ),
    "equal at every seed": (
        {**CONSTANT, 3: (2.1, 2.1, 2.2)},
        [FACT, "identical", "within noise"],
        "D = 1 differs from D = 0 by −0.1000 nats per token at all 3 seeds|"
        "D = 2 equals D = 0 at all 3 seeds|(1 paired t-test",
    ),
    "nothing to test": (
        CONSTANT,
        [FACT, "identical"],
        "so there is no variance to test|not No difference can be tested",
    ),
    "one seed": (
        {0: (2.0,), 1: (1.0,)},
        ["one seed: no test"],
        "No difference can be tested|one seed, no interval",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_differences_that_are_not_beyond_noise_are_not_called_gains(tmp_path, case):
    losses, verdicts, parts = VERDICTS[case]
    depth_sweep(tmp_path, losses)
    settings = settings_of(tmp_path)
    comparisons = compare(settings)
    assert [c.verdict for c in comparisons] == verdicts
    assert [c.adjusted is not None for c in comparisons] == [v == "within noise" for v in verdicts]
    assert not any(c.differs for c in comparisons)
    for part in parts.split("|"):
        assert (part.removeprefix("not ") in answer_of(settings)) != part.startswith("not ")


def test_a_grid_is_compared_with_plain_training_which_has_no_lambda(tmp_path: Path) -> None:
    for depth, weight in product((0, 1), (0.1, 0.3)):
        write_run(tmp_path / f"{depth}{weight}", {"mtp.depth": depth, "mtp_lambda": weight})
    settings = settings_of(tmp_path)
    assert [r.label for r in references(settings)] == ["mtp.depth=0"] * 3
    assert [c.against.label for c in compare(settings)] == ["mtp.depth=0"] * 2
    assert len(settings.left_out) == 1, "plain training with another lambda is the same run"
    chosen = references(settings, "mtp.depth=1, mtp_lambda=0.1")
    assert {r.label for r in chosen} == {"mtp.depth=1, mtp_lambda=0.1"}
    with pytest.raises(ValueError, match="'mtp.depth=1' names 2 settings: choose one of: mtp.de"):
        references(settings, "mtp.depth=1")
    with pytest.raises(ValueError, match="'mtp.depth=7' names no setting"):
        references(settings, "mtp.depth=7")


def test_heads_are_compared_with_plain_training_of_their_size(tmp_path: Path) -> None:
    for width in (32, 64):
        write_run(tmp_path / f"plain{width}", {"mtp.depth": 0, "model.d_model": width})
        for weight, shared in ((0.1, True), (0.3, False)):
            config = {"model.d_model": width, "mtp_lambda": weight, "mtp.share_layers": shared}
            write_run(tmp_path / f"{width}{weight}", config)
    write_run(tmp_path / "other", {"model.d_model": 64, "trainer.max_steps": 50})
    settings = settings_of(tmp_path)
    for setting, reference in zip(settings.all, references(settings), strict=True):
        assert reference.depth == 0
        assert setting.config["model.d_model"] == reference.config["model.d_model"]
    (longer,) = (c for c in compare(settings) if c.setting.config["trainer.max_steps"] == 50)
    assert longer.verdict == "not compared: no plain training with the same trainer.max_steps"
    plain = next(s.label for s in settings.all if s.depth == 0)
    (chosen,) = (
        c for c in compare(settings, reference=plain) if c.setting.config["trainer.max_steps"] == 50
    )
    assert chosen.verdict == "one seed: no test"


def test_plain_training_of_another_size_that_no_name_says_is_not_compared(tmp_path: Path) -> None:
    """A preset sets steps and model, and the names have only the preset."""
    wider = {"trainer.max_steps": 40, "model.d_model": 256}
    for preset, config in (("a", NO_MTP), ("b", wider)):
        for seed in (0, 1):
            status = {"state": "done", "overrides": [f"experiment={preset}", f"seed={seed}"]}
            write_run(tmp_path / f"{preset}{seed}", {**config, "seed": seed}, status=status)
    settings = settings_of(tmp_path)
    assert settings.names == ["a", "b"]
    (comparison,) = compare(settings)
    remark = "not compared: no plain training with the same model.d_model, trainer.max_steps"
    assert (comparison.setting.depth, comparison.verdict) == (1, remark)
    assert "tested: no plain training with the same model.d_model," in answer_of(tmp_path)


def test_the_pareto_front_by_hand() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 3.0), (4.0, 1.0), (5.0, 2.0), (2.0, 3.0)]
    assert pareto(points) == [True, True, False, True, False, True]


def test_runs_csv_has_every_number_to_the_last_bit(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0 + 1e-15, 2.1), 1: (1 / 3, math.nan)})
    write_run(tmp_path / "late", {"seed": 5}, done=False)
    by_name = {row["run"]: row for row in csv_rows(tmp_path)}
    assert float(by_name["depth-0_seed-0"][LOSS]) == 2.0 + 1e-15
    assert float(by_name["depth-1_seed-0"][LOSS]) == 1 / 3
    assert math.isnan(float(by_name["depth-1_seed-1"][LOSS]))
    assert by_name["depth-0_seed-0"]["val/loss_depth_1"] == ""  # which does not exist at D = 0
    assert by_name["depth-1_seed-0"]["mtp.depth"] == "1" and by_name["late"]["seed"] == "5"
    late = by_name["late"]
    assert (late["state"], late["counted"], late[LOSS]) == ("unfinished", "0", "")


def test_values_of_a_search_keep_every_digit(tmp_path: Path) -> None:
    rates = (0.0012345678901, 0.0012345678902)
    jobs = {
        f"{i}_{s}": [f"optimizer.lr={rate}", f"seed={s}"]
        for i, rate in enumerate(rates)
        for s in (0, 1)
    }
    for i, rate in enumerate(rates):
        write_run(tmp_path / f"{i}_0", {"optimizer.lr": rate})
    write_plan(tmp_path, jobs)
    planned = {s.label: s.planned for s in settings_of(tmp_path).all}
    assert planned == {f"optimizer.lr={rate}": 2 for rate in rates}
    assert {float(row["optimizer.lr"]) for row in csv_rows(tmp_path)} == {*rates}


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1.97e11, "si", "197 G"),
        (0, "si", "0"),
        (999, "si", "999"),
        (999.7, "si", "1 k"),
        (999_600, "si", "1 M"),
        (0.4312, "%", "43.1 %"),
        (-0.012, "%", "−1.2 %"),
        (-0.00861, 4, "−0.0086"),
        (12345.6, 0, "12,346"),
        (math.nan, 4, "nan"),
    ],
)
def test_numbers_are_formatted(value: float, form: str | int, text: str) -> None:
    assert number(value, form) == text


def test_p_values_are_formatted() -> None:
    texts = {None: "", 0.0: "< 0.001", 0.0021: "0.002", 0.0123: "0.012", 0.5: "0.50"}
    assert {p: p_value(p) for p in texts} == texts
