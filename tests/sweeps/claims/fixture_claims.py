"""Claims and observations with known verdicts, and calls of the claims' command."""

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
    """A prediction as in a claim's file; None leaves a key out."""
    prediction = {"arm": arm, "side": side, "by": by, **more}
    return {key: value for key, value in prediction.items() if value is not None}


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


def conf_with_own_head(folder: Path) -> Path:
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
    """Runs by arm and seed.

    Args:
        values: by arm the claim's first measure at seeds 0, 1, ..; None for a run without that
            number, or the state of a run that is not done.
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
            arms[arm][seed] = finished_run(
                f"{arm}-{seed}",
                values={} if value is None else {measure.key: value},
                costs={claim.equal: (costs or {}).get(arm, 1000.0), "seconds": 60.0},
                text=(texts or {}).get(arm, "e" * 32),
            )
    return arms


def result_of(claim: Claim, values: Mapping[str, Any] | None = None) -> Result:
    """The result of runs with these values, predicted in a commit. By default the arm ``mtp`` is
    lower than ``plain`` by 0.05, beyond noise."""
    values = values or {"plain": PLAIN, "mtp": shifted(-0.05)}
    return make_result(claim, observed(claim, values), BEGAN)


def register(
    claim: Claim, runs: Path, folders: Any = None, *, commit: str | None = None
) -> Preregistration:
    """Store a claim's preregistration with the folders of its runs by arm and seed."""
    stored = Preregistration(digest=claim.digest, commit=commit, runs=folders or {})
    write_preregistration(stored, claim, runs)
    return stored


def shifted(by: float, scale: float = 1.0) -> tuple[float, ...]:
    """PLAIN plus ``by`` and a little noise for each seed."""
    return tuple(p + by + scale * e for p, e in zip(PLAIN, NOISE, strict=True))


def exact_matches(solved: int, n: int = 8) -> list[float]:
    """The final exact match of n seeds, the first ``solved`` of which solve the task."""
    return [0.96] * solved + [0.5] * (n - solved)


def solved_seeds(plain: int, mtp: int) -> dict[str, list[float]]:
    """The exact matches of both arms of a claim, by how many seeds solve the task."""
    return {"plain": exact_matches(plain), "mtp": exact_matches(mtp)}


def exit_code(*arguments: object) -> int:
    """Run the claims' command; its exit code."""
    from sweeps.claims.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run the claims' command; its output, or its standard error if it fails with ``code``."""
    capsys.readouterr()
    assert exit_code(*arguments) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def with_pages(folder: Path) -> Path:
    """Write pages with markers into a folder, and return it."""
    (folder / "docs").mkdir()
    for page in (folder / "docs" / "results.md", folder / "README.md"):
        page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return folder


def measured_speeds(folder: Path, rows: list[dict[str, Any]], name: str = "", **more: Any) -> None:
    """Write results of ``benchmarks.pretrained_heads`` into a checkout's folder."""
    file = folder / "benchmarks" / "results" / f"pretrained_heads{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": rows, **more}))


def finished_run(folder: str, **facts: Any) -> ArmRun:
    """A finished run; ``facts`` replace the usual ones."""
    usual = {"text": "e" * 32, "machine": "Linux x86_64, 2 cores", "commit": "c" * 40}
    usual["ended"] = "2026-11-25T10:00:00+00:00"
    return ArmRun(folder=folder, state="done", **usual | facts)


def commit(folder: Path) -> str:
    """Make a Git repository in a folder and commit all its files; returns the commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "predict"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return head.stdout.strip()
