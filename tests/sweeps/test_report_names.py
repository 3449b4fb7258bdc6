"""Names of settings in a report's figures and titles."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sweeps.report.chart import styled
from sweeps.report.compare import compare
from sweeps.report.metrics import BY_TAG, LOSS, form_of
from sweeps.report.names import arm_names, axis_of, in_words, joined, name_of, question
from sweeps.report.settings import show
from tests.sweeps.fixture_runs import NO_MTP, depth_sweep, write_run
from tests.sweeps.reported import answer_of, drawings, page_of, settings_of


def test_keys_and_values_have_names() -> None:
    assert name_of("mtp", "linear") == "linear heads" and name_of("mtp", "none") == "no MTP"
    assert name_of("mtp.depth", "2") == "D = 2" and axis_of("mtp.depth") == "D"
    assert name_of("mtp.token_dropout", show(0.0)) == "no token dropout"
    assert name_of("experiment", show(None)) == "no preset"
    assert name_of("mtp.own", "x") == "mtp.own=x" and axis_of("mtp.own") == "mtp.own"
    assert [joined(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    title = question(["mtp.depth", "mtp_lambda"], BY_TAG[LOSS], task=False)
    assert title == "Which D and lambda give the lowest loss in nats per token?"
    assert question(["mtp"], None, task=True) == "Which kind of head solves the task?"
    assert question([], BY_TAG[LOSS], task=False) == ""


def test_arms_are_named_by_the_keys_that_distinguish_them() -> None:
    shared = ["mtp.depth=2", "data.seq_len=64"]
    arms = {
        "none": ["mtp=none"],
        "shared": ["mtp=sequential", "mtp.share_layers=true"],
        "seq": ["mtp=sequential"],
        "bpe": ["mtp=none", "tokenizer=bpe_small"],
        "own_key": ["mtp=sequential", "my.key=3"],
        "own_class": ["mtp=none", "mtp._target_=my_ideas.heads.GatedConfig"],
    }
    names = {"none": "no MTP, bytes", "bpe": "no MTP, BPE", "own_key": "own key"}
    names["own_class"] = "Gated head"
    names["shared"] = "sequential modules, one for all depths"
    names["seq"] = "seq"  # the keys with names do not tell it from the next
    arms = {arm: [*shared, *overrides] for arm, overrides in arms.items()}
    assert arm_names(arms) == names


def test_tags_are_named_in_words_with_their_unit() -> None:
    assert in_words("val/bits_per_byte") == ("loss in bits per byte", "lower is better")
    assert in_words("val/loss_depth_2")[0] == "loss of depth 2 in nats per token"
    assert in_words("val/accuracy_distance_16-31")[0] == "right tokens at a distance of 16-31"
    assert in_words("my/metric") == ("my/metric", "")
    assert form_of("decode/acceptance_position_1") == "%" and form_of("my/metric") == 4
    assert form_of("decode/acceptance_slope_entropy") == 4 and form_of("flops") == "si"


def test_unrelated_runs_are_named_by_their_folders(tmp_path: Path) -> None:
    """Names of all keys in which they differ would fill the page; its tables and runs.csv have the
    keys."""
    for i, name in enumerate(("plain", "first", "second")):
        keys = ("model.d_model", "model.n_layers", "data.seq_len", "data.batch_size")
        config = {**(NO_MTP if i == 0 else {"mtp.depth": i}), **dict.fromkeys(keys, 32 * (i + 1))}
        run = write_run(tmp_path / name, {**config, "tokenizer.size": i})
        (run / ".hydra").mkdir()
        typed = [f"{key}={value}" for key, value in config.items() if "_target_" not in key]
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(typed))
    settings = settings_of(tmp_path)
    assert settings.names == ["first", "plain", "second"]
    assert settings.varied[:3] == ["run", "mtp.depth", "model.d_model"]
    assert settings.all[0].values["data.seq_len"] == 64
    first, _ = compare(settings)
    assert first.verdict == "not compared: no plain training with the same model, data, tokenizer"
    text = answer_of(settings)
    assert "each is named by its runs" in text and "D is" not in text and "D = " not in text
    html = page_of(tmp_path)
    assert "<h1>Which run gives the lowest loss in nats per token?</h1>" in html
    rerun = write_run(tmp_path / "again", {**config, "tokenizer.size": 2, "seed": 1})
    (rerun / ".hydra").mkdir()
    (rerun / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*typed, "seed=1"]))
    assert "second; again" in settings_of(tmp_path).names


def test_a_report_begins_with_its_question(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1), 1: (1.9, 2.05)})
    html = page_of(tmp_path)
    assert "<h1>Which D gives the lowest loss in nats per token?</h1>" in html
    assert f"<code>mtp-lightning report {tmp_path}</code>" in html
    assert html.count(">D = 1, seed 1</option>") == 2  # of "Two runs"
    assert html[html.index('id="figure-') :].startswith('id="figure-differences"')
    html = page_of(tmp_path, reference="mtp.depth=1")
    assert f"<code>mtp-lightning report {tmp_path} --reference mtp.depth=1</code>" in html


@pytest.mark.usefixtures("real_figures")
def test_a_label_that_is_longer_than_its_axis_has_two_lines(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1), 1: (1.9, 2.05)})
    settings = settings_of(tmp_path)
    with styled():
        svg = drawings(settings, compare(settings))["differences"].chart.svg().decode()
    assert ">difference in nats per token<" in svg and ">(lower is better)<" in svg


def test_a_name_leaves_out_keys_of_options_that_a_setting_does_not_have(tmp_path: Path) -> None:
    ran = {"state": "done", "overrides": ["mtp.depth=2", "data.paths=a.txt"]}
    write_run(tmp_path / "text", {"mtp.depth": 2, "data.paths": "a.txt"}, status=ran)
    write_run(tmp_path / "stdlib", {"mtp.depth": 1})
    names = {setting.name for setting in settings_of(tmp_path).all}
    assert names == {"D = 2, data.paths=a.txt", "D = 1"}
    write_run(tmp_path / "only" / "text", {"data.paths": "a.txt"})
    write_run(tmp_path / "only" / "stdlib")
    names = {setting.name for setting in settings_of(tmp_path / "only").all}
    assert names == {"data.paths=a.txt", "data.paths=null"}
