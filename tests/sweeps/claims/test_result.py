"""Results in files: stale ones, unfinished ones, figures, and the pages made of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mtp_lightning.paths import ROOT
from sweeps.claims import words
from sweeps.claims.claim import is_stale
from sweeps.claims.figure import digest, files_of, write_figures
from sweeps.claims.pages import MORE_PLANNING, PLANNING, READMES, pages, part, write_pages
from sweeps.claims.preregistration import write_preregistration
from sweeps.claims.read import names, read_claim
from sweeps.claims.result import judge, make_result, read_result, write_result
from sweeps.claims.words import beside
from sweeps.report.statistics import Wait
from tests.sweeps.claims.fixture_claims import (
    BEGAN,
    PLAIN,
    SOLVED,
    claim_of,
    measured_speeds,
    moved,
    observed,
    predict,
    register,
    result_of,
    rights,
    root,
    told,
    write_claim,
)
from tests.sweeps.fixture_runs import evaluated, task_run, write_run

ENGLISH, CHINESE = READMES


def test_all_numbers_are_in_the_file(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    result = result_of(claim, {"plain": PLAIN, "mtp": [*moved(-0.05)[:4], "running"]})
    write_result(result, claim.label, tmp_path)
    stored = read_result(claim.label, tmp_path)
    assert stored == json.loads(json.dumps(result))
    assert stored["verdict"] == "holds"
    seeds = stored["arms"]["mtp"]["seeds"]
    assert [seeds[str(s)]["values"]["val/bits_per_byte"] for s in range(4)] == [*moved(-0.05)[:4]]
    assert seeds["4"]["state"] == "running" and seeds["4"]["values"] == {}
    assert stored["unfinished"] == ["mtp: 4 of 5 seeds done, 1 running"]
    assert stored["predicted_in"] == "d" * 40 and stored["digest"] == claim.digest
    assert stored["minutes"] == 9.0 and stored["date"] == "2026-11-25"
    assert stored["commits"] == ["c" * 40] and stored["machines"] == ["Linux x86_64, 2 cores"]
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as version 1"):
        read_result(claim.label, tmp_path)


def test_time_to_solve_is_kaplan_and_meiers(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, measure=SOLVED, minimum=2)
    arms = observed(claim, {"plain": rights(0, 3), "mtp": rights(3, 3)})
    steps = {"plain": [Wait(100, False)] * 3, "mtp": [Wait(at, True) for at in (10, 20, 30)]}
    with_waits = {
        arm: {s: replace(seed, waits={"val/exact_match": steps[arm][s]}) for s, seed in of.items()}
        for arm, of in arms.items()
    }
    result = make_result(claim, with_waits, BEGAN)
    found = {arm: c["time_to_solve"]["val/exact_match"] for arm, c in result["arms"].items()}
    assert found["mtp"]["median_steps"] == 20
    assert found["mtp"]["waiting"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert found["plain"]["median_steps"] is None and found["plain"]["censored"] == [100] * 3


def test_what_is_read_of_runs(tmp_path: Path) -> None:
    own = {"tag": "moe/max_violation", "last": 0.5}
    predictions = [predict("mtp", "below", against="plain"), predict("mtp", "below", measure=own)]
    claim = claim_of(tmp_path, predictions=predictions)
    runs = tmp_path / "runs"
    for seed, bits in enumerate(PLAIN):
        write_run(runs / f"p{seed}", {"seed": seed}, loss=2 * bits, summary=evaluated("a" * 32))
        write_run(runs / f"m{seed}", {"seed": seed}, loss=2 * bits - 0.1 - seed / 1000)
        lines = ["step,moe/max_violation", "5,9.0", "11,1.0", "20,2.0", "21,"]
        (runs / f"m{seed}" / "metrics.csv").write_text("\n".join(lines) + "\n")
    folders = {a: {s: f"{a[0]}{s}" for s in range(5)} for a in ("plain", "mtp")}
    preregistration = register(claim, runs, folders)
    result = judge(claim, runs)
    values = result["arms"]["mtp"]["seeds"]["3"]["values"]
    assert values["val/bits_per_byte"] == pytest.approx(PLAIN[3] - 0.0515)
    assert values["moe/max_violation, last 0.5"] == 1.5, "of steps 11 to 20"
    assert "different texts" in result["predictions"][0]["why"]
    assert "no moe/max_violation at seed 0" not in result["predictions"][1]["why"]
    # An extra seed that was ever started counts; a planned one that was not is shown.
    write_run(runs / "p9", {"seed": 9}, done=False)
    preregistration.runs["plain"][9] = "p9"
    del preregistration.runs["plain"][0]
    write_preregistration(preregistration, claim, runs)
    again = judge(claim, runs)
    assert again["unfinished"] == ["plain: 4 of 6 seeds done, 1 missing, 1 unfinished"]


def test_steps_are_those_that_matching_has_set(tmp_path: Path) -> None:
    claim, runs = claim_of(tmp_path, seeds=[0, 1, 2]), tmp_path / "runs"
    for seed in range(3):
        write_run(runs / f"p{seed}", {"seed": seed}, loss=2.0 + seed)
        fewer = {"step": 7, "compare": {"max_steps": 7}}
        write_run(runs / f"m{seed}", {"seed": seed}, loss=1.0 + seed * 1.1, summary=fewer)
    register(claim, runs, {a: {s: f"{a[0]}{s}" for s in range(3)} for a in ("plain", "mtp")})
    assert judge(claim, runs)["predictions"][0]["why"] == "the arms differ by 65.0% in steps"


def test_solving_is_read_of_runs(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, measure=SOLVED, seeds=[0, 1], minimum=2)
    runs = tmp_path / "runs"
    for seed in (0, 1):
        task_run(runs / f"p{seed}", {"seed": seed}, rights=(0.4, 0.5))
        task_run(runs / f"m{seed}", {"seed": seed}, rights=(0.4, 0.97))
    folders = {a: {s: f"{a[0]}{s}" for s in range(2)} for a in ("plain", "mtp")}
    register(claim, runs, folders)
    result = judge(claim, runs)
    assert result["arms"]["mtp"]["seeds"]["1"]["waits"] == {"val/exact_match": (20, True)}
    (entry,) = result["predictions"]
    assert (entry["own"]["count"], entry["other"]["count"]) == (2, 0)
    assert entry["verdict"] == "undecided", "two seeds against two"


def test_a_result_whose_claim_was_changed_is_stale(tmp_path, capsys):
    claims, runs = tmp_path / "claims", tmp_path / "runs"
    runs.mkdir()
    claim = claim_of(claims)
    where = ["--claims", claims, "--root", root(tmp_path)]
    register(claim, runs)
    result = result_of(claim, {"plain": PLAIN, "mtp": moved(-0.05)})
    write_result(result, "mine", tmp_path / "results")
    before = (tmp_path / "results" / "mine.json").read_bytes()
    # The threshold moves to where the result would no longer hold.
    changed = claim_of(claims, predictions=[predict("mtp", "below", -0.06, against="plain")])
    stored = read_result("mine", tmp_path / "results")
    assert is_stale(stored, changed)
    said = told(capsys, "verdict", "mine", "--runs", runs, *where, code=1)
    assert "is stale: it was changed after its runs began" in said
    told(capsys, "verdict", "--all", "--runs", runs, *where, code=1)
    assert re.search(r"^mine +0/1  stale", told(capsys, "list", *where), re.MULTILINE)
    assert (tmp_path / "results" / "mine.json").read_bytes() == before
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "### mine: stale" in page and "changed after these runs began" in page
    with pytest.raises(ValueError, match="was changed after its runs began"):
        judge(changed, runs)


def test_the_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = tmp_path / "claims"
    gpu = {"seeds": [0, 1], "minimum": 2, "minutes": 900}
    published = [predict("mtp", "below", against="plain", expected=-0.1, published="2.1")]
    claim = claim_of(claims, gpu=gpu, predictions=published)
    write_claim(claims, "other", note="Nobody knows.")
    where = ["--claims", claims, "--root", root(tmp_path), "--runs", tmp_path / "none"]
    result = result_of(claim, {"plain": PLAIN, "mtp": [*moved(-0.05)[:4], "failed"]})
    write_result(result, "mine", tmp_path / "results")
    said = told(capsys, "verdict", "--all", *where)
    assert "mine: undecided. MTP helps." in said and "other: not run" in said
    assert "unfinished: mtp: 4 of 5 seeds done, 1 failed" in said
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold\n" not in page
    for said_there in (
        "### mine: undecided",
        "MTP helps. Source: Somebody 2024, arXiv 2404.00000. At equal steps.",
        "![mine. 4 to 5 seeds an arm. Bars are 95 % intervals, orange ticks the thresholds; filled "
        "is decided.](../results/mine.svg)",
        "below 0, expected −0.1 | 2.1 | −0.049",
        "paired t, n = 4, p < 0.001 (Holm 1.00)",
        "**undecided**: mtp failed at seed 4, and no seed is dropped",
        "Unfinished: mtp: 4 of 5 seeds done, 1 failed.",
        f"`python -m sweeps.claims run mine --claims {claims}`; 9 minutes on Linux x86_64, 2 "
        "cores, 2026-11-25; predicted in dddddddd, run by cccccccc.",
        f"(`python -m sweeps.claims run mine --claims {claims} --gpu`, about 900 minutes on one "
        "GPU): not run.",
        "### other: not run",
        "Nobody knows.",
        f"`python -m sweeps.claims run other --claims {claims}`, about 7 minutes on two cores.",
    ):
        assert said_there in page, said_there
    readme = (tmp_path / "README.md").read_text()
    row = "| [mine](#mine-undecided): MTP helps. | undecided; 0 of 1 predictions hold | 4–5 |"
    assert row in page and "Predicted and not run yet: other." in page
    assert "then run, 0 hold, 0 do not, and 1 is undecided: an" in readme
    assert "1 more is predicted and not run yet" in readme
    assert "### mine: undecided" in page, "which the link leads to"
    assert (tmp_path / "results" / "mine.svg").read_text().count("<svg") == 1
    assert write_pages(tmp_path, claims) == [], "nothing changes"
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines <!-- claims"):
        pages(tmp_path, claims)


def test_what_is_said_since_is_no_part_of_the_prediction(tmp_path: Path) -> None:
    claim = claim_of(tmp_path / "claims")
    write_claim(tmp_path / "claims", "later")
    result = result_of(claim, {"plain": PLAIN, "mtp": moved(-0.05)})
    write_result(result, "mine", root(tmp_path) / "results")
    since = claim_of(tmp_path / "claims", remark="Nobody knew.", superseded_by="later")
    assert since.digest == claim.digest and not is_stale(result, since)
    for readme in READMES:
        shown, left = (part([(one, result)], readme, tmp_path) for one in (claim, since))
        assert "docs/results.md" in shown and left == shown, "no outcome leaves the count"
    page = pages(tmp_path, tmp_path / "claims")[tmp_path / "docs" / "results.md"]
    assert "**Superseded by later.**" in page and "**Added after the runs:** Nobody knew." in page
    with pytest.raises(ValueError, match="remark"):
        claim_of(tmp_path / "claims", remark=3)


def test_what_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_claim(tmp_path)
    where = ["--claims", tmp_path, "--runs", tmp_path / "runs"]
    for arguments, said in (
        (["run", "mine", "--seeds", 1, -1], "--seeds -1: give whole numbers >= 0"),
        (["run", "mine", "--gpu"], "has no gpu setting"),
        (["run", "yours"], "choose one of mine"),
        (["verdict", "mine", "--all"], "needs either names of claims or --all"),
        (["verdict"], "needs either names of claims or --all"),
        (["weights", "mine", "--arms", "none"], "--arms none: choose from plain, mtp"),
    ):
        assert said in told(capsys, *arguments, *where, code=1)
    for action in ("list", "hours", "verdict"):
        said = told(capsys, action, "--claims", tmp_path / "nowhere", code=1)
        assert "nowhere is not a folder: check the path" in said
    assert not (tmp_path / "runs").exists()


def test_an_installed_copy_keeps_results_where_it_is_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "lambda.json", tmp_path / "results")
    monkeypatch.setattr("sweeps.claims.__main__.ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    said = told(capsys, "verdict", "lambda")
    assert f"all numbers: {tmp_path / 'results' / 'lambda.json'}" in said
    assert (tmp_path / "results" / "lambda.svg").is_file()
    assert not (tmp_path / "site-packages").exists()


def test_figures_by_measure(tmp_path: Path) -> None:
    own = {"tag": "decode/tokens_per_step"}
    more = [predict("mtp", "within", 0.1, against="plain"), predict("mtp", "above", 1, measure=own)]
    claim = claim_of(tmp_path, predictions=more)
    result = result_of(claim, {"plain": PLAIN, "mtp": moved(-0.05)})
    assert [f.name for f in write_figures(result, "mine", tmp_path)] == ["mine.svg"]
    solved = claim_of(tmp_path, measure=SOLVED)
    result = result_of(solved, {"plain": rights(0), "mtp": rights(7)})
    (file,) = write_figures(result, "mine", tmp_path)
    assert "seeds with more than 95 % right answers" in file.read_text()
    # The mean of the last half of a run has its own values.
    late = claim_of(tmp_path, measure={**SOLVED, "last": 0.5})
    result = result_of(late, {"plain": rights(0), "mtp": rights(7)})
    (late_file,) = write_figures(result, "late", tmp_path)
    assert "no MTP" in late_file.read_text() and "sequential" in late_file.read_text()
    empty = result_of(solved, {"plain": ["missing"], "mtp": ["missing"]})
    assert write_figures(empty, "mine", tmp_path) == []


def test_a_difference_of_shares_is_in_points(tmp_path: Path) -> None:
    predictions = [
        predict("mtp", "above", 0.01, against="plain", expected=0.02),
        predict("mtp", "above", 0.4),
    ]
    claim = claim_of(tmp_path, predictions=predictions, measure={"tag": "val/agreement_depth_1"})
    result = result_of(claim, {"plain": (0.40, 0.41, 0.42), "mtp": (0.43, 0.45, 0.45)})
    difference, alone = words.entries(result)
    assert words.measured(difference).startswith("+3.3 points [+1.9, +4.8]")
    assert words.predicted(difference) == "above 1 point, expected 2 points"
    assert words.measured(alone).startswith("44.3 % [") and words.predicted(alone) == "above 40 %"


def test_a_replication_is_set_beside_what_is_committed(tmp_path: Path) -> None:
    claim = claim_of(tmp_path / "claims")
    committed = result_of(claim, {"plain": PLAIN, "mtp": moved(-0.05)})
    single = [*moved(-0.05)[:1], *["missing"] * 4]
    same, other, one, none = (
        result_of(claim, {"plain": PLAIN, "mtp": mtp})
        for mtp in (moved(-0.0501), moved(0.3), single, ["missing"])
    )
    (line,) = beside(same, committed)
    for number in (same, committed):
        assert words.measured(number["predictions"][0]) in line
    assert line.startswith("sequential modules − no MTP, loss in bits per byte: here ")
    # One seed has no interval to compare.
    for result, words_ in (
        (same, "they agree"), (other, "they do not agree"), (one, "one seed"),
        (one, "not to be compared yet"), (none, "not to be compared yet"),
    ):  # fmt: skip
        assert words_ in beside(result, committed)[0]
    predictions = [predict("mtp", "above", against="plain")]
    solved = claim_of(tmp_path / "claims", measure=SOLVED, predictions=predictions)
    few, many = (
        result_of(solved, {"plain": rights(0), "mtp": rights(n)}) for n in (0, len(rights(0)))
    )
    assert "they do not agree" in beside(few, many)[0] and "they agree" in beside(few, few)[0]


def test_the_readme_counts_the_claims_in_every_language(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    for readme in READMES:
        assert part([(claim, None)], readme, tmp_path) == "", "no empty table, no picture"
    result = result_of(claim, {"plain": PLAIN, "mtp": moved(0.05)})
    counted = {
        ENGLISH: "Of 1 claims that were predicted and then run, 0 hold, 1 does not, and 0 are",
        CHINESE: "1 个论断中，0 个成立，1 个不成立，0 个未决",
    }
    for readme, words_ in counted.items():
        assert words_ in part([(claim, result)], readme, tmp_path)


def test_the_readme_says_who_learned_to_plan(tmp_path: Path) -> None:
    more = [predict("plain", "below", 0.5), predict("mtp", "above", against="plain")]
    claim = claim_of(tmp_path, PLANNING, measure=SOLVED, predictions=more)
    for count, said in (
        (7, ("Some heads do, beyond noise: sequential modules.", "超出噪声：串行模块。")),
        (2, ("No head does, beyond noise.", "没有预测头超出噪声。")),
    ):
        result = result_of(claim, {"plain": rights(0), "mtp": rights(count)})
        english, chinese = (part([(claim, result)], one, tmp_path) for one in (ENGLISH, CHINESE))
        n = len(rights(0))
        assert "\n| no MTP | sequential modules |\n|---|---|\n" in english
        assert f"\n| 0 of {n} | {count} of {n} |\n" in english
        assert f"\n| 无 MTP | 串行模块 |\n|---|---|\n| 0/{n} | {count}/{n} |\n" in chinese
        assert said[0] in english and said[1] in chinese
    waiting = result_of(claim, {"plain": ["missing"], "mtp": ["missing"]})
    assert "plan?" not in part([(claim, waiting)], ENGLISH, tmp_path)


def test_the_readme_adds_further_heads_to_those(tmp_path: Path) -> None:
    found = []
    for name, arm, count in ((PLANNING, "top", 0), (MORE_PLANNING, "bag", 7)):
        arms = {"plain": ["mtp=none", "mtp.depth=0"], arm: [f"mtp={arm}"]}
        more = [predict(arm, "above", against="plain")]
        claim = claim_of(tmp_path, name, measure=SOLVED, arms=arms, predictions=more)
        found.append((claim, result_of(claim, {"plain": rights(0), arm: rights(count)})))
    n = len(rights(0))
    text = part(found, ENGLISH, tmp_path)
    assert "| no MTP | top head | bag head |" in text
    assert f"| 0 of {n} | 0 of {n} | 7 of {n} |" in text
    assert "beyond noise: bag head." in text
    # Without numbers of the first claim, the group is not shown.
    assert "plan?" not in part([(found[0][0], None), found[1]], ENGLISH, tmp_path)


def test_the_readme_says_how_fast_where_nothing_is_stored_of_the_head(tmp_path: Path) -> None:
    row = {"kind": "code", "temperature": 0.0, "tokens": 192, "drafts_1": {"over_plain_cpu": 1.36}}
    measured_speeds(tmp_path, [row], processor="P")
    english, chinese = (part([], one, tmp_path) for one in (ENGLISH, CHINESE))
    assert "| P |  | 1.36 × | 3, no interval |\n" in english
    assert "| P |  | 1.36 倍 | 3 段，无置信区间 |\n" in chinese


def test_the_projects_pages_are_those_of_its_results() -> None:
    """``python -m sweeps.claims verdict --all`` makes them."""
    made = pages(ROOT)
    assert set(made) == {ROOT / page for page in ("docs/results.md", *READMES)}
    for page, text in made.items():
        assert text == page.read_text(encoding="utf-8"), page


def test_every_result_is_of_a_claim_and_has_its_figures() -> None:
    for file in sorted((ROOT / "results").glob("*.json")):
        name, _, setting = file.stem.partition(".")
        assert name in names()
        claim = read_claim(name)
        result = read_result(file.stem, file.parent)
        assert result["claim"] == name
        claim = claim.on_gpu() if setting else claim
        assert result["setting"] == claim.setting == (setting or "cpu")
        for figure in files_of(result, file.stem, file.parent):
            drawn_from = re.search(r"<dc:identifier>(\w+)</", figure.read_text(encoding="utf-8"))
            earlier = f"{figure.name} is earlier: python -m sweeps.claims verdict --all"
            assert drawn_from[1] == digest(result), earlier
