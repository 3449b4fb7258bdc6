"""Bad input: what a user gets wrong is one sentence with the value, and nothing is written.

The cases are made from the comments of ``conf/``, which say what every key takes: a word for a
number, a number outside its range, a choice that there is not. Files and folders that are not what
they are said to be come on top.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.explained import read_option
from tests.chaos.cases import Case, hold
from tests.chaos.jobs import SMALL, TASK
from tests.chaos.processes import Ended, run
from tests.integration.helpers import CONF, overrides

QUICK = {**SMALL, "trainer.max_steps": 1, "trainer.val_check_interval": 1}
# What an option needs beside its name to be a sound run; None for one that is not tried here, for
# it needs a package, a network or a model.
_NEEDS: dict[str, dict[str, Any] | None] = {
    "data/huggingface": None,
    "data/self_generated": None,
    "data/shakespeare": None,
    "data/stdlib": None,
    "data/text": None,
    "data/tokens": None,
    "logger/mlflow": None,
    "logger/wandb": None,
    "logger/trackio": None,
    "tokenizer/pretrained": None,
    "tokenizer/ids": None,
    "objective/nextlat": None,
    "callbacks/early_stopping": None,
    "callbacks/stop_when_solved": {**TASK, "data": "copy"},
    "model/deepseek_v3": None,
    "optimizer/muon": {"optimizer.lr": None},
    "mtp/none": {"mtp.depth": None},
    "mtp/top": {"mtp.depth": 1},
    "mtp/bag": {"mtp.depth": 1},
    "mtp/registers": {"mtp.depth": 1},
    "mtp/teacherless": None,
}
# Keys that follow others by an interpolation, or take anything.
_FREE = {"depth", "accumulate", "tokenizer", "cache_dir", "mtp_lambda", "stride"}
_GROUPS = (
    "balance", "callbacks", "compare", "data", "lambda_schedule", "mtp", "objective", "optimizer",
    "optimizer/schedule", "tokenizer", "trainer",
)  # fmt: skip


def cases(folder: Path) -> list[Case]:
    """Keys of all groups and apps with wrong values, and files that are not what they should be."""
    cache = folder / "cache"
    finished = Finished(folder / "finished", cache)
    made = []
    sound: dict[str, None] = {}
    for group in _GROUPS:
        for file in sorted((CONF / group).glob("*.yaml")):
            option = f"{group}/{file.stem}"
            needs = _NEEDS.get(option, {})
            if needs is None or file.stem in ("base", "task", "default") and group not in (
                "trainer", "compare",
            ):  # fmt: skip
                continue
            settings = _settings(group, file.stem, needs)
            for key in read_option(file, group).keys:
                path = f"{group.replace('/', '.')}.{key.name}"
                if path.rpartition(".")[2] in _FREE:
                    continue
                for value in wrong_values(key.says):
                    attempt = _train_with(path, value, settings, cache, option, sound)
                    made.append(Case("bad input", f"{option} {path}={value}", attempt))
    for app in ("generate", "evaluate", "export"):
        for key in read_option(CONF / f"{app}.yaml", "").keys:
            for value in wrong_values(key.says):
                attempt = _app_with(app, [f"{key.name}={value}"], finished)
                made.append(Case("bad input", f"{app} {key.name}={value}", attempt))
        for what, make in FILES.items():
            made.append(Case("bad input", f"{app} of {what}", _app_of(app, make, finished)))
    for what, make in FILES.items():
        if what != "nothing":
            made.append(Case("bad input", f"init_from {what}", _start_from(make, finished, cache)))
    for what, content in TEXTS.items():
        made.append(Case("bad input", f"a text that is {what}", _text(content, cache)))
    return made


def wrong_values(takes: str) -> list[str]:
    """Values that a key whose comment ends so does not take, as they are typed."""
    kind = re.search(r"\b(int|float|bool|number)\b", takes)
    options = re.findall(r"[\w.-]+(?: \([^)]*\))? \| ", takes)
    if kind is None:
        return ["no_such_choice"] if options else []
    rest = takes[kind.start() :]
    if kind[0] == "bool":
        return [] if "auto" in takes else ["perhaps", "[1,2]"]
    values = ["many"] if not options else ["no_such_choice"]
    if kind[0] == "int":
        values.append("1.5")
    if kind[0] == "float" and "list" not in rest:
        values.append("nan")
    if bound := re.match(r"\w+ (>=|>) (-?[\d.]+)", rest):
        least = float(bound[2])
        below = least - 1 if bound[1] == ">=" else least
        values.append(f"{below:g}")
    if span := re.search(
        r"\b(?:in ([\[(])|between |from )?([\d.]+)(?:, | and | to )([\d.]+)([\])])?", rest
    ):
        values += [f"{float(span[2]) - 1:g}", f"{float(span[3]) + 1:g}"]
    return values


def _settings(group: str, option: str, needs: dict[str, Any]) -> dict[str, Any]:
    settings = {**QUICK, **needs}
    if group == "data" and option != "synthetic":
        settings |= TASK | {"data": option}
    elif group == "optimizer/schedule":
        settings["optimizer/schedule"] = option
    elif group == "callbacks":
        settings["callbacks"] = f"[default,{option}]"
    elif group not in ("trainer", "compare") and option != "synthetic":
        settings[group] = option
    if group == "lambda_schedule":
        settings["lambda_schedule"] = option
    return settings


Attempt = Callable[[Path, random.Random], str]


def refused(ended: Ended, *, naming: list[str]) -> str:
    """It ended with code 1 or 2 and with one sentence, which it says.

    Args:
        ended: how it ended.
        naming: words of which one stands in the sentence.
    """
    hold(not ended.timed_out, "it does not end")
    hold(ended.code != 0, "it is accepted")
    hold("Traceback" not in ended.out, f"a traceback: {ended.out[-1500:]}")
    hold(ended.code in (1, 2), f"code {ended.code}: {ended.out[-500:]}")
    errors = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    said = errors[0] if errors else ended.out.strip()
    hold(
        len(errors) <= 1 and len(ended.out.strip().splitlines()) <= 30,
        f"it says {ended.out[:1500]}",
    )
    hold("is not a key" not in said, f"the case itself is wrong: {said[:500]}")
    hold(any(word in said for word in naming), f"it does not name it: {said[:500]}")
    return said[:160].replace("\n", " ")


def _train_with(
    key: str, value: str, settings: dict[str, Any], cache: Path, option: str, sound: dict[str, None]
) -> Attempt:
    def attempt(folder: Path, chance: random.Random) -> str:
        if option not in sound:  # else the fault would prove nothing
            given = [*overrides(cache, settings), f"run_dir={folder / 'sound'}"]
            ended = run(["train.py", *given], folder / "sound.log")
            hold(ended.code == 0, f"without a fault it fails: {ended.out[-1500:]}")
            sound[option] = None
        given = [*overrides(cache, {**settings, key: value}), f"run_dir={folder / 'run'}"]
        ended = run(["train.py", *given], folder / "log")
        told = refused(ended, naming=[value, key, key.rpartition(".")[2]])
        hold(not (folder / "run").exists(), "a folder is left of a run that never began")
        return told

    return attempt


class Finished:
    """A finished run that apps are given, made when it is first wanted."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder, self._cache = folder, cache

    @property
    def run(self) -> Path:
        """Its folder."""
        if not (self._folder / "summary.json").exists():
            given = [*overrides(self._cache, SMALL), f"run_dir={self._folder}"]
            ended = run(["train.py", *given], self._folder.with_suffix(".log"))
            hold(ended.code == 0, f"without a fault it fails: {ended.out[-1500:]}")
        return self._folder

    def as_it_is(self) -> dict[str, int]:
        """Its files with their times."""
        return {str(f): f.stat().st_mtime_ns for f in self.run.rglob("*") if f.is_file()}


