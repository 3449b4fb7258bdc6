"""Claims and observations written by hand, whose verdicts are known."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps.claims.claim import Claim
from sweeps.claims.observe import ArmRun, Arms
from sweeps.claims.pages import BEGIN, END
from sweeps.claims.preregistration import Preregistration, write_preregistration
from sweeps.claims.read import read_claim
from sweeps.claims.result import Result, make_result


def predict(arm: str, side: str, by: float | None = None, **more: Any) -> dict[str, Any]:
    """A prediction in a claim's file; None leaves a key out."""
    given = {"arm": arm, "side": side, "by": by, **more}
    return {key: value for key, value in given.items() if value is not None}


CONTENT: dict[str, Any] = {
    "sentence": "MTP helps.", "source": "Somebody 2024, arXiv 2404.00000", "equal": "steps",
    "seeds": [0, 1, 2, 3, 4], "minimum": 3, "minutes": 7, "shared": ["mtp.depth=2"],
    "arms": {"plain": ["mtp=none", "mtp.depth=0"], "mtp": ["mtp=sequential"]},
    "measure": {"tag": "val/bits_per_byte"},
    "predictions": [predict("mtp", "below", against="plain")],
}  # fmt: skip
PLAIN = (2.00, 2.10, 1.95, 2.05, 2.02)
NOISE = (0.000, 0.004, -0.003, 0.002, -0.001)
BEGAN = ("2026-11-25T09:00:00+00:00", "d" * 40)
SOLVED = {"tag": "val/exact_match", "solved": 0.95}


class _NoAlias(yaml.SafeDumper):
    """Writes repeated values in full, since a claim's file has no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_claim(folder: Path, name: str = "mine", **changes: Any) -> Path:
    """A claim's file: CONTENT with changes; a change to None leaves the key out."""
    content = {k: v for k, v in {**CONTENT, **changes}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.dump(content, Dumper=_NoAlias, sort_keys=False))
    return file


def claim_of(folder: Path, name: str = "mine", **changes: Any) -> Claim:
    """The claim that :func:`write_claim`'s file gives."""
    write_claim(folder, name, **changes)
    return read_claim(name, folder)


def own_conf(folder: Path) -> Path:
    """A folder of configs with ``mtp=mine``: parallel heads, with two depths."""
    (folder / "mtp").mkdir(parents=True)
    (folder / "mtp" / "mine.yaml").write_text("defaults: [parallel, _self_]\ndepth: 2\n")
    return folder


def observed(
    claim: Claim,
    values: Mapping[str, Sequence[float | None | str]],
    *,
    costs: Mapping[str, float] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Arms:
    """Runs by arm: for every seed the claim's first measure, None for a run without that number, or
    the state of one that is not done.

    Args:
        claim: its first measure is observed.
        values: of seeds 0, 1, ..
        costs: cost in the claim's ``equal``, by arm; 1,000 by default.
        texts: fingerprints of the evaluation text by arm.
    """
    measure = claim.measures[0]
    arms: dict[str, dict[int, ArmRun]] = {}
    for arm, of_arm in values.items():
        arms[arm] = {}
        for seed, value in enumerate(of_arm):
            if isinstance(value, str):
                arms[arm][seed] = ArmRun(folder=f"{arm}-{seed}", state=value)
                continue
            arms[arm][seed] = finished(
                f"{arm}-{seed}",
                values={} if value is None else {measure.key: value},
                costs={claim.equal: (costs or {}).get(arm, 1000.0), "seconds": 60.0},
                text=(texts or {}).get(arm, "e" * 32),
            )
    return arms


def result_of(claim: Claim, values: Mapping[str, Sequence[float | None | str]]) -> Result:
    """The result of runs with these values, predicted in a commit."""
    return make_result(claim, observed(claim, values), BEGAN)


def register(
    claim: Claim, runs: Path, folders: Any = None, *, commit: str | None = None
) -> Preregistration:
    """Store that a claim's runs were begun, in these folders by arm and seed."""
    stored = Preregistration(digest=claim.digest, commit=commit, runs=folders or {})
    write_preregistration(stored, claim, runs)
    return stored


def moved(by: float, scale: float = 1.0) -> tuple[float, ...]:
    """PLAIN plus ``by`` and a little noise, seed by seed."""
    return tuple(p + by + scale * e for p, e in zip(PLAIN, NOISE, strict=True))


def rights(solved: int, n: int = 8) -> list[float]:
    return [0.96] * solved + [0.5] * (n - solved)


def run(*arguments: object) -> int:
    """The command's exit code."""
    from sweeps.claims.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """The command's output, or its standard error if it fails."""
    capsys.readouterr()
    assert run(*arguments) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def root(folder: Path) -> Path:
    """Write pages with markers into a folder, and return it."""
    (folder / "docs").mkdir()
    for page in (folder / "docs" / "results.md", folder / "README.md"):
        page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return folder


def measured_speeds(folder: Path, rows: list[dict[str, Any]], name: str = "", **more: Any) -> None:
    """Write what ``benchmarks.pretrained_heads`` measures into a checkout's folder."""
    file = folder / "benchmarks" / "results" / f"pretrained_heads{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": rows, **more}))


def finished(folder: str, **facts: Any) -> ArmRun:
    """A finished run; ``facts`` replace the usual ones."""
    usual = {"text": "e" * 32, "machine": "Linux x86_64, 2 cores", "commit": "c" * 40}
    usual["ended"] = "2026-11-25T10:00:00+00:00"
    return ArmRun(folder=folder, state="done", **usual | facts)


def commit(folder: Path) -> str:
    """Commit a folder to a new repository in it; returns the commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "predict"]):
        subprocess.run([*git, *arguments], check=True)
    said = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return said.stdout.strip()
