"""Help for groups, options and keys from conf/'s comments; the quiet mode."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from mtp_lightning.callbacks.progress import StepProgressBar
from mtp_lightning.command_line.conf_comments import Key, Option, groups, help_for, read_option
from mtp_lightning.command_line.shell import QUIET
from mtp_lightning.paths import CONF
from tests.integration.helpers import ROOT, execute
from tests.warm import LIGHT, Done


def test_comments_of_a_file_describe_the_option_and_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# @package _global_\n# What it is. And more:\n#   a command\n"
        "defaults:\n  - base\n_target_: a.B\n\n"
        "# one;\n# in two lines\nfirst: 1\nsecond:\n  # inner\n  third: null\n  fourth: [1, 2]\n"
        "# gone\n\n# kept\nfifth: ${data}\n"
    )
    option = read_option(file, "group")
    assert (option.name, option.brief) == ("mine", "What it is")
    assert option.comment == "What it is. And more:\n  a command"
    assert option.keys == (
        Key("first", "1", "one; in two lines"),
        Key("second.third", "null", "inner"),
        Key("second.fourth", "[1, 2]", ""),
        Key("fifth", "${data}", "kept"),
    )


@pytest.mark.parametrize(
    ("comment", "brief"),
    [
        ("What is it?\n  a command\n\nMore.", "What is it?"),
        ("1 .. D depths, in stages. More.", "1 .. D depths, in stages"),
        ("By Liu et al. 2019: more.", "By Liu et al. 2019"),
    ],
)
def test_the_brief_of_an_option_is_its_first_sentence(comment: str, brief: str) -> None:
    assert Option("group", "name", comment, (), {}).brief == brief
    # A user's file without a comment is in the list, too.
    assert Option("mtp", "mine", "", (), {"_target_": "my_ideas.Mine"}).brief == "my_ideas.Mine"


def test_every_option_has_a_description() -> None:
    all_options = groups()
    files = {file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.rglob("*.yaml")}
    described = {f"{g}/{n}".lstrip("/") for g, options in all_options.items() for n in options}
    assert files == described
    for options in all_options.values():
        for option in options.values():
            assert option.comment and option.brief, f"{option.group}={option.name} says nothing"


def test_help_describes_groups_and_options() -> None:
    mtp = help_for("mtp")
    assert mtp.startswith("mtp=NAME (default sequential), one of\n")
    assert help_for("debug").startswith("debug=NAME, one of\n")
    assert "  sequential " in mtp and "DeepSeek-V3" in mtp and "depth =" not in mtp
    option = help_for("mtp=sequential")
    assert "  depth = 2\n      D, tokens predicted beyond the next one" in option
    assert max(map(len, option.splitlines())) <= 100
    assert (
        "  navigation      Find a shortest path on a graph that no prompt shows (Zhong et al. 2026)"
        in help_for("data")
    )
    assert "  base " not in help_for("data")
    assert help_for("data=text").endswith("\n  further keys: --help data=base")
    assert "further keys" not in option
    # The file of a size has values alone, and conf/model/base.yaml the comments.
    assert "  d_model = 96\n      width of the residual stream; " in help_for("model=nano")
    preset = help_for("experiment=small_text").splitlines()
    assert {"  lambda_schedule=constant", "  tokenizer=byte"} <= {*preset}
    with pytest.raises(
        ValueError, match="no group or key 'nope'; choose one of balance, callbacks"
    ):
        help_for("nope")
    with pytest.raises(ValueError, match="no group or key 'nope'; choose one of .*, prompt, "):
        help_for("nope", app="generate")
    with pytest.raises(ValueError, match="mtp has no option 'nope'; choose one of .*sequential"):
        help_for("mtp=nope")


def test_help_explains_a_key_of_the_command_line() -> None:
    depth = help_for("mtp.depth")
    assert (
        "  mtp.depth = 2  (mtp=joint, mtp=linear, " in depth and ")\n      D, tokens pred" in depth
    )
    assert "  mtp.depth = 0  (mtp=none, mtp=teacherless)\n      always 0 here" in depth
    assert "optimizer.schedule.kind = wsd  (opt" in help_for("optimizer.schedule.kind")
    assert help_for("seed").startswith("  seed = 0\n      seed of the weights")
    assert "copied from the text itself" in help_for("lookup", app="generate")
    assert help_for("decode.n_prompts", app="evaluate").startswith("  decode.n_prompts = 64\n")


def test_train_prints_help_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "mtp").mkdir()
    (tmp_path / "mtp" / "mine.yaml").write_text("# Mine.\n\n# how far\nstretch: 2\n")

    def train_py(*words: str) -> Done:
        return execute([sys.executable, str(ROOT / "train.py"), *words], tmp_path, imported=LIGHT)

    whole = train_py("--help")
    assert whole.returncode == 0 and len(whole.stdout.splitlines()) <= 55, "one screen"
    assert "--help GROUP" in whole.stdout
    (group,) = [line for line in whole.stdout.splitlines() if line.startswith("sweeps: ")]
    sweeps = {file.stem for file in (CONF / "sweeps").glob("*.yaml")}
    assert set(group.removeprefix("sweeps: ").split(", ")) == sweeps
    assert "\ndata: copy, " in whole.stdout and "\nmodel: deepseek_large" in whole.stdout
    assert "tests" not in whole.stdout.split("Overrides used most")[0]
    assert train_py("help").stdout == whole.stdout
    assert train_py("--help", "mtp").stdout.strip() == help_for("mtp")
    own_option = "mtp=mine\n\nMine.\n\n  stretch = 2\n      how far\n"
    assert train_py("--config-dir", str(tmp_path), "--help", "mtp=mine").stdout == own_option
    assert train_py("--help", "mtp=mine", "--config-dir", str(tmp_path)).stdout == own_option


def test_the_quiet_mode_silences_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    StepProgressBar().print("said")
    monkeypatch.setenv(QUIET, "1")
    StepProgressBar().print("not said")
    assert shown.getvalue().strip() == "said"
