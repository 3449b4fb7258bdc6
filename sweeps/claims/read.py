"""Reads claims from their files, ``sweeps/claims/NAME.yaml``.

These files are not Hydra configs: an arm is a list of overrides. Unknown keys are refused, because
a misspelled threshold would silently be another prediction.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.run.config import read_yaml
from sweeps.claims.claim import EQUALS, PARTS, SIDES, Claim, Measure, Prediction, Scale

FOLDER = Path(__file__).parent
# Keys that may be added after the runs; the digest leaves them out.
_SINCE = ("remark", "superseded_by")


def names(folder: Path = FOLDER) -> list[str]:
    """The names of the claims in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_claim(name: str, folder: Path = FOLDER, *, allow: Collection[str] = ()) -> Claim:
    """Read a claim from its file.

    Args:
        name: the claim's.
        folder: the folder of its file.
        allow: packages whose classes its arms may name, besides this project's own.

    Raises:
        UserError: there is no such claim, or its file is invalid.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name!r} names no claim: rename its file, to letters, digits, - and _.")
    file = folder / f"{name}.yaml"
    own = folder.resolve() == FOLDER.resolve()
    if not file.is_file():
        known = ", ".join(names(folder)) or "none"
        raise UserError(f"There is no claim {name} in {folder}: choose one of {known}.")
    found = _Reader(file, allow).claim(name, read_yaml(file))
    return replace(found, folder="" if own else str(folder))


class _Reader:
    """Turns parsed YAML into a claim, or raises a UserError that says what is wrong."""

    def __init__(self, file: Path, allow: Collection[str]) -> None:
        self._file, self._allow = file, allow

    def claim(self, name: str, content: Any) -> Claim:
        own = set(_keys(Claim)) - {"name", "scale", "setting", "digest", "folder"}
        scale_keys = set(_keys(Scale)) - {"shared", "arms"}
        given = self._mapping("the file", content, own | scale_keys)
        self._need("the file", given, _needed(Claim) - {"name", "scale", "digest"} | scale_keys)
        for key in ("sentence", "source"):
            self._text(key, given[key])
        for key in ("note", *_SINCE):
            self._text(key, given.get(key, ""), empty=True)
        predicted = {key: value for key, value in content.items() if key not in _SINCE}
        if given["equal"] not in EQUALS:
            self._refuse(f"equal: {given['equal']}", f"choose one of {', '.join(EQUALS)}")
        arms = given["arms"]
        if not isinstance(arms, dict) or not arms:
            self._refuse(f"arms: {arms}", "give a list of overrides for every arm's name")
        measure = self._measure("measure", given["measure"], arms)
        arms = {str(arm): self._overrides(f"arms.{arm}", value) for arm, value in arms.items()}
        predictions = given["predictions"]
        if not isinstance(predictions, list) or not predictions:
            self._refuse(f"predictions: {predictions}", "give a list of at least one")
        scale = {key: given[key] for key in scale_keys}
        gpu = given.get("gpu")
        return Claim(
            name=name,
            sentence=given["sentence"].strip(),
            source=given["source"].strip(),
            note=given.get("note", "").strip(),
            remark=given.get("remark", "").strip(),
            superseded_by=given.get("superseded_by", ""),
            equal=given["equal"],
            shared=self._overrides("shared", given["shared"]),
            arms=arms,
            measure=measure,
            predictions=tuple(
                self._prediction(f"predictions[{i}]", value, arms, measure)
                for i, value in enumerate(predictions)
            ),
            scale=self._scale("the file", scale, arms),
            digest=hashlib.sha256(
                json.dumps(predicted, sort_keys=True, default=str).encode()
            ).hexdigest(),
            gpu=None if gpu is None else self._scale("gpu", gpu, arms),
        )

    def _prediction(
        self, place: str, value: Any, arms: Mapping[str, Any], default: Measure
    ) -> Prediction:
        given = dict(self._mapping(place, value, _keys(Prediction)))
        self._need(place, given, _needed(Prediction) - {"measure"})
        for key in ("arm", "against"):
            if given.get(key) is not None and given[key] not in list(arms):
                self._refuse(f"{place}.{key}: {given[key]}", f"choose one of {', '.join(arms)}")
        if given["side"] not in SIDES:
            self._refuse(f"{place}.side: {given['side']}", f"choose one of {', '.join(SIDES)}")
        for key in ("by", "expected"):
            if given.get(key) is not None:
                given[key] = self._number(f"{place}.{key}", given[key])
        own = given.get("measure")
        given["measure"] = default if own is None else self._measure(f"{place}.measure", own, arms)
        self._text(f"{place}.published", given.get("published", ""), empty=True)
        found = Prediction(**given)
        if found.side == "within" and found.by <= 0:
            self._refuse(f"{place}.by: {found.by:g}", "within needs a threshold above 0")
        if found.measure.is_ratio and (found.side == "within" or found.by <= 0):
            self._refuse(
                f"{place}: {found.side} {found.by:g}",
                "a gain is a ratio: say above or below, and by a number above 0",
            )
        of_shares = found.measure.solved is not None and found.against is not None
        if of_shares and (found.side == "within" or found.by != 0):
            self._refuse(
                f"{place}: {found.side} {found.by:g}",
                "Fisher's test, which compares two shares of seeds, can only decide above 0 "
                "or below 0",
            )
        return found

    def _measure(self, place: str, value: Any, arms: Mapping[str, Any]) -> Measure:
        """``{tag: ..}``, or ``{equivalent: TAG, curve: [ARM, ..], own_curves: {ARM: [ARM, ..]},
        part: effect}``."""
        given = dict(self._mapping(place, value, [*_keys(Measure), "equivalent"]))
        if "equivalent" in given:
            given["tag"] = given.pop("equivalent")
            self._need(place, given, {"curve"})
            given["curve"] = self._curve(f"{place}.curve", given["curve"], arms)
            own = self._mapping(f"{place}.own_curves", given.get("own_curves", {}), list(arms))
            given["own_curves"] = tuple(
                (arm, self._curve(f"{place}.own_curves.{arm}", plain, arms))
                for arm, plain in own.items()
            )
            if given.setdefault("part", "total") not in PARTS:
                self._refuse(f"{place}.part: {given['part']}", f"choose {' or '.join(PARTS)}")
            if given.get("solved") is not None:
                self._refuse(f"{place}.solved", "a gain has no level at which it is solved")
        elif given.keys() & {"curve", "own_curves", "part"}:
            self._refuse(f"{place}.curve", "it belongs to equivalent: TAG")
        self._need(place, given, _needed(Measure))
        self._text(f"{place}.tag", given["tag"])
        for key in ("solved", "last"):
            if given.get(key) is not None:
                given[key] = self._number(f"{place}.{key}", given[key])
        found = Measure(**given)
        if found.last is not None and not 0 < found.last <= 1:
            self._refuse(f"{place}.last: {found.last:g}", "give a part of the run, above 0 up to 1")
        return found

    def _curve(self, place: str, plain: Any, arms: Mapping[str, Any]) -> tuple[str, ...]:
        if not isinstance(plain, list) or len(plain) < 2 or not set(plain) <= set(arms):
            self._refuse(f"{place}: {plain}", "give at least two arms of plain runs")
        return tuple(plain)

    def _scale(self, place: str, value: Any, arms: Mapping[str, Any]) -> Scale:
        given = dict(self._mapping(place, value, _keys(Scale)))
        self._need(place, given, _needed(Scale))
        if given.get("shared") is not None:
            given["shared"] = self._overrides(f"{place}.shared", given["shared"])
        own = self._mapping(f"{place}.arms", given.get("arms", {}), list(arms))
        given["arms"] = {a: self._overrides(f"{place}.arms.{a}", o) for a, o in own.items()}
        seeds = given["seeds"]
        whole = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self._refuse(f"{place}.seeds: {seeds}", "give a list of different whole numbers >= 0")
        given["seeds"] = tuple(seeds)
        if type(given["minimum"]) is not int or not 2 <= given["minimum"] <= len(seeds):
            self._refuse(
                f"{place}.minimum: {given['minimum']}",
                f"give 2 to {len(seeds)}: one seed has no interval, and there are as many as that",
            )
        given["minutes"] = self._number(f"{place}.minutes", given["minutes"])
        return Scale(**given)

    def _overrides(self, place: str, value: Any) -> tuple[str, ...]:
        listed = isinstance(value, list) and all(
            isinstance(o, str) and ("=" in o or o.startswith("~")) for o in value
        )
        if not listed:
            self._refuse(f"{place}: {value}", "give a list of overrides such as mtp.depth=2")
        seeds = [o for o in value if o.startswith("seed=")]
        if seeds:
            self._refuse(f"{place}: {seeds[0]}", "seeds: says which seeds are run")
        from sweeps.trust import require_plain  # hydra

        for override in value:
            require_plain(override, source=f"{self._file}: {place}", allow=self._allow)
        return tuple(value)

    def _mapping(self, place: str, value: Any, known: Sequence[str] | set[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(f"{place}: {value}", f"give a mapping of {', '.join(sorted(known))}")
        for key in value:
            if key not in known:
                where = "" if place == "the file" else f" in {place}"
                self._refuse(f"the key {key}{where}", f"known are {', '.join(sorted(known))}")
        return value

    def _need(self, place: str, given: Mapping[str, Any], needed: set[str]) -> None:
        missing = sorted(key for key in needed if given.get(key) is None)
        if missing:
            self._refuse(f"{place} without {missing[0]}", f"{', '.join(sorted(needed))} are needed")

    def _number(self, place: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e300:
            self._refuse(f"{place}: {value}", "give a number")
        return float(value)

    def _text(self, place: str, value: Any, *, empty: bool = False) -> None:
        if not isinstance(value, str) or not (value.strip() or empty):
            self._refuse(f"{place}: {value}", "give a text")

    def _refuse(self, what: str, remedy: str) -> None:
        raise UserError(f"{self._file} has {what}: {remedy}.")


def _keys(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def _needed(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
