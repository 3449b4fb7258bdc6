"""A user's own claims: a prediction in no commit is refused or marked; results are stored next to
the claims."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from mtp_lightning.paths import ROOT
from mtp_lightning.run.status import write_status
from sweeps.claims.claim import Claim
from sweeps.claims.pages import READMES
from sweeps.claims.preregistration import commit_of, predicted_in, read_preregistration
from sweeps.pool import Pool
from sweeps.process import Job
from tests.sweeps.claims.fixture_claims import (
    PLAIN,
    claim_of,
    commit,
    own_conf,
    register,
    root,
    run,
    told,
    write_claim,
)
from tests.sweeps.fixture_runs import write_run

TRIAL = "predicted: in no commit"


def finish(pool: Pool, jobs: Iterable[Job], **_: object) -> None:
    """In place of a pool: finish every run at once, with a lower loss for MTP."""
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
def test_a_prediction_in_no_commit_is_refused(tmp_path, capsys, action):
    write_claim(tmp_path / "claims")
    where = ["--claims", tmp_path / "claims", "--runs", tmp_path / "runs"]
    said = told(capsys, action, "mine", *where, code=1)
    assert "mine.yaml is in no Git repository" in said and "--unpredicted" in said
    assert not (tmp_path / "runs").exists()


def test_the_verdict_of_a_trial_says_so_everywhere(tmp_path, capsys):
    claims, runs = tmp_path / "claims", tmp_path / "runs"
    write_claim(claims)
    where = ["--claims", claims, "--runs", runs, "--root", root(tmp_path)]
    shutil.copy(tmp_path / "README.md", tmp_path / "README.zh-CN.md")
    pages = [tmp_path / name for name in ("docs/results.md", *READMES)]
    assert run("run", "mine", *where, "--unpredicted") == 0
    # It was begun as a trial, and a commit that comes later does not change that.
    commit(claims)
    assert run("run", "mine", *where, "--seeds", 0) == 0
    for asked in (["verdict", "mine"], ["verdict", "--all"], ["replicate", "mine"]):
        assert f"mine: holds ({TRIAL})." in told(capsys, *asked, *where)
    (line,) = told(capsys, "list", *where).splitlines()[1:]
    assert line.split("  ")[0] == "mine" and f"holds ({TRIAL})" in line
    result = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert result["verdict"] == f"holds ({TRIAL})" and result["predicted_in"] is None
    assert result["command"].endswith("--unpredicted")
    title = "mine-holds-predicted-in-no-commit"
    assert f"### mine: holds ({TRIAL})" in pages[0].read_text()
    row = f"| [mine](#{title}): MTP helps. | holds ({TRIAL}); 1 of 1 predictions hold |"
    assert row in pages[0].read_text()
    for page, counted in zip(pages[1:], ("then run", "成立"), strict=True):
        assert counted not in page.read_text(), "nothing was predicted before it ran"


def test_what_came_out_of_ones_own_claims_lies_beside_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_claim(tmp_path / "our claims", arms={"plain": ["mtp=none"], "mtp": ["mtp=mine"]})
    own_conf(tmp_path / "our conf")
    predicted = commit(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (ROOT / "results").iterdir()}
    where = ["--claims", "our claims", "--allow", "ours", "--config-dir", "our conf"]
    assert "no conf is not a folder" in told(capsys, "list", "--config-dir", "no conf", code=1)
    assert run("run", "mine", *where) == 0
    file = tmp_path / "results" / "mine.json"
    assert f"all numbers: {file}" in told(capsys, "verdict", "mine", *where)
    result = json.loads(file.read_text())
    assert result["verdict"] == "holds" and result["predicted_in"] == predicted
    command = "python -m sweeps.claims run mine --claims 'our claims' --allow ours"
    assert result["command"] == f"{command} --config-dir 'our conf'"
    plan = json.loads((tmp_path / "runs" / "claims" / "sweep.json").read_text())
    assert plan["command"] == ["python -m sweeps.claims", "run", "mine", *where]
    assert (tmp_path / "results" / "mine.svg").exists()
    assert run("verdict", "--all", *where) == 0, "there are no pages to make"
    assert {f: f.stat().st_mtime_ns for f in (ROOT / "results").iterdir()} == before
    # A result of the same prediction knows the commit, where there is no repository any more.
    shutil.rmtree(tmp_path / ".git")
    assert "they agree" in told(capsys, "replicate", "mine", *where)


def test_a_prediction_is_in_a_commit_before_it_is_run(tmp_path: Path) -> None:
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


def test_a_trial_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    def known(claim: Claim, **result: str | None) -> str | None:
        return predicted_in(file, claim, {"digest": claim.digest, **result}, unpredicted=True)

    claim, file = claim_of(tmp_path), tmp_path / "mine.yaml"
    assert known(claim, predicted_in="d" * 40) == "d" * 40
    assert known(claim, predicted_in=None) is None
    assert known(claim, predicted_in="d" * 40, digest="of another prediction") is None
    register(claim, tmp_path)
    again = read_preregistration(claim, tmp_path)
    assert again.commit is None
