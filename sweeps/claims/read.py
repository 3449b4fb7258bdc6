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

FOLDER = Path(__file__).parent
# Keys that may be added after the runs; the digest leaves them out.
_SINCE = ("remark", "superseded_by")
# Keys of a scale that stand in the file itself for the CPU.
_SCALE = ("seeds", "minimum", "minutes")


def names(folder: Path = FOLDER) -> list[str]:
    """The names of the claims in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_claim(
    name: str,
    folder: Path = FOLDER,
    *,
    allow: Collection[str] = (),
    config_dir: Path | None = None,
) -> Claim:
    """Read a claim from its file in a folder. Its arms may name classes of this project and of the
    packages in ``allow``, and configs of this project and of the folder ``config_dir``.

    Raises:
        UserError: there is no such claim, or its file is invalid.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name!r} names no claim: rename its file, to letters, digits, - and _.")
    file = folder / f"{name}.yaml"
    own = folder.resolve() == FOLDER.resolve()
    if not file.is_file():
        remedy = suggestion(name, names(folder))
        raise UserError(f"There is no claim {name} in {folder}: {remedy}")
    found = _ClaimReader(file, allow).claim(name, read_yaml(file))
    given = [
        *([] if own else [("claims", folder)]),
        *(("allow", package) for package in allow),
        *([("config-dir", config_dir)] if config_dir else []),
    ]
    options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given)
    return replace(found, options=options, config_dir=config_dir and config_dir.absolute())