_ASKED = {"generate": ["prompt=ab", "max_new_tokens=4"], "evaluate": [], "export": []}


def _app_with(app: str, given: list[str], finished: Finished) -> Attempt:
    def attempt(folder: Path, chance: random.Random) -> str:
        before = finished.as_it_is()
        output = [f"output={folder / 'out'}"] if app == "export" else []
        asked = [
            part
            for part in (*_ASKED[app], *output)
            if not given[0].startswith(part.split("=")[0] + "=")
        ]
        arguments = [f"{app}.py", f"checkpoint={finished.run}", *asked, *given]
        ended = run(arguments, folder / "log", folder=folder)
        key, _, value = given[0].partition("=")
        told = refused(ended, naming=[value, key])
        hold(finished.as_it_is() == before, "the run's folder was changed")
        _only_log(folder)
        return told

    return attempt


def _app_of(app: str, make: Callable[[Path, Finished], Path], finished: Finished) -> Attempt:
    def attempt(folder: Path, chance: random.Random) -> str:
        given = make(folder, finished)
        before = sorted(folder.rglob("*"))
        output = [f"output={folder / 'out'}"] if app == "export" else []
        arguments = [f"{app}.py", f"checkpoint={given}", *_ASKED[app], *output]
        ended = run(arguments, folder.with_suffix(".log"), folder=folder.parent)
        told = refused(ended, naming=[str(given), given.name])
        hold(sorted(folder.rglob("*")) == before, "something was written")
        return told

    return attempt


def _start_from(make: Callable[[Path, Finished], Path], finished: Finished, cache: Path) -> Attempt:
    def attempt(folder: Path, chance: random.Random) -> str:
        given = make(folder, finished)
        arguments = [*overrides(cache, {**QUICK, "init_from": given}), f"run_dir={folder / 'run'}"]
        ended = run(["train.py", *arguments], folder.with_suffix(".log"))
        told = refused(ended, naming=[str(given), given.name])
        hold(not (folder / "run").exists(), "a folder is left of a run that never began")
        return told

    return attempt


