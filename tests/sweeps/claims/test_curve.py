"""Curves of the training loss against FLOPs, by arm and tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sweeps.claims.figure import files_of, panels, write_figures
from sweeps.claims.observe import POINTS, TAG, curve_of
from sweeps.claims.result import judge
from sweeps.report.read import read_run
from tests.sweeps.claims.fixture_claims import claim_of, register
from tests.sweeps.fixture_runs import write_run


def logged(folder: Path, losses: dict[int, float], **settings: object) -> Path:
    """A finished run of as many steps, with some of their losses."""
    steps = max(losses)
    write_run(folder, {"trainer.max_steps": steps, **settings}, summary={"step": steps})
    lines = [f"step,{TAG}", *(f"{step},{loss!r}" for step, loss in losses.items())]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(("steps", "every"), [(100, 1), (173, 3)])
def test_a_point_is_the_mean_loss_of_its_part_of_the_run(tmp_path, steps, every):
    generator = random.Random(steps)
    losses = {step: generator.uniform(1, 5) for step in range(every, steps + 1, every)}
    losses[steps] = 3.0
    points = curve_of(read_run(logged(tmp_path / "run", losses)))
    assert len(points) == POINTS
    for i, (flops, mean) in enumerate(points):
        assert flops == pytest.approx(3_000_000_000 * (i + 0.5) / POINTS)
        part = [v for s, v in losses.items() if (s - 1) * POINTS // steps == i]
        assert mean == pytest.approx(sum(part) / len(part))


def test_fewer_logged_steps_than_points_give_no_curve(tmp_path: Path) -> None:
    assert curve_of(read_run(logged(tmp_path / "run", {50: 2.0, 100: 1.0}))) == []


@pytest.mark.parametrize("equal", ["flops", "steps"])
def test_the_figure_has_a_panel_per_tokenizer(tmp_path: Path, equal: str) -> None:
    arms = {
        "plain": ["mtp=none", "mtp.depth=0"],
        "mtp": ["mtp=sequential"],
        "bpe": ["mtp=none", "mtp.depth=0", "tokenizer=bpe_small"],
    }
    claim = claim_of(tmp_path, equal=equal, arms=arms, seeds=[0, 1], minimum=2)
    runs, folders = tmp_path / "runs", {}
    for arm in arms:
        folders[arm] = {seed: f"{arm}{seed}" for seed in (0, 1)}
        for seed, name in folders[arm].items():
            logged(runs / name, {step: 5 - step / 50 + seed for step in range(1, 101)}, seed=seed)
    register(claim, runs, folders)
    result = judge(claim, runs)
    if equal == "steps":
        assert panels(result) == {}
        return
    assert panels(result) == {"bytes": ["plain", "mtp"], "BPE": ["bpe"]}
    files = write_figures(result, "mine", tmp_path)
    assert files == files_of(result, "mine", tmp_path) and files[-1].name == "mine_curve.svg"
    text = files[-1].read_text()
    assert ">BPE<" in text and "training FLOPs" in text and ">no MTP<" in text
