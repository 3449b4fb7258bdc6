"""Files of claims: how valid ones are read, and the errors for others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.errors import UserError
from sweeps.claims.__main__ import main
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.words import entries, quantity, subject
from sweeps.report.names import arm_names
from tests.sweeps.claims.fixture_claims import SOLVED, claim_of, predict, write_claim

PREDICTION = predict("mtp", "below", against="plain")


def predicted(**changes: Any) -> dict[str, Any]:
    return {"predictions": [{**PREDICTION, **changes}]}


def test_all_keys_of_a_claim_are_read(tmp_path: Path) -> None:
    speed = {"tag": "decode/tokens_per_step", "last": 0.5}
    predictions = [
        {**PREDICTION, "by": -0.1, "expected": -0.2, "published": "2.1"},
        predict("mtp", "above", 1, measure=speed),
    ]
    claim = claim_of(tmp_path, predictions=predictions)
    assert claim.name == claim.label == "mine" and claim.scale.seeds == (0, 1, 2, 3, 4)
    assert claim.overrides("plain") == ("mtp.depth=2", "mtp=none", "mtp.depth=0")
    first, second = claim.predictions
    assert (first.by, first.expected, first.published) == (-0.1, -0.2, "2.1")
    assert first.measure == claim.measure and second.against is None
    assert second.measure.last == 0.5 and len(claim.measures) == 2


def test_the_gpu_setting_replaces_only_its_own_keys(tmp_path: Path) -> None:
    gpu = {
        "shared": ["experiment=gpu"], "arms": {"mtp": ["mtp=parallel"]}, "seeds": [7, 8],
        "minimum": 2, "minutes": 600,
    }  # fmt: skip
    claim = claim_of(tmp_path, gpu=gpu)
    large = claim.on_gpu()
    assert large.label == "mine.gpu" and large.command.endswith("--gpu")
    assert large.overrides("plain") == ("experiment=gpu", "mtp=none", "mtp.depth=0")
    assert large.overrides("mtp") == ("experiment=gpu", "mtp=parallel")
    assert large.scale.seeds == (7, 8) and claim.scale.seeds == (0, 1, 2, 3, 4)
    assert large.digest == claim.digest, "one file, one prediction"
    with pytest.raises(ValueError, match="no gpu setting"):
        claim_of(tmp_path).on_gpu()


def test_an_arm_may_have_the_name_of_a_key(tmp_path: Path) -> None:
    arms = {"plain": ["mtp=none", "mtp.depth=0"], "seeds": ["mtp=sequential"]}
    predictions = [predict("seeds", "below", against="plain")]
    gpu = {"arms": {"seeds": ["mtp=parallel"]}, "seeds": [7, 8], "minimum": 2, "minutes": 600}
    claim = claim_of(tmp_path, arms=arms, predictions=predictions, gpu=gpu)
    assert claim.on_gpu().overrides("seeds")[-1] == "mtp=parallel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"treshold": 1}, "the key treshold: known are arms"),
        (predicted(treshold=1), r"the key treshold in predictions\[0\]"),
        ({"measure": {"tag": "a", "levl": 1}}, "the key levl in measure"),
        ({"source": None}, "no source"),
        ({"minimum": None}, "no minimum"),
        (predicted(arm="mpt"), r"predictions\[0\].arm: mpt: choose one of plain, mtp"),
        (predicted(against="none"), "choose one of plain, mtp"),
        (predicted(side="smaller"), "choose one of above, below, within"),
        (predicted(by="0.1 bits"), "give a number"),
        (predicted(by=float("nan")), "give a number"),
        (predicted(side="within"), "within needs a threshold above 0"),
        (predicted(by=0.1, measure=SOLVED), "Fisher's test"),
        ({"equal": "time"}, "choose one of steps, flops"),
        ({"seeds": [0, 0, 1]}, "different whole numbers"),
        ({"seeds": [True, 1]}, "different whole numbers"),
        ({"minimum": 6}, "2 .* to 5 .the number of seeds"),
        ({"minimum": 1}, "one seed has no interval"),
        ({"arms": {"mtp": "mtp=none"}}, "give a list of overrides"),
        ({"shared": ["mtp.depth"]}, "give a list of overrides"),
        ({"shared": ["seed=3"]}, "seeds: says which seeds are run"),
        ({"measure": {"tag": "a", "last": 2}}, "a part of the run"),
        ({"predictions": []}, "at least one"),
        ({"gpu": {"seeds": [0, 1], "minimum": 2}}, "no minutes in gpu"),
        (
            {"gpu": {"arms": {"x": []}, "seeds": [0], "minimum": 2, "minutes": 1}},
            "the key x in gpu",
        ),
        ({"sentence": 3}, "give a text"),
        ({"arms": {"plain": [], 1: []}}, "arms: 1: write the arm's name in quotes"),
    ],
)
def test_invalid_claims_are_refused_with_their_file(tmp_path, changes, message):
    write_claim(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_claim("mine", tmp_path)
    assert str(tmp_path / "mine.yaml") in str(error.value) and "\n" not in str(error.value)


def test_missing_claims_and_invalid_yaml_are_refused(tmp_path: Path) -> None:
    write_claim(tmp_path, "yours")
    with pytest.raises(ValueError, match="no claim mine in .*: choose one of yours"):
        read_claim("mine", tmp_path)
    (tmp_path / "mine.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_claim("mine", tmp_path)


def test_the_digest_depends_on_the_content_and_not_on_comments(tmp_path: Path) -> None:
    claim = claim_of(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("# why\n" + file.read_text())
    assert read_claim("mine", tmp_path).digest == claim.digest
    assert claim_of(tmp_path, **predicted(by=-0.001)).digest != claim.digest


@pytest.mark.parametrize("name", names())
def test_the_projects_claims_are_complete_and_readable(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line is the question"
    claim = read_claim(name)
    assert any(digits in claim.source for digits in ("arXiv", "this project"))
    used = {arm for p in claim.predictions for arm in (p.arm, p.against)} - {None}
    used |= {arm for p in claim.predictions for n in used for arm in p.measure.curve_of(str(n))}
    for arm in reversed(claim.arms):  # an arm comes after the arm that it continues
        if arm in used:
            links = [o.partition("=")[2] for o in claim.arms[arm] if "_from=" in o.split(".")[0]]
            used |= {link.split("@")[0] for link in links}
    assert used == set(claim.arms), "an arm without a prediction"
    readable = arm_names({arm: claim.overrides(arm) for arm in claim.arms})
    assert len(set(readable.values())) == len(claim.arms), "two arms have one name"
    for entry in entries(claim):
        words = f"{subject(entry)} {quantity(entry['measure'])}"
        assert not re.search(r"[=/]\S|\w_\w", words), f"{words} has a raw key"


def test_classes_of_other_packages_are_allowed_by_name(tmp_path, capsys):
    arms = {"plain": ["mtp=none"], "mtp": [f"mtp._target_={write_claim.__module__}._NoAlias"]}
    write_claim(tmp_path, arms=arms)
    with pytest.raises(UserError, match="--allow tests"):
        read_claim("mine", tmp_path)
    claim = read_claim("mine", tmp_path, allow=["tests"])
    assert claim.arms["mtp"] == tuple(arms["mtp"]) and claim.command.endswith(" --allow tests")
    for allow in ([], ["--allow", "tests"]):
        with pytest.raises(SystemExit):
            main(["questions", "--claims", str(tmp_path), "--root", str(tmp_path), *allow])
        message = capsys.readouterr().err
        assert ("has a result" if allow else "--allow tests") in message
