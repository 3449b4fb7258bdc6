"""Results of claims: their files, staleness, figures, pages and replications."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.paths import ROOT
from sweeps.claims import words
from sweeps.claims.claim import Claim, is_stale
from sweeps.claims.figure import digest, files_of, write_figures
from sweeps.claims.pages import MORE_PLANNING, PLANNING, READMES, pages, part, write_pages
from sweeps.claims.preregistration import Preregistration, write_preregistration
from sweeps.claims.read import names, read_claim
from sweeps.claims.result import judge, read_result, write_result
from sweeps.claims.words import beside
from tests.sweeps.claims.fixture_claims import (
    PLAIN,
    SOLVED,
    claim_of,
    exact_matches,
    measured_speeds,
    output_of,
    predict,
    register,
    result_of,
    shifted,
    solved_seeds,
    with_pages,
    write_claim,
)
from tests.sweeps.fixture_runs import on_text, task_run, write_run

ENGLISH, CHINESE = READMES


def begin(claim: Claim, runs: Path, *, seeds: int) -> Preregistration:
    """Preregister the runs p0, p1, .. of the arm ``plain`` and m0, m1, .. of the arm ``mtp``."""
    folders = {arm: {s: f"{arm[0]}{s}" for s in range(seeds)} for arm in ("plain", "mtp")}
    return register(claim, runs, folders)


def test_the_result_file_has_all_numbers(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    result = result_of(claim, {"plain": PLAIN, "mtp": [*shifted(-0.05)[:4], "running"]})
    write_result(result, claim.label, tmp_path)
    stored = read_result(claim.label, tmp_path)
    assert stored == json.loads(json.dumps(result))
    assert stored["verdict"] == "holds"
    seeds = stored["arms"]["mtp"]["seeds"]
    assert [seeds[str(s)]["values"]["val/bits_per_byte"] for s in range(4)] == [*shifted(-0.05)[:4]]
    assert seeds["4"]["state"] == "running" and seeds["4"]["values"] == {}
    assert stored["unfinished"] == ["mtp: 4 of 5 seeds done, 1 running"]
    assert stored["predicted_in"] == "d" * 40 and stored["digest"] == claim.digest
    assert stored["minutes"] == 9.0 and stored["date"] == "2026-11-25"
    assert stored["commits"] == ["c" * 40] and stored["machines"] == ["Linux x86_64, 2 cores"]
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as version 1"):
        read_result(claim.label, tmp_path)


def test_values_and_states_are_read_from_runs(tmp_path: Path) -> None:
    violation = {"tag": "moe/max_violation", "last": 0.5}
    below = predict("mtp", "below", against="plain")
    predictions = [below, predict("mtp", "below", measure=violation)]
    claim = claim_of(tmp_path, predictions=predictions)
    runs = tmp_path / "runs"
    for seed, bits in enumerate(PLAIN):
        write_run(runs / f"p{seed}", {"seed": seed}, loss=2 * bits, summary=on_text("a" * 32))
        write_run(runs / f"m{seed}", {"seed": seed}, loss=2 * bits - 0.1 - seed / 1000)
        lines = ["step,moe/max_violation", "5,9.0", "11,1.0", "20,2.0", "21,"]
        (runs / f"m{seed}" / "metrics.csv").write_text("\n".join(lines) + "\n")
    preregistration = begin(claim, runs, seeds=5)
    result = judge(claim, runs)
    values = result["arms"]["mtp"]["seeds"]["3"]["values"]
    assert values["val/bits_per_byte"] == pytest.approx(PLAIN[3] - 0.0515)
    assert values["moe/max_violation, last 0.5"] == 1.5, "of steps 11 to 20"
    assert "different texts" in result["predictions"][0]["why"]
    assert "no moe/max_violation at seed 0" not in result["predictions"][1]["why"]
    # Seeds that were started count even if they were not planned; missing planned ones are shown.
    write_run(runs / "p9", {"seed": 9}, done=False)
    preregistration.runs["plain"][9] = "p9"
    del preregistration.runs["plain"][0]
    write_preregistration(preregistration, claim, runs)
    again = judge(claim, runs)
    assert again["unfinished"] == ["plain: 4 of 6 seeds done, 1 missing, 1 unfinished"]


def test_steps_set_by_matching_are_compared(tmp_path: Path) -> None:
    claim, runs = claim_of(tmp_path, seeds=[0, 1, 2]), tmp_path / "runs"
    for seed in range(3):
        write_run(runs / f"p{seed}", {"seed": seed}, loss=2.0 + seed)
        fewer = {"step": 7, "compare": {"max_steps": 7}}
        write_run(runs / f"m{seed}", {"seed": seed}, loss=1.0 + seed * 1.1, summary=fewer)
    begin(claim, runs, seeds=3)
    assert judge(claim, runs)["predictions"][0]["why"] == "the arms differ by 65.0% in steps"


def test_times_to_solve_are_read_from_runs(tmp_path: Path) -> None:
    claim = claim_of(tmp_path, measure=SOLVED, seeds=[0, 1], minimum=2)
    runs = tmp_path / "runs"
    for seed, rights in enumerate([(0.97, 0.98), (0.4, 0.97)]):
        task_run(runs / f"p{seed}", {"seed": seed}, rights=(0.4, 0.5))
        task_run(runs / f"m{seed}", {"seed": seed}, rights=rights)
    begin(claim, runs, seeds=2)
    result = judge(claim, runs)
    assert result["arms"]["mtp"]["seeds"]["1"]["waits"] == {"val/exact_match": (20, True)}
    (entry,) = result["predictions"]
    assert (entry["own"]["count"], entry["other"]["count"]) == (2, 0)
    assert entry["verdict"] == "undecided", "two seeds against two"
    times = {arm: c["time_to_solve"]["val/exact_match"] for arm, c in result["arms"].items()}
    assert (times["mtp"]["median_steps"], times["mtp"]["waiting"]) == (10, [0.5, 0])
    assert (times["plain"]["median_steps"], times["plain"]["censored"]) == (None, [20, 20])


def test_a_result_whose_claim_was_changed_is_stale(tmp_path, capsys):
    claims, runs = tmp_path / "claims", tmp_path / "runs"
    runs.mkdir()
    claim = claim_of(claims)
    options = ["--claims", claims, "--root", with_pages(tmp_path)]
    register(claim, runs)
    result = result_of(claim)
    write_result(result, "mine", tmp_path / "results")
    before = (tmp_path / "results" / "mine.json").read_bytes()
    # With another threshold, the result would no longer hold.
    changed = claim_of(claims, predictions=[predict("mtp", "below", -0.06, against="plain")])
    stored = read_result("mine", tmp_path / "results")
    assert is_stale(stored, changed)
    message = output_of(capsys, "verdict", "mine", "--runs", runs, *options, code=1)
    assert "is stale: it was changed after its runs began" in message
    output_of(capsys, "verdict", "--all", "--runs", runs, *options, code=1)
    assert re.search(r"^mine +0/1  stale", output_of(capsys, "list", *options), re.MULTILINE)
    assert (tmp_path / "results" / "mine.json").read_bytes() == before
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "### mine: stale" in page and "changed after these runs began" in page
    with pytest.raises(ValueError, match="was changed after its runs began"):
        judge(changed, runs)


def test_the_pages_have_verdicts_numbers_and_commands(tmp_path, capsys):
    claims = tmp_path / "claims"
    gpu = {"seeds": [0, 1], "minimum": 2, "minutes": 900}
    published = [predict("mtp", "below", against="plain", expected=-0.1, published="2.1")]
    claim = claim_of(claims, gpu=gpu, predictions=published)
    write_claim(claims, "other", note="Nobody knows.")
    options = ["--claims", claims, "--root", with_pages(tmp_path), "--runs", tmp_path / "none"]
    result = result_of(claim, {"plain": PLAIN, "mtp": [*shifted(-0.05)[:4], "failed"]})
    write_result(result, "mine", tmp_path / "results")
    output = output_of(capsys, "verdict", "--all", *options)
    assert "mine: undecided. MTP helps." in output and "other: not run" in output
    assert "unfinished: mtp: 4 of 5 seeds done, 1 failed" in output
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold\n" not in page
    for text in (
        "### mine: undecided",
        "MTP helps. Source: Somebody 2024, arXiv 2404.00000. At equal steps.",
        "![mine. 4 to 5 seeds per arm. Bars are 95 % intervals, orange ticks the thresholds; "
        "filled points are decided.](../results/mine.svg)",
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
        f"`python -m sweeps.claims run other --claims {claims}`, about 7 minutes on one core.",
    ):
        assert text in page, text
    readme = (tmp_path / "README.md").read_text()
    row = "| [mine](#mine-undecided): MTP helps. | undecided; 0 of 1 predictions hold | 4–5 |"
    assert row in page and "Predicted and not run yet: other." in page
    assert "then run, 0 hold, 0 do not, and 1 is undecided: an" in readme
    assert "1 more is predicted and not run yet" in readme
    assert (tmp_path / "results" / "mine.svg").read_text().count("<svg") == 1
    assert write_pages(tmp_path, claims) == [], "nothing to update"
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines <!-- claims"):
        pages(tmp_path, claims)


def test_later_remarks_are_not_part_of_the_prediction(tmp_path: Path) -> None:
    claim = claim_of(tmp_path / "claims")
    write_claim(tmp_path / "claims", "later")
    result = result_of(claim)
    write_result(result, "mine", with_pages(tmp_path) / "results")
    since = claim_of(tmp_path / "claims", remark="Nobody knew.", superseded_by="later")
    assert since.digest == claim.digest and not is_stale(result, since)
    for readme in READMES:
        shown, left = (part([(one, result)], readme, tmp_path) for one in (claim, since))
        assert "docs/results.md" in shown and left == shown, "superseded claims still count"
    page = pages(tmp_path, tmp_path / "claims")[tmp_path / "docs" / "results.md"]
    assert "**Superseded by later.**" in page and "**Added after the runs:** Nobody knew." in page
    with pytest.raises(ValueError, match="remark"):
        claim_of(tmp_path / "claims", remark=3)


def test_invalid_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_claim(tmp_path)
    options = ["--claims", tmp_path, "--runs", tmp_path / "runs"]
    for arguments, message in (
        (["run", "mine", "--seeds", 1, -1], "--seeds -1: mine predicts for the seeds"),
        (["replicate", "mine", "--seeds", 99], "--seeds 99: mine predicts for the seeds"),
        (["run", "mine", "--gpu"], "has no gpu setting"),
        (["run", "yours"], "choose one of mine"),
        (["verdict", "mine", "--all"], "needs either names of claims or --all"),
        (["verdict"], "needs either names of claims or --all"),
        (["weights", "mine", "--arms", "none"], "--arms none: choose from plain, mtp"),
    ):
        assert message in output_of(capsys, *arguments, *options, code=1)
    for action in ("list", "hours", "verdict"):
        message = output_of(capsys, action, "--claims", tmp_path / "nowhere", code=1)
        assert "nowhere is not a folder: check the path" in message
    assert not (tmp_path / "runs").exists()


def test_an_installed_copy_stores_results_in_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "lambda.json", tmp_path / "results")
    monkeypatch.setattr("sweeps.claims.__main__.ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    output = output_of(capsys, "verdict", "lambda")
    assert f"all numbers: {tmp_path / 'results' / 'lambda.json'}" in output
    assert (tmp_path / "results" / "lambda.svg").is_file()
    assert not (tmp_path / "site-packages").exists()


def test_every_kind_of_measure_has_its_figure(tmp_path: Path) -> None:
    speed = {"tag": "decode/tokens_per_step"}
    within = predict("mtp", "within", 0.1, against="plain")
    predictions = [within, predict("mtp", "above", 1, measure=speed)]
    claim = claim_of(tmp_path, predictions=predictions)
    result = result_of(claim)
    assert [f.name for f in write_figures(result, "mine", tmp_path)] == ["mine.svg"]
    solved = claim_of(tmp_path, measure=SOLVED)
    result = result_of(solved, solved_seeds(0, 7))
    (file,) = write_figures(result, "mine", tmp_path)
    assert "seeds with more than 95 % right answers" in file.read_text()
    # A mean over the last half of a run is drawn as values, not as shares of seeds.
    late = claim_of(tmp_path, measure={**SOLVED, "last": 0.5})
    result = result_of(late, solved_seeds(0, 7))
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


def test_a_replication_is_compared_with_the_committed_result(tmp_path: Path) -> None:
    claim = claim_of(tmp_path / "claims")
    committed = result_of(claim)
    single = [*shifted(-0.05)[:1], *["missing"] * 4]
    same, other, one, none = (
        result_of(claim, {"plain": PLAIN, "mtp": mtp})
        for mtp in (shifted(-0.0501), shifted(0.3), single, ["missing"])
    )
    (line,) = beside(same, committed)
    for number in (same, committed):
        assert words.measured(number["predictions"][0]) in line
    assert line.startswith("sequential modules − no MTP, loss in bits per byte: here ")
    # A result of one seed has no interval to compare with.
    for result, outcome in (
        (same, "they agree"), (other, "they do not agree"), (one, "one seed"),
        (one, "not to be compared yet"), (none, "not to be compared yet"),
    ):  # fmt: skip
        assert outcome in beside(result, committed)[0]
    predictions = [predict("mtp", "above", against="plain")]
    solved = claim_of(tmp_path / "claims", measure=SOLVED, predictions=predictions)
    few, many = (result_of(solved, solved_seeds(0, n)) for n in (0, 8))
    assert "they do not agree" in beside(few, many)[0] and "they agree" in beside(few, few)[0]


def test_the_readme_counts_the_claims_in_every_language(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    for readme in READMES:
        assert part([(claim, None)], readme, tmp_path) == "", "no empty table, no picture"
    result = result_of(claim, {"plain": PLAIN, "mtp": shifted(0.05)})
    sentences = {
        ENGLISH: (
            "Of 1 claim predicted and then run, 0 hold, 1 does not, and 0 are",
            "Of their 1 prediction, 0 hold, 1 do not, and 0 are undecided.",
        ),
        CHINESE: (
            "1 个论断中，0 个成立，1 个不成立，0 个未决",
            "1 条预测里，0 条成立，1 条不成立，0 条未决",
        ),
    }
    for readme, expected in sentences.items():
        text = part([(claim, result)], readme, tmp_path)
        assert all(sentence in text for sentence in expected)


def test_the_readme_names_the_heads_that_learned_to_plan(tmp_path: Path) -> None:
    predictions = [predict("plain", "below", 0.5), predict("mtp", "above", against="plain")]
    claim = claim_of(tmp_path, PLANNING, measure=SOLVED, predictions=predictions)
    for count, sentences in (
        (7, ("Some heads do, beyond noise: sequential modules.", "超出噪声：串行模块。")),
        (2, ("No head does, beyond noise.", "没有预测头超出噪声。")),
    ):
        result = result_of(claim, solved_seeds(0, count))
        english, chinese = (part([(claim, result)], one, tmp_path) for one in (ENGLISH, CHINESE))
        assert "\n| no MTP | sequential modules |\n|---|---|\n" in english
        assert f"\n| 0 of 8 | {count} of 8 |\n" in english
        assert f"\n| 无 MTP | 串行模块 |\n|---|---|\n| 0/8 | {count}/8 |\n" in chinese
        assert sentences[0] in english and sentences[1] in chinese
    waiting = result_of(claim, {"plain": ["missing"], "mtp": ["missing"]})
    assert "plan?" not in part([(claim, waiting)], ENGLISH, tmp_path)


def test_the_readme_joins_the_claims_about_planning(tmp_path: Path) -> None:
    pairs = []
    for name, arm, count in ((PLANNING, "top", 0), (MORE_PLANNING, "bag", 7)):
        arms = {"plain": ["mtp=none", "mtp.depth=0"], arm: [f"mtp={arm}"]}
        predictions = [predict(arm, "above", against="plain")]
        claim = claim_of(tmp_path, name, measure=SOLVED, arms=arms, predictions=predictions)
        values = {"plain": exact_matches(0), arm: exact_matches(count)}
        pairs.append((claim, result_of(claim, values)))
    text = part(pairs, ENGLISH, tmp_path)
    assert "| no MTP | top head | bag head |" in text
    assert "| 0 of 8 | 0 of 8 | 7 of 8 |" in text
    assert "beyond noise: bag head." in text
    assert "| no MTP | bag head |" in part([(pairs[0][0], None), pairs[1]], ENGLISH, tmp_path)
    assert "seen before" not in text
    remarked = replace(pairs[0][0], remark="Seen before.")
    text = part([(remarked, pairs[0][1]), pairs[1]], ENGLISH, tmp_path)
    assert f"seen before](docs/results.md#{PLANNING}-undecided)" in text


def test_the_readme_shows_speeds_without_facts_about_the_head(tmp_path: Path) -> None:
    speed: dict[str, Any] = {"over_plain_cpu": 1.36}
    row = {"kind": "code", "temperature": 0.0, "tokens": 192, "drafts_1": speed}
    measured_speeds(tmp_path, [row], processor="P")
    assert "| P |" not in part([], ENGLISH, tmp_path)
    speed["over_plain_cpu_interval"] = [1.2, 1.5]
    measured_speeds(tmp_path, [row], processor="P")
    english, chinese = (part([], one, tmp_path) for one in (ENGLISH, CHINESE))
    assert "| P |  | 1.36 × [1.20, 1.50] | 3 |\n" in english
    assert "| P |  | 1.36 倍 [1.20, 1.50] | 3 |\n" in chinese


def test_the_projects_pages_match_its_results() -> None:
    """``python -m sweeps.claims verdict --all`` writes them."""
    texts = pages(ROOT)
    assert set(texts) == {ROOT / page for page in ("docs/results.md", *READMES)}
    for page, text in texts.items():
        assert text == page.read_text(encoding="utf-8"), page


def test_every_stored_result_has_its_claim_and_figures() -> None:
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
