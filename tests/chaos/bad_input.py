"""Bad input: a wrong value or file ends in one sentence with the value, and nothing is written.

The values come from the comments of ``conf/``, which describe every key: a word for a number, a
number outside its range, an unknown choice. The files and folders are damaged or of another kind.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.command_line.conf_comments import included, read_option
from tests.chaos.cases import Case, hold
from tests.chaos.given import (
    AS_TEXT,
    LLAMA,
    QUICK,
    Command,
    Finished,
    Make,
    Place,
    app,
    changed,
    safetensors,
    train,
    written,
)
from tests.chaos.jobs import TASK
from tests.chaos.processes import Ended, run
from tests.integration.helpers import CONF, overrides

# The settings with which an option is a sound run; None for one that needs a package, a network or
# a model.
_NEEDS: dict[str, dict[str, Any] | None] = {
    "data/huggingface": None, "data/self_generated": None, "data/shakespeare": None,
    "data/stdlib": None, "data/text": None, "data/tokens": None, "logger/mlflow": None,
    "logger/wandb": None, "logger/trackio": None, "tokenizer/pretrained": None,
    "tokenizer/ids": None, "objective/nextlat": None, "callbacks/early_stopping": None,
    "callbacks/stop_when_solved": {**TASK, "data": "copy"}, "model/deepseek_v3": None,
    "optimizer/muon": {"optimizer.lr": None}, "mtp/none": {"mtp.depth": None},
    "mtp/top": {"mtp.depth": 1}, "mtp/bag": {"mtp.depth": 1}, "mtp/registers": {"mtp.depth": 1},
    "mtp/teacherless": None,
}  # fmt: skip
# Keys that interpolate others, or take any value.
_FREE = {"depth", "accumulate", "tokenizer", "cache_dir", "mtp_lambda", "stride"}
_GROUPS = (
    "balance", "callbacks", "compare", "data", "lambda_schedule", "mtp", "objective", "optimizer",
    "optimizer/schedule", "tokenizer", "trainer",
)  # fmt: skip


def cases(folder: Path) -> list[Case]:
    """Keys of all groups and apps with wrong values, and wrong files."""
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
            of_file = read_option(file, group)
            # The keys of one schedule's file are mostly those that all schedules share.
            files = included(of_file) if group == "lambda_schedule" else [of_file]
            for key in (key for part in files for key in part.keys):
                path = f"{group.replace('/', '.')}.{key.name}"
                if path.rpartition(".")[2] in _FREE:
                    continue
                for value in wrong_values(key.comment):
                    attempt = partial(_train_with, path, value, settings, cache, option, sound)
                    made.append(Case("bad input", f"{option} {path}={value}", attempt))
    for name in ("generate", "evaluate", "export"):
        for key in read_option(CONF / f"{name}.yaml", "").keys:
            for value in wrong_values(key.comment):
                attempt = partial(_app_with, name, f"{key.name}={value}", finished)
                made.append(Case("bad input", f"{name} {key.name}={value}", attempt))
        for what, make in FILES.items():
            made.append(_of_file(f"{name} of {what}", make, app(name), finished))
    start = train("init_from", cache)
    for what, make in FILES.items():
        if what != "nothing":
            made.append(_of_file(f"init_from {what}", make, start, finished))
    read = train("data.paths", cache, {**AS_TEXT, "data.val_fraction": 0.3})
    for what, content in TEXTS.items():
        make = written("given.jsonl" if content[:1] in (b"{", b"[") else "given.txt", content)
        name, naming = f"a text that is {what}", ("data.", "token")
        made.append(_of_file(name, make, read, finished, naming=naming))
    return made


def wrong_values(takes: str) -> list[str]:
    """Wrong values, as typed, of a key whose comment ends in ``takes``."""
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


def refused(ended: Ended, *, naming: list[str]) -> str:
    """Hold that it ended with code 1 and one sentence; the sentence.

    Args:
        ended: how it ended.
        naming: words, one of which must be in the sentence.
    """
    hold(ended.code != 0, "it is accepted")
    ended.require(1)
    sentence = ended.errors[0] if ended.errors else ended.out.strip()
    hold(
        len(ended.errors) <= 1 and len(ended.out.strip().splitlines()) <= 30,
        f"it says {ended.out[:1500]}",
    )
    hold("is not a key" not in sentence, f"the case itself is wrong: {sentence[:500]}")
    hold(any(word in sentence for word in naming), f"it does not name it: {sentence[:500]}")
    return sentence[:160].replace("\n", " ")


def _train_with(
    key: str,
    value: str,
    settings: dict[str, Any],
    cache: Path,
    option: str,
    sound: dict[str, None],
    folder: Path,
    chance: random.Random,
) -> str:
    if option not in sound:  # else a refusal would prove nothing
        given = [*overrides(cache, settings), f"run_dir={folder / 'sound'}"]
        ended = run(["train.py", *given], folder / "sound.log")
        hold(ended.code == 0, f"without a fault it fails: {ended.out[-1500:]}")
        sound[option] = None
    given = [*overrides(cache, {**settings, key: value}), f"run_dir={folder / 'run'}"]
    ended = run(["train.py", *given], folder / "log")
    sentence = refused(ended, naming=[value, key, key.rpartition(".")[2]])
    hold(not (folder / "run").exists(), "a refused run left a folder")
    return sentence


def _app_with(
    name: str, given: str, finished: Finished, folder: Path, chance: random.Random
) -> str:
    before = finished.as_it_is()
    ended = run(app(name, given)(finished.run, folder), folder / "log", folder=folder)
    key, _, value = given.partition("=")
    sentence = refused(ended, naming=[value, key])
    hold(finished.as_it_is() == before, "the run's folder was changed")
    _wrote_nothing(folder, [])
    return sentence


def _of_file(
    name: str, make: Make, command: Command, finished: Finished, *, naming: Sequence[str] = ()
) -> Case:
    """A command with a wrong file or folder."""

    def attempt(folder: Path, chance: random.Random) -> str:
        given = make(Place(folder, finished))
        before = sorted(folder.rglob("*"))
        ended = run(command(given, folder), folder / "log", folder=folder)
        sentence = refused(ended, naming=[str(given), given.name, *naming])
        _wrote_nothing(folder, before)
        return sentence

    return Case("bad input", name, attempt)


def _wrote_nothing(folder: Path, before: list[Path]) -> None:
    left = sorted(path for path in folder.rglob("*") if path.name != "log")
    hold(left == before, f"it wrote {[path.name for path in left if path not in before]}")


def _empty(place: Place) -> Path:
    (place.given / "empty").mkdir()
    return place.given / "empty"


def _cut(place: Place) -> Path:
    whole = place.finished.checkpoint.read_bytes()
    return place.write("cut.ckpt", whole[: len(whole) // 2])


def _without_checkpoints(place: Place) -> Path:
    return shutil.copytree(
        place.finished.run, place.given / "run", ignore=shutil.ignore_patterns("*.ckpt")
    )


def _hugging_face(config: object) -> Make:
    """A folder without a tensor."""
    return lambda place: place.model(config, model__safetensors=safetensors({}))


FILES: dict[str, Make] = {
    "nothing": lambda place: place.given / "nowhere",
    "an empty folder": _empty,
    "an empty file": written("empty.ckpt", b""),
    "a text": written("text.ckpt", b"no checkpoint at all\n"),
    "JSON": written("file.json", b'{"a": 1}'),
    "an empty archive": written("zip.ckpt", b"PK\x05\x06" + bytes(18)),
    "half a checkpoint": _cut,
    "a run without checkpoints": _without_checkpoints,
    "a checkpoint without weights": changed(lambda c: c.pop("state_dict")),
    "a checkpoint without a model": changed(lambda c: c.pop("model_config")),
    "a checkpoint without a tensor": changed(lambda c: c["state_dict"].popitem()),
    "a tensor of another shape": changed(
        lambda c: c["state_dict"].update({next(iter(c["state_dict"])): torch.zeros(3)})
    ),
    "a model of no width": changed(lambda c: c["model_config"]["trunk"].update(d_model=0)),
    "a model of words": changed(lambda c: c["model_config"]["trunk"].update(n_layers="many")),
    "a list": changed(lambda c: c.update(model_config=[1, 2])),
    "weights that are words": changed(lambda c: c.update(state_dict={"a": "b"})),
    "an unknown family": _hugging_face({**LLAMA, "model_type": "nobody"}),
    "a config that is not JSON": _hugging_face("{"),
    "a config that is a list": _hugging_face([1]),
    "a config without a family": _hugging_face({"hidden_size": 8}),
    "a config without a width": _hugging_face({k: LLAMA[k] for k in LLAMA if k != "hidden_size"}),
    "a config with a word": _hugging_face({**LLAMA, "hidden_size": "wide"}),
    "a folder without tensors": lambda place: place.model(LLAMA),
    "a folder of no tensor": _hugging_face(LLAMA),
}  # fmt: skip
TEXTS = {
    "empty": b"", "one letter": b"a", "not UTF-8": b"abc\xff\xfe" * 50,
    "zeros and a torn letter": bytes(3000) + b"\xc3", "half a line of JSON": b'{"text": "ab',
    "JSON of another field": b'{"body": "words"}\n' * 40,
    "JSON with a number": b'{"text": 3}\n' * 40, "a JSON list": b'["text"]\n' * 40,
}  # fmt: skip
