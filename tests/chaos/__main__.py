"""``python -m tests.chaos``: try cases until the time is over, and say what held."""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from tests.chaos import bad_input, faults, hostile, kills, requests
from tests.chaos.cases import Broken, Case, Result, shuffled
from tests.chaos.processes import warm

KINDS = {
    "kills": kills.cases, "bad input": bad_input.cases, "hostile input": hostile.cases,
    "faults": faults.cases, "requests": requests.cases,
}  # fmt: skip


def attempt(case: Case, seed: str, folder: Path) -> Result:
    """One case, in a folder that goes if it held."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        told, held = case.attempt(folder, random.Random(seed)), True
    except Broken as broken:
        told, held = _brief(str(broken)), False
    except Exception as error:  # of the harness itself, or of a file that is not what it should be
        told, held = f"{type(error).__name__}: {error}", False
    if held:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(case.kind, case.name, seed, held, told, time.monotonic() - began)


def _brief(text: str) -> str:
    """What was promised, and how it ended."""
    return text if len(text) <= 1500 else f"{text[:300]} [..] {text[-1200:]}"


def try_all(
    cases: list[Case], seed: int, folder: Path, *, minutes: float, number_of: int | None
) -> Iterable[Result]:
    """Results as they come, until the time is over or so many were tried."""
    until = time.monotonic() + 60 * minutes
    for number, (case, its_seed) in enumerate(shuffled(cases, seed)):
        if time.monotonic() > until or number == number_of:
            return
        yield attempt(case, its_seed, folder / "attempts" / str(number))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="stop beginning cases then")
    parser.add_argument("--alone", action="store_true", help="no runs of several processes")
    parser.add_argument("--repeatable", action="store_true", help="nothing that the clock decides")
    parser.add_argument("--cases", type=int, help="stop after so many of them")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of every case")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--match", default="", help="a part of the names of the cases to try")
    parser.add_argument("--folder", type=Path, help="to work in, and to leave what failed")
    parser.add_argument("--output", type=Path, help="a JSON file of all results")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warm()
    cases = [case for kind in given.only for case in KINDS[kind](folder)]
    cases = [c for c in cases if given.match in c.name and not (given.alone and c.several)]
    cases = [case for case in cases if not (given.repeatable and case.timed)]
    results = []
    limits = {"minutes": given.minutes, "number_of": given.cases}
    for result in try_all(cases, given.seed, folder, **limits):
        results.append(result)
        mark = "held  " if result.held else "BROKEN"
        print(
            f"{mark} {result.seconds:6.1f} s  {result.kind}: {result.name}: {result.told}",
            flush=True,
        )
    print()
    tried, broken = Counter(r.kind for r in results), Counter(r.kind for r in results if not r.held)
    print(f"{'kind':<16}{'cases':>8}{'tried':>8}{'broken':>8}")
    for kind in given.only:
        number = sum(case.kind == kind for case in cases)
        print(f"{kind:<16}{number:>8}{tried[kind]:>8}{broken[kind]:>8}")
    if given.output:
        machine = {
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        content = {
            "seed": given.seed,
            "minutes": given.minutes,
            "machine": machine,
            "results": [asdict(r) for r in results],
        }
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    if broken:
        print(f"what was left of the broken ones: {folder / 'attempts'}")
        raise SystemExit(1)
    if given.folder is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