class _ClaimReader:
    """Turns parsed YAML into a claim, or raises a UserError that says what is wrong."""

    def __init__(self, file: Path, allow: Collection[str]) -> None:
        self._file, self._allow = file, allow
        self._arms: list[str] = []  # known after the file's own keys were checked
        self._readers: dict[str, Callable[[str, Any], Any]] = {
            **dict.fromkeys(("sentence", "source", "tag"), self._text),
            **dict.fromkeys(("note", *_SINCE, "published"), self._text_or_none),
            **dict.fromkeys(("by", "expected", "solved", "last", "minutes"), self._number),
            **dict.fromkeys(("arm", "against"), lambda *at: self._one_of(self._arms, *at)),
            "equal": lambda *at: self._one_of(EQUALS, *at),
            "side": lambda *at: self._one_of(SIDES, *at),
            "part": lambda *at: self._one_of(PARTS, *at),
            "shared": self._overrides,
            "seeds": self._seeds,
            "curve": self._curve,
        }

    def claim(self, name: str, content: Any) -> Claim:
        not_typed = {"name", "scale", "setting", "digest", "options", "config_dir"}
        known = {f.name for f in fields(Claim)} - not_typed | {*_SCALE}
        needed = _needed(Claim) - not_typed | {*_SCALE}
        arms = content.get("arms") if isinstance(content, dict) else None
        self._arms = [str(arm) for arm in arms] if isinstance(arms, dict) else []
        given = self._record("", content, known, needed)
        predicted = {key: value for key, value in content.items() if key not in _SINCE}
        if not self._arms:
            self._refuse(f"arms: {arms}", "give a list of overrides for every arm's name")
        given["arms"] = {str(a): self._overrides(f"arms.{a}", o) for a, o in given["arms"].items()}
        measure = given["measure"] = self._measure("measure", given["measure"])
        predictions = given["predictions"]
        if not isinstance(predictions, list) or not predictions:
            self._refuse(f"predictions: {predictions}", "give a list of at least one")
        given["predictions"] = tuple(
            self._prediction(f"predictions[{i}]", value, measure)
            for i, value in enumerate(predictions)
        )
        if given.get("gpu") is not None:
            given["gpu"] = self._scale("gpu", given["gpu"])
        text = json.dumps(predicted, sort_keys=True, default=str)
        return Claim(
            name=name,
            scale=self._scale("", {key: given.pop(key) for key in _SCALE}),
            digest=hashlib.sha256(text.encode()).hexdigest(),
            **given,
        )

    def _record(
        self, place: str, value: Any, known: Collection[str], needed: Collection[str]
    ) -> dict[str, Any]:
        """A mapping whose keys are known, with values read by their key."""
        if not isinstance(value, dict):
            what = f"{place}: " if place else ""
            self._refuse(f"{what}{value}", f"give a mapping of {', '.join(sorted(known))}")
        for key in value:
            if key not in known:
                where = f" in {place}" if place else ""
                self._refuse(f"the key {key}{where}", f"known are {', '.join(sorted(known))}")
        missing = sorted(key for key in needed if value.get(key) is None)
        if missing:
            what = f"{place or 'the file'} without {missing[0]}"
            self._refuse(what, f"{', '.join(sorted(needed))} are needed")
        at = f"{place}." if place else ""
        return {
            key: self._readers[key](f"{at}{key}", one) if key in self._readers else one
            for key, one in value.items()
            if one is not None
        }

    def _prediction(self, place: str, value: Any, default: ClaimMeasure) -> ClaimPrediction:
        known = [f.name for f in fields(ClaimPrediction)]
        given = self._record(place, value, known, _needed(ClaimPrediction) - {"measure"})
        own = given.get("measure")
        given["measure"] = default if own is None else self._measure(f"{place}.measure", own)
        found = ClaimPrediction(**given)
        if found.side == "within" and found.by <= 0:
            self._refuse(f"{place}.by: {found.by:g}", "within needs a threshold above 0")
        said = f"{place}: {found.side} {found.by:g}"
        if found.measure.is_ratio and (found.side == "within" or found.by <= 0):
            self._refuse(said, "a gain is a ratio: say above or below, and by a number above 0")
        of_shares = found.measure.solved is not None and found.against is not None
        if of_shares and (found.side == "within" or found.by != 0):
            self._refuse(
                said,
                "Fisher's test, which compares two shares of seeds, can only decide above 0 "
                "or below 0",
            )
        return found

    def _measure(self, place: str, value: Any) -> ClaimMeasure:
        """``{tag: ..}``, or ``{equivalent: TAG, curve: [ARM, ..], own_curves: {ARM: [ARM, ..]},
        part: effect}``."""
        ratio = isinstance(value, dict) and "equivalent" in value
        known = [*(f.name for f in fields(ClaimMeasure)), "equivalent"]
        given = self._record(place, value, known, {"curve"} if ratio else _needed(ClaimMeasure))
        if ratio:
            given["tag"] = self._text(f"{place}.equivalent", given.pop("equivalent"))
            at = f"{place}.own_curves"
            own = self._record(at, given.get("own_curves", {}), self._arms, ())
            curves = ((arm, self._curve(f"{at}.{arm}", plain)) for arm, plain in own.items())
            given["own_curves"] = tuple(curves)
            if "solved" in given:
                self._refuse(f"{place}.solved", "a gain has no level at which it is solved")
        elif given.keys() & {"curve", "own_curves", "part"}:
            self._refuse(f"{place}.curve", "it belongs to equivalent: TAG")
        found = ClaimMeasure(**given)
        if found.last is not None and not 0 < found.last <= 1:
            self._refuse(f"{place}.last: {found.last:g}", "give a part of the run, above 0 up to 1")
        return found

    def _scale(self, place: str, value: Any) -> Scale:
        known = [f.name for f in fields(Scale)]
        given = self._record(place, value, known, _needed(Scale))
        at = f"{place}.arms"
        own = self._record(at, given.get("arms", {}), self._arms, ())
        given["arms"] = {arm: self._overrides(f"{at}.{arm}", o) for arm, o in own.items()}
        most = len(given["seeds"])
        if type(given["minimum"]) is not int or not 2 <= given["minimum"] <= most:
            self._refuse(
                f"{place}.minimum: {given['minimum']}".lstrip("."),
                f"give 2 to {most}: one seed has no interval, and there are as many as that",
            )
        return Scale(**given)

    def _seeds(self, place: str, seeds: Any) -> tuple[int, ...]:
        listed = isinstance(seeds, list | tuple)
        whole = listed and all(type(s) is int and s >= 0 for s in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self._refuse(f"{place}: {seeds}", "give a list of different whole numbers >= 0")
        return tuple(seeds)

    def _curve(self, place: str, plain: Any) -> tuple[str, ...]:
        if not isinstance(plain, list) or len(plain) < 2 or not set(plain) <= set(self._arms):
            self._refuse(f"{place}: {plain}", "give at least two arms of plain runs")
        return tuple(plain)

    def _overrides(self, place: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(
            isinstance(o, str) and ("=" in o or o.startswith("~")) for o in value
        ):
            self._refuse(f"{place}: {value}", "give a list of overrides such as mtp.depth=2")
        seeds = [o for o in value if o.startswith("seed=")]
        if seeds:
            self._refuse(f"{place}: {seeds[0]}", "seeds: says which seeds are run")
        from sweeps.trust import require_plain  # hydra

        for override in value:
            require_plain(override, source=f"{self._file}: {place}", allow=self._allow)
        return tuple(value)

    def _one_of(self, known: Collection[str], place: str, value: Any) -> Any:
        if value not in list(known):
            self._refuse(f"{place}: {value}", f"choose one of {', '.join(known)}")
        return value

    def _number(self, place: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e300:
            self._refuse(f"{place}: {value}", "give a number")
        return float(value)

    def _text(self, place: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self._refuse(f"{place}: {value}", "give a text")
        return value.strip()

    def _text_or_none(self, place: str, value: Any) -> str:
        return "" if value == "" else self._text(place, value)

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise UserError(f"{self._file} has {what}: {remedy}.")


def _needed(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