def _text(content: bytes, cache: Path) -> Attempt:
    def attempt(folder: Path, chance: random.Random) -> str:
        name = "given.jsonl" if content[:1] in (b"{", b"[") else "given.txt"
        file = folder / name
        file.write_bytes(content)
        settings = {
            **QUICK,
            "data": "text",
            "data.source.size": None,
            "data.source.documents": None,
            "data.paths": f"[{file}]",
            "data.val_fraction": 0.3,
        }
        arguments = [*overrides(cache, settings), f"run_dir={folder / 'run'}"]
        ended = run(["train.py", *arguments], folder / "log")
        return refused(ended, naming=[str(file), "data.", "token"])

    return attempt


def _only_log(folder: Path) -> None:
    left = [file.name for file in folder.iterdir() if file.name != "log"]
    hold(not left, f"it wrote {left}")


def _written(name: str, content: bytes) -> Callable[[Path, Finished], Path]:
    def make(folder: Path, finished: Finished) -> Path:
        file = folder / name
        file.write_bytes(content)
        return file

    return make


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Finished], Path]:
    """A checkpoint of the finished run with a change."""

    def make(folder: Path, finished: Finished) -> Path:
        content = torch.load(finished.run / "checkpoints" / "last.ckpt", weights_only=True)
        change(content)
        file = folder / "changed.ckpt"
        torch.save(content, file)
        return file

    return make


def _cut(folder: Path, finished: Finished) -> Path:
    whole = (finished.run / "checkpoints" / "last.ckpt").read_bytes()
    file = folder / "cut.ckpt"
    file.write_bytes(whole[: len(whole) // 2])
    return file


def _without_checkpoints(folder: Path, finished: Finished) -> Path:
    copy = folder / "run_without"
    shutil.copytree(finished.run, copy, ignore=shutil.ignore_patterns("*.ckpt"))
    return copy


def _hugging_face(
    config: object, header: dict[str, Any] | None
) -> Callable[[Path, Finished], Path]:
    def make(folder: Path, finished: Finished) -> Path:
        model = folder / "model"
        model.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (model / "config.json").write_text(text)
        if header is not None:
            head = json.dumps(header).encode()
            (model / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
        return model

    return make


def _directory(folder: Path, finished: Finished) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


LLAMA = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 257, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
FILES: dict[str, Callable[[Path, Finished], Path]] = {
    "nothing": lambda folder, finished: folder / "nowhere",
    "an empty folder": _directory,
    "an empty file": _written("empty.ckpt", b""),
    "a text": _written("text.ckpt", b"no checkpoint at all\n"),
    "JSON": _written("file.json", b'{"a": 1}'),
    "an empty archive": _written("zip.ckpt", b"PK\x05\x06" + bytes(18)),
    "half a checkpoint": _cut,
    "a run without checkpoints": _without_checkpoints,
    "a checkpoint without weights": _changed(lambda c: c.pop("state_dict")),
    "a checkpoint without a model": _changed(lambda c: c.pop("model_config")),
    "a checkpoint without a tensor": _changed(lambda c: c["state_dict"].popitem()),
    "a tensor of another shape": _changed(
        lambda c: c["state_dict"].update({next(iter(c["state_dict"])): torch.zeros(3)})
    ),
    "a model of no width": _changed(lambda c: c["model_config"]["trunk"].update(d_model=0)),
    "a model of words": _changed(lambda c: c["model_config"]["trunk"].update(n_layers="many")),
    "a list": _changed(lambda c: c.update(model_config=[1, 2])),
    "weights that are words": _changed(lambda c: c.update(state_dict={"a": "b"})),
    "an unknown family": _hugging_face({**LLAMA, "model_type": "nobody"}, {}),
    "a config that is no JSON": _hugging_face("{", {}),
    "a config that is a list": _hugging_face([1], {}),
    "a config without a family": _hugging_face({"hidden_size": 8}, {}),
    "a config without a width": _hugging_face(
        {k: v for k, v in LLAMA.items() if k != "hidden_size"}, {}
    ),
    "a config with a word": _hugging_face({**LLAMA, "hidden_size": "wide"}, {}),
    "a folder without tensors": _hugging_face(LLAMA, None),
    "a folder of no tensor": _hugging_face(LLAMA, {}),
}  # fmt: skip
TEXTS = {
    "empty": b"",
    "one letter": b"a",
    "not UTF-8": b"abc\xff\xfe" * 50,
    "zeros and a torn letter": bytes(3000) + b"\xc3",
    "half a line of JSON": b'{"text": "ab',
    "JSON of another field": b'{"body": "words"}\n' * 40,
    "JSON with a number": b'{"text": 3}\n' * 40,
    "a JSON list": b'["text"]\n' * 40,
}
