"""Claims of a user: predictions in no commit are refused or marked, and results are stored next to
the claims."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from mtp_lightning.paths import ROOT
from mtp_lightning.run.status import write_status
from sweeps.claims.pages import READMES
from sweeps.claims.preregistration import commit_of
from sweeps.pool import Pool
from sweeps.process import Job
from tests.sweeps.claims.fixture_claims import (
    PLAIN,
    commit,
    conf_with_own_head,
    exit_code,
    output_of,
    with_pages,
    write_claim,
)
from tests.sweeps.fixture_runs import write_run

TRIAL = "predicted: in no commit"


def finish(pool: Pool, jobs: Iterable[Job], **_: object) -> None:
    """Replaces ``Pool.run``: finish every run at once, with a lower loss for MTP."""
    for job in jobs:
        shutil.rmtree(job.folder)
        arm, seed = job.labels[0], int(job.labels[1].removeprefix("seed="))
        loss = 2 * PLAIN[seed] - (0.1 + seed / 1000 if arm == "mtp" else 0)
        write_run(job.folder, {"seed": seed}, loss=loss)
        write_status(job.folder, job.overrides, "done")


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.pool.Pool.run", finish)


@pytest.mark.parametrize("action", ["run", "replicate", "weights"])
def test_commands_refuse_a_prediction_in_no_commit(tmp_path, capsys, action):
    write_claim(tmp_path / "claims")
    options = ["--claims", tmp_path / "claims", "--runs", tmp_path / "runs"]
    message = output_of(capsys, action, "mine", *options, code=1)
    assert "mine.yaml is in no Git repository" in message and "--unpredicted" in message
    assert not (tmp_path / "runs").exists()


def test_the_verdict_of_an_unpredicted_trial_is_marked_everywhere(tmp_path, capsys):
    claims, runs = tmp_path / "claims", tmp_path / "runs"
    write_claim(claims)
    options = ["--claims", claims, "--runs", runs, "--root", with_pages(tmp_path)]
    shutil.copy(tmp_path / "README.md", tmp_path / "README.zh-CN.md")
    pages = [tmp_path / name for name in ("docs/results.md", *READMES)]
    assert exit_code("run", "mine", *options, "--unpredicted") == 0
    # A later commit does not turn the trial into a prediction.
    commit(claims)
    assert exit_code("run", "mine", *options, "--seeds", 0) == 0
    for arguments in (["verdict", "mine"], ["verdict", "--all"], ["replicate", "mine"]):
        assert f"mine: holds ({TRIAL})." in output_of(capsys, *arguments, *options)
    (line,) = output_of(capsys, "list", *options).splitlines()[1:]
    assert line.split("  ")[0] == "mine" and f"holds ({TRIAL})" in line
    result = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert result["verdict"] == f"holds ({TRIAL})" and result["predicted_in"] is None
    assert result["command"].endswith("--unpredicted")
    title = "mine-holds-predicted-in-no-commit"
    assert f"### mine: holds ({TRIAL})" in pages[0].read_text()
    row = f"| [mine](#{title}): MTP helps. | holds ({TRIAL}); 1 of 1 predictions hold |"
    assert row in pages[0].read_text()
    for page, count in zip(pages[1:], ("then run", "成立"), strict=True):
        assert count not in page.read_text(), "nothing was predicted before it ran"


def test_results_of_a_users_claims_are_stored_next_to_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_claim(tmp_path / "our claims", arms={"plain": ["mtp=none"], "mtp": ["mtp=mine"]})
    conf_with_own_head(tmp_path / "our conf")
    predicted = commit(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (ROOT / "results").iterdir()}
    options = ["--claims", "our claims", "--allow", "ours", "--config-dir", "our conf"]
    assert "no conf is not a folder" in output_of(capsys, "list", "--config-dir", "no conf", code=1)
    assert exit_code("run", "mine", *options) == 0
    file = tmp_path / "results" / "mine.json"
    assert f"all numbers: {file}" in output_of(capsys, "verdict", "mine", *options)
    result = json.loads(file.read_text())
    assert result["verdict"] == "holds" and result["predicted_in"] == predicted
    command = "python -m sweeps.claims run mine --claims 'our claims' --allow ours"
    assert result["command"] == f"{command} --config-dir 'our conf'"
    plan = json.loads((tmp_path / "runs" / "claims" / "sweep.json").read_text())
    assert plan["command"] == ["python -m sweeps.claims", "run", "mine", *options]
    assert (tmp_path / "results" / "mine.svg").exists()
    assert exit_code("verdict", "--all", *options) == 0, "it also works without pages"
    assert exit_code("verdict", "--all", "--gpu", *options) == 0, "no claim has a size for GPUs"
    assert {f: f.stat().st_mtime_ns for f in (ROOT / "results").iterdir()} == before
    # The result keeps the commit of its prediction if the repository is gone.
    shutil.rmtree(tmp_path / ".git")
    assert "they agree" in output_of(capsys, "replicate", "mine", *options)


def test_only_an_unchanged_committed_file_has_a_commit(tmp_path: Path) -> None:
    file = write_claim(tmp_path)
    with pytest.raises(ValueError, match="mine.yaml is in no Git repository"):
        commit_of(file)
    first = commit(tmp_path)
    write_claim(tmp_path, "other")
    commit(tmp_path)
    assert commit_of(file) == first
    linked = tmp_path / "link.yaml"
    linked.symlink_to(file)
    assert commit_of(linked) == first
    (tmp_path / ".gitignore").write_text("ignored.yaml\n")
    for changed in (write_claim(tmp_path, "ignored"), write_claim(tmp_path, "new"), file):
        changed.write_text(changed.read_text() + "# more\n")
        with pytest.raises(ValueError, match="commit the prediction before its runs"):
            commit_of(changed)
