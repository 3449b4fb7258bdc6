"""Texts and paths of the command line reach the app unchanged."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mtp_lightning.command_line.quote import INPUTS, LISTS, MAPPINGS, PLACES, TEXTS, literal, quoted
from mtp_lightning.run.config import flatten
from tests.integration.helpers import composed

KEYS = TEXTS | PLACES | INPUTS

# Random texts, and texts of the special characters of shells, Hydra and YAML.
SPECIAL = st.text(alphabet=st.sampled_from("\\'\"${}[](),=:#~ \n\ta1文"), max_size=12)
ANY = st.one_of(st.text(max_size=40), SPECIAL)
TYPED = [
    "def main(", "Hello, world", "多任务", "/home/我/文本", "a=b", "it's", 'say "hi"', "'", '"',
    "\\", "a\\'", "${x}", "\\${x", "${", "a #b", "two\nlines", "null", "true", "1e3", "", " ",
    "$HOME", "{a: b}", "choice(a,b)", "interval(1,2)", "~x", "+x", "@", "a\\", "[INST] hi [/INST]",
    "'a' or 'b'", "a [b", "-m",
]  # fmt: skip


def parse(argument: str) -> Override:
    return OverridesParser.create().parse_override(argument)


def read(key: str, text: str, *flags: str) -> Any:
    """The config's value after Hydra and OmegaConf have read the argument."""
    argument = literal([*flags, f"{key}={text}"])[-1]
    config = OmegaConf.create({"value": parse(argument).value()})
    return OmegaConf.to_container(config, resolve=True)["value"]  # type: ignore[index,call-overload]


def in_quotes(text: str) -> bool:
    """Whether Hydra reads a quoted string, which is passed on unchanged."""
    try:
        return isinstance(parse(f"key={text}")._value, QuotedString)
    except HydraException:
        return False


@settings(deadline=None, max_examples=100)
@given(ANY)
def test_prompts_are_read_literally(text: str) -> None:
    if not in_quotes(text):
        assert read("prompt", text) == text


@settings(deadline=None, max_examples=100)
@given(ANY)
def test_paths_are_read_literally(text: str) -> None:
    if text and not (in_quotes(text) or "${" in text or text.lower() == "null"):
        for key in ("run_dir", "checkpoint", "+init_from"):
            assert read(key, text) == text


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(KEYS)), ANY, st.sampled_from([(), ("-m",)]))
@example("prompt", "\\'", ())
@example("data.paths", "a,文,'x'", ("-m",))
@example("stop", "[a(,b]", ())
def test_quoting_a_second_time_changes_nothing(key: str, text: str, flags: tuple[str, ...]) -> None:
    """Sweeps pass quoted arguments to jobs, and Lightning to ranks, which quote them again."""
    assume(key in TEXTS or text not in ("", '""', "''"))
    once = literal([*flags, f"{key}={text}"])
    assert literal(once) == once


@settings(deadline=None, max_examples=100)
@given(ANY)
def test_hydra_passes_quoted_texts_on_unchanged(text: str) -> None:
    argument = f"prompt={quoted(text)}"
    passed_on = f"prompt={parse(argument).get_value_element_as_str()}"
    assert literal([passed_on]) == [passed_on] == [argument]


@pytest.mark.parametrize("text", TYPED)
def test_typical_texts_are_read_literally(text: str) -> None:
    assert read("prompt", text) == text
    for key in ("stop", "run_dir", "data.path", "data.paths"):
        for_hydra = key != "stop" and ("${" in text or text == "null")
        # Keys of lists read brackets as a list. An empty path is refused.
        empty = key != "stop" and not text
        if not (empty or for_hydra or key in LISTS and text.startswith("[")):
            assert read(key, text) == text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ('prompt="def main():"', "def main():"),
        ("prompt='it\\'s'", "it's"),
        ("data.paths=[a,b]", ["a", "b"]),
        ('data.paths=[books/, "logs/*.jsonl"]', ["books/", "logs/*.jsonl"]),
        ("data.paths=[文本, b c, 'd,e']", ["文本", "b c", "d,e"]),
        ("data.source.data_files={train: x}", {"train": "x"}),
        ("stop=[a,b]", ["a", "b"]),
        ("stop=[def main(, '完']", ["def main(", "完"]),
        ("stop=[${x}(]", ["${x}("]),
        ("init_from=null", None),
        ("+data.paths=[a]", ["a"]),
    ],
)
def test_quotes_and_lists_of_hydra_keep_their_meaning(argument: str, value: Any) -> None:
    assert read(*argument.split("=", 1)) == value


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert literal(["run_dir=~/x y"]) == ["run_dir='/home/me/x y'"]
    home = pwd.getpwuid(0)
    assert literal([f"run_dir=~{home.pw_name}/x y"]) == [f"run_dir='{home.pw_dir}/x y'"]
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "x").touch()
    assert literal(["run_dir=~/x"]) == ["run_dir='~/x'"]  # there is such a path


def test_interpolations_in_paths_are_left_to_hydra() -> None:
    assert parse(literal(["run_dir=运行/${now:%H,%M}"])[0]).value() == "运行/${now:%H,%M}"


def test_other_arguments_stay_unchanged() -> None:
    arguments = ["-m", "mtp_lambda=[0.3,0.1]", "+sweeps=depth", "~callbacks.x"]
    arguments += ["--config-dir", "a b", "model=nano,micro", "--cfg", "job", "mtp.depth=0,2"]
    assert literal(arguments) == arguments


def values(argument: str) -> list[str]:
    override = parse(literal(["-m", argument])[1])
    if not override.is_sweep_override():
        return [str(override.value())]
    strings = [str(value) for value in override.sweep_string_iterator()]
    return [str(parse(f"key={string}").value()) for string in strings]


def test_commas_separate_the_paths_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert values("init_from=runs/a,runs/b") == ["runs/a", "runs/b"]
    assert values("init_from=运行/a b,c(") == ["运行/a b", "c("]
    assert values("init_from=choice(a,b)") == ["a", "b"]
    assert values("data.paths=[a,b],[c]") == ["['a', 'b']", "['c']"]
    assert values("init_from='a,b'") == ["a,b"]
    (tmp_path / "a,b").mkdir()
    assert values("init_from=a,b") == ["a,b"]
    assert values("prompt=a,b") == ["a,b"]
    assert values("sweep_dir=c, d") == ["c, d"]


def test_every_quoted_key_is_in_an_app() -> None:
    """Values of a renamed key would be parsed by Hydra."""
    keys: set[str] = set()
    for app, *groups in (
        ("config", "data=text"),
        ("config", "data=huggingface"),
        ("config", "data=self_generated", "+data.prompts.paths=x"),
        ("config", "data=tokens"),
        ("config", "tokenizer=pretrained"),
        ("evaluate",),
        ("generate",),
        ("export",),
    ):
        config = OmegaConf.to_container(composed(app, groups))
        assert isinstance(config, dict)
        keys |= flatten(config).keys() & KEYS
    assert keys == KEYS and MAPPINGS <= LISTS <= keys
