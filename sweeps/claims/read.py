"""Reads claims from their files, ``sweeps/claims/NAME.yaml``.

These files are not Hydra configs: an arm is a list of overrides. Unknown keys are refused, because
a misspelled threshold would silently be another prediction.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from mtp_lightning.errors import UserError, suggestion
from mtp_lightning.run.config import read_yaml
from sweeps.claims.claim import EQUALS, PARTS, SIDES, Claim, ClaimMeasure, ClaimPrediction, Scale
from sweeps.report.settings import is_number

FOLDER = Path(__file__).parent
# Keys that may be added after the runs; the digest leaves them out.
_SINCE = ("remark", "superseded_by")
# Keys of a scale that stand in the file itself for the CPU.
_SCALE = ("seeds", "minimum", "minutes")


def names(folder: Path = FOLDER) -> list[str]:
    """The names of the claims in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_claim(
    name: str, folder: Path = FOLDER, *, allow: Collection[str] = (), config_dir: Path | None = None
) -> Claim:
    """Read a claim from its file in a folder. Its arms may name classes of this project and of the
    packages in ``allow``, and configs of this project and of the folder ``config_dir``.

    Raises:
        UserError: there is no such claim, or its file is invalid.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name!r} names no claim: rename its file, to letters, digits, - and _.")
    file = folder / f"{name}.yaml"
    if not file.is_file():
        remedy = suggestion(name, names(folder))
        raise UserError(f"There is no claim {name} in {folder}: {remedy}")
    claim = _ClaimReader(file, allow).claim(name, read_yaml(file))
    flags = [
        *([] if folder.resolve() == FOLDER.resolve() else [("claims", folder)]),
        *(("allow", package) for package in allow),
        *([("config-dir", config_dir)] if config_dir else []),
    ]
    options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in flags)
    return replace(claim, options=options, config_dir=config_dir and config_dir.absolute())


class _ClaimReader:
    """Turns parsed YAML into a claim, or raises a UserError that says what is wrong."""

    def __init__(self, file: Path, allow: Collection[str]) -> None:
        self._file, self._allow = file, allow
        self._arms: list[str] = []  # known after the file's own keys were checked
        self._readers: dict[str, Callable[[str, Any], Any]] = {
            **dict.fromkeys(("sentence", "source", "tag"), self._text),
            **dict.fromkeys(("note", *_SINCE, "published"), self._text_or_none),
            **dict.fromkeys(("by", "expected", "solved", "last", "minutes"), self._number),
            **dict.fromkeys(("arm", "against"), lambda *args: self._one_of(self._arms, *args)),
            "equal": lambda *args: self._one_of(EQUALS, *args),
            "side": lambda *args: self._one_of(SIDES, *args),
            "part": lambda *args: self._one_of(PARTS, *args),
            "shared": self._overrides,
            "seeds": self._seeds,
            "curve": self._curve,
            "measure": self._measure,
            "gpu": self._scale,
        }

    def claim(self, name: str, content: Any) -> Claim:
        not_typed = {"name", "scale", "setting", "digest", "options", "config_dir"}
        allowed = {f.name for f in fields(Claim)} - not_typed | {*_SCALE}
        required = _required(Claim) - not_typed | {*_SCALE}
        arms = content.get("arms") if isinstance(content, dict) else None
        self._arms = [str(arm) for arm in arms] if isinstance(arms, dict) else []
        record = self._record("", content, allowed, required)
        predicted = {key: value for key, value in content.items() if key not in _SINCE}
        if not self._arms:
            self._refuse(f"arms: {arms}", "give a list of overrides for every arm's name")
        if unquoted := [arm for arm in content["arms"] if not isinstance(arm, str)]:
            self._refuse(f"arms: {unquoted[0]}", "write the arm's name in quotes")
        arm_items = record["arms"].items()
        record["arms"] = {str(arm): self._overrides(f"arms.{arm}", o) for arm, o in arm_items}
        predictions = record["predictions"]
        if not isinstance(predictions, list) or not predictions:
            self._refuse(f"predictions: {predictions}", "give a list of at least one")
        record["predictions"] = tuple(
            self._prediction(f"predictions[{i}]", value, record["measure"])
            for i, value in enumerate(predictions)
        )
        text = json.dumps(predicted, sort_keys=True, default=str)
        return Claim(
            name=name,
            scale=self._scale("", {key: record.pop(key) for key in _SCALE}),
            digest=hashlib.sha256(text.encode()).hexdigest(),
            **record,
        )

    def _record(
        self, place: str, value: Any, allowed: Collection[str], required: Collection[str]
    ) -> dict[str, Any]:
        """A mapping of known keys, with values read by their key."""
        prefix = f"{place}." if place else ""
        return {
            key: self._readers[key](f"{prefix}{key}", item) if key in self._readers else item
            for key, item in self._mapping(place, value, allowed, required).items()
        }

    def _mapping(
        self, place: str, value: Any, allowed: Collection[str], required: Collection[str] = ()
    ) -> dict[str, Any]:
        where = f" in {place}" if place else ""
        known, needed = (", ".join(sorted(keys)) for keys in (allowed, required))
        if not isinstance(value, dict):
            named = f"{place}: {value}" if place else f"{value}"
            self._refuse(named, f"give a mapping of {known}")
        if unknown := [key for key in value if key not in allowed]:
            self._refuse(f"the key {unknown[0]}{where}", f"known are {known}")
        if missing := sorted(key for key in required if value.get(key) is None):
            self._refuse(f"no {missing[0]}{where}", f"{needed} are needed")
        return {key: item for key, item in value.items() if item is not None}

    def _prediction(self, place: str, value: Any, default: ClaimMeasure) -> ClaimPrediction:
        allowed = [f.name for f in fields(ClaimPrediction)]
        record = self._record(place, value, allowed, _required(ClaimPrediction) - {"measure"})
        prediction = ClaimPrediction(**{"measure": default, **record})
        if prediction.side == "within" and prediction.by <= 0:
            self._refuse(f"{place}.by: {prediction.by:g}", "within needs a threshold above 0")
        region = f"{place}: {prediction.side} {prediction.by:g}"
        if prediction.measure.is_ratio and (prediction.side == "within" or prediction.by <= 0):
            self._refuse(region, "a gain is a ratio: say above or below, and by a number above 0")
        of_shares = prediction.measure.solved is not None and prediction.against is not None
        if of_shares and (prediction.side == "within" or prediction.by != 0):
            self._refuse(
                region,
                "Fisher's test, which compares two shares of seeds, can only decide above 0 "
                "or below 0",
            )
        return prediction

    def _measure(self, place: str, value: Any) -> ClaimMeasure:
        """``{tag: ..}``, or ``{equivalent: TAG, curve: [ARM, ..], own_curves: {ARM: [ARM, ..]},
        part: effect}``."""
        ratio = isinstance(value, dict) and "equivalent" in value
        allowed = [*(f.name for f in fields(ClaimMeasure)), "equivalent"]
        required = {"curve"} if ratio else _required(ClaimMeasure)
        record = self._record(place, value, allowed, required)
        if ratio:
            record["tag"] = self._text(f"{place}.equivalent", record.pop("equivalent"))
            key = f"{place}.own_curves"
            by_arm = self._mapping(key, record.get("own_curves", {}), self._arms)
            record["own_curves"] = tuple(
                (arm, self._curve(f"{key}.{arm}", plain)) for arm, plain in by_arm.items()
            )
            if "solved" in record:
                self._refuse(f"{place}.solved", "a gain has no level at which it is solved")
        elif record.keys() & {"curve", "own_curves", "part"}:
            self._refuse(f"{place}.curve", "it belongs to equivalent: TAG")
        measure = ClaimMeasure(**record)
        if measure.last is not None and not 0 < measure.last <= 1:
            remedy = "give a part of the run, above 0 up to 1"
            self._refuse(f"{place}.last: {measure.last:g}", remedy)
        return measure

    def _scale(self, place: str, value: Any) -> Scale:
        allowed = [f.name for f in fields(Scale)]
        record = self._record(place, value, allowed, _required(Scale))
        key = f"{place}.arms"
        by_arm = self._mapping(key, record.get("arms", {}), self._arms)
        record["arms"] = {arm: self._overrides(f"{key}.{arm}", o) for arm, o in by_arm.items()}
        most = len(record["seeds"])
        if type(record["minimum"]) is not int or not 2 <= record["minimum"] <= most:
            self._refuse(
                f"{place}.minimum: {record['minimum']}".lstrip("."),
                f"give 2 (one seed has no interval) to {most} (the number of seeds)",
            )
        return Scale(**record)

    def _seeds(self, place: str, seeds: Any) -> tuple[int, ...]:
        is_list = isinstance(seeds, list | tuple)
        whole = is_list and all(type(s) is int and s >= 0 for s in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self._refuse(f"{place}: {seeds}", "give a list of different whole numbers >= 0")
        return tuple(seeds)

    def _curve(self, place: str, plain: Any) -> tuple[str, ...]:
        are_arms = isinstance(plain, list) and all(arm in self._arms for arm in plain)
        if not are_arms or len(plain) < 2:
            self._refuse(f"{place}: {plain}", "give at least two arms of plain runs")
        return tuple(plain)

    def _overrides(self, place: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(
            isinstance(o, str) and ("=" in o or o.startswith("~")) for o in value
        ):
            self._refuse(f"{place}: {value}", "give a list of overrides such as mtp.depth=2")
        if seeds := [o for o in value if o.startswith("seed=")]:
            self._refuse(f"{place}: {seeds[0]}", "seeds: says which seeds are run")
        from sweeps.trust import require_plain  # hydra

        for override in value:
            require_plain(override, source=f"{self._file}: {place}", allow=self._allow)
        return tuple(value)

    def _one_of(self, choices: Collection[str], place: str, value: Any) -> Any:
        if value not in list(choices):
            self._refuse(f"{place}: {value}", f"choose one of {', '.join(choices)}")
        return value

    def _number(self, place: str, value: Any) -> float:
        if not is_number(value) or not abs(value) < 1e300:
            self._refuse(f"{place}: {value}", "give a number")
        return float(value)

    def _text(self, place: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self._refuse(f"{place}: {value}", "give a text")
        return value.strip()

    def _text_or_none(self, place: str, value: Any) -> str:
        return "" if value == "" else self._text(place, value)

    def _refuse(self, problem: str, remedy: str) -> NoReturn:
        raise UserError(f"{self._file} has {problem}: {remedy}.")


def _required(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
