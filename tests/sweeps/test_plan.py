"""The plan of a sweep: jobs are identified by their overrides and keep their folders."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.errors import UserError
from mtp_lightning.run.status import read_status, write_status
from sweeps.plan import (
    Recipe,
    SweepPlan,
    folder_name,
    overrides_digest,
    refuse_run_folder,
    varied_keys,
)

GRID = [[f"mtp.depth={d}", f"seed={s}"] for d in (0, 2) for s in (0, 1)]
LONG = [f"data.source.some_long_key_{i}={i}" for i in range(9)]


def test_folder_names_have_the_varied_keys() -> None:
    assert folder_name(["mtp.depth=2", "seed=0", "model=pico"], ["seed"]) == "seed-0"
    assert folder_name(["mtp.depth=2", "seed=0"], []) == "mtp.depth-2_seed-0"
    assert folder_name(["+sweeps=depth", "mtp.depth=0"], []) == "sweeps-depth_mtp.depth-0"
    name = folder_name([*LONG, "seed=3"], ["seed"])
    assert name == "seed-3"
    name = folder_name([*LONG, "seed=3"], [key.partition("=")[0] for key in LONG])
    assert len(name) <= 80 and name.endswith(f"_{overrides_digest([*LONG, 'seed=3'])}")
    assert folder_name([], []) == "default"


TEXT = st.text(string.printable + "é文🙂\u200b", min_size=1, max_size=40)


@settings(max_examples=40)
@given(st.lists(TEXT, max_size=6), TEXT)
def test_folder_names_are_short_and_safe(values: list[str], last: str) -> None:
    overrides = [f"key_{i}={value}" for i, value in enumerate([*values, last])]
    name = folder_name(overrides, ["key_0"])
    assert 0 < len(name) <= 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    assert not name.startswith((".", "-"))


def test_a_job_keeps_its_folder_when_values_are_added_or_reordered(tmp_path: Path) -> None:
    plan = SweepPlan(tmp_path)
    first = plan.add([[*job, *LONG] for job in GRID[:2]])
    plan.write(["train.py", "-m"])
    again = SweepPlan(tmp_path)
    second = again.add([[*LONG, *reversed(job)] for job in GRID])
    again.write(["train.py", "-m", "more"])
    assert [job.folder for job in second[:2]] == [job.folder for job in first]
    assert len({job.folder for job in second}) == 4
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert stored["varied"] == ["mtp.depth", "seed"]
    assert [job["folder"] for job in stored["jobs"]] == [job.folder for job in second]
    assert stored["command"][-1] == "more" and stored["version"] == 1
    fewer = SweepPlan(tmp_path)
    assert len(fewer.add([[*GRID[0], *LONG]])) == 1
    fewer.write([])
    assert len(SweepPlan(tmp_path).jobs) == 4, "all jobs stay in the plan"


def test_similar_values_get_different_folders(tmp_path: Path) -> None:
    folders = [job.folder for job in SweepPlan(tmp_path).add([["x='a b'"], ["x=a-b"], ["x=a/b"]])]
    assert len(set(folders)) == 3


def test_a_folder_that_another_job_has_used_is_not_reused(tmp_path: Path) -> None:
    write_status(tmp_path / "seed-0", ["seed=0", "other=1"], "done")
    (job,) = SweepPlan(tmp_path).add([["seed=0"]])
    assert job.folder == f"seed-0_{overrides_digest(['seed=0'])}"


def test_paths_and_retries_are_not_part_of_a_job(tmp_path: Path) -> None:
    more = ["sweep.retry_failed=true", "sweep_dir=x", "paths.cache_dir=y", "run_dir=a"]
    batch = [["seed=0", "+sweeps=depth", *more], ["seed=0", "+sweeps=depth"]]
    (job,) = SweepPlan(tmp_path).add(batch)
    assert job.overrides == ("seed=0", "+sweeps=depth")


def test_varied_keys_differ_between_jobs() -> None:
    assert varied_keys([["a=1", "b=1"], ["a=1", "b=2", "+c=1"]]) == ["b", "c"]
    assert varied_keys([["a=1"]]) == []


def test_the_folder_of_one_run_is_refused() -> None:
    refuse_run_folder(["seed=1"], "leave it out")
    for folder in ("+run_dir=x", "logger.csv.folder=x", "logger.tensorboard.folder=x"):
        with pytest.raises(UserError, match="is the folder of one run: leave it out"):
            refuse_run_folder([folder], "leave it out")


@pytest.mark.parametrize("content", ["", "{}", '{"version": 2, "jobs": []}', '{"version": 1}', "["])
def test_a_damaged_plan_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json cannot be read .* another folder"):
        SweepPlan(tmp_path)


@pytest.mark.parametrize("key", ["processes", "nodes"])
def test_a_stored_recipe_needs_at_least_one_process(key: str) -> None:
    stored = {
        "program": "train", "options": [], "cwd": "/", "processes": 1, "nodes": 1,
        "max_steps": 5, "on_cpu": True,
    }  # fmt: skip
    assert Recipe.from_dict(stored).processes == 1
    with pytest.raises(ValueError, match=f"{key}: 0"):
        Recipe.from_dict({**stored, key: 0})


@pytest.mark.parametrize("content", ["", "[]", '{"state": "flying"}', "{", "[" * 100_000])
def test_a_damaged_status_reads_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) == {}
