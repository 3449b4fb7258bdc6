"""The comparison of two trees sees differences of one bit, and missing runs, columns and steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import same_bits
from benchmarks.same_bits import ROOT, STEPS


def run_folder(folder: Path, column: str = "train/loss", last: str = "0.1") -> Path:
    folder.mkdir()
    rows = [f"{step},{last if step == STEPS else '2.5'},{step * 0.7}" for step in range(STEPS + 1)]
    head = f"step,{column},progress/seconds"
    (folder / "metrics.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return folder


def test_the_verdict_sees_the_last_bit_and_missing_columns(tmp_path: Path) -> None:
    base = run_folder(tmp_path / "base")
    same = same_bits.compare(base, run_folder(tmp_path / "same"))
    assert same == {"numbers": STEPS + 1, "verdict": "identical"}
    changed = same_bits.compare(base, run_folder(tmp_path / "bit", last="0.10000000000000002"))
    assert changed["verdict"] == "differs"
    assert changed["first"] == f"train/loss at step {STEPS}: 0.1 -> 0.10000000000000002"
    renamed = same_bits.compare(base, run_folder(tmp_path / "renamed", column="train/losses"))
    assert renamed["verdict"] == "differs" and "train/loss is in the base" in renamed["first"]
    absent = same_bits.compare(base, tmp_path / "absent")
    assert absent == {"verdict": "failed", "first": "tree: not run"}


def test_runs_of_too_few_steps_fail(tmp_path: Path) -> None:
    base = run_folder(tmp_path / "base", column="val/loss")
    row = same_bits.compare(base, base)
    assert row["verdict"] == "failed"  # no train/ column at all
    lines = (base / "metrics.csv").read_text(encoding="utf-8").replace("val/", "train/")
    short = "\n".join(lines.splitlines()[:9]) + "\n"
    (base / "metrics.csv").write_text(short, encoding="utf-8")
    assert same_bits.compare(base, base)["first"] == "only 8 steps were logged"


def test_unknown_configurations_and_commits_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--only", "sequentil"], ["--base", "no-such-commit"]):
        with pytest.raises(SystemExit):
            same_bits.main(arguments)
        assert arguments[1] in capsys.readouterr().err


@pytest.mark.long
def test_a_small_change_of_one_setting_is_found(tmp_path: Path) -> None:
    """Trains both trees; the second has another epsilon in its optimizer."""
    changed = tmp_path / "changed"
    no_cache = shutil.ignore_patterns("__pycache__")
    for name in ("mtp_lightning", "data_modules", "conf", "sweeps", "hydra_plugins"):
        shutil.copytree(ROOT / name, changed / name, ignore=no_cache)
    file = changed / "conf" / "optimizer" / "adamw.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.count("eps: 1.0e-8") == 1
    file.write_text(text.replace("eps: 1.0e-8", "eps: 1.0001e-8"), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(same_bits.made_text(), encoding="utf-8")
    rows = {}
    for name, tree in (("first", ROOT), ("again", ROOT), ("changed", changed)):
        same_bits.run_child(tree, tmp_path / name, tmp_path, ["sequential"])
        rows[name] = same_bits.compare(
            tmp_path / "first" / "sequential", tmp_path / name / "sequential"
        )
    assert rows["again"]["verdict"] == "identical"
    assert rows["changed"]["verdict"] == "differs" and "at step" in rows["changed"]["first"]
