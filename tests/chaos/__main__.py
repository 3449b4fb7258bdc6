"""``python -m tests.chaos``: try cases until the time is over, and print the results."""

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

from tests.chaos import bad_input, faults, hostile, kills
from tests.chaos.cases import Broken, Case, Result, shuffled
from tests.chaos.processes import warm

KINDS = {
    "kills": kills.cases, "bad input": bad_input.cases, "hostile input": hostile.cases,
    "faults": faults.cases,
}  # fmt: skip


def attempt(case: Case, seed: str, folder: Path) -> Result:
    """Try one case, in a folder that is removed if the case held."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        outcome, held = case.attempt(folder, random.Random(seed)), True
    except Broken as broken:
        outcome, held = _brief(str(broken)), False
    except Exception as error:  # a defect of the harness, or an unreadable file
        outcome, held = f"{type(error).__name__}: {error}", False
    if held:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(case.kind, case.name, seed, held, outcome, time.monotonic() - began)


def _brief(text: str) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= 1500 else f"{text[:300]} [..] {text[-1200:]}"


def try_all(
    cases: list[Case], seed: int, folder: Path, *, minutes: float, number_of: int | None
) -> Iterable[Result]:
    """Yield results until the time is over or ``number_of`` cases were tried."""
    until = time.monotonic() + 60 * minutes
    for number, (case, its_seed) in enumerate(shuffled(cases, seed)):
        if time.monotonic() > until or number == number_of:
            return
        yield attempt(case, its_seed, folder / "attempts" / str(number))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="no case starts later")
    parser.add_argument("--alone", action="store_true", help="no runs of several processes")
    parser.add_argument(
        "--repeatable", action="store_true", help="no cases that depend on the clock"
    )
    parser.add_argument("--cases", type=int, help="the most cases to try")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of every case")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--match", default="", help="a part of the names of the cases to try")
    parser.add_argument("--folder", type=Path, help="to work in, and to leave what failed")
    parser.add_argument("--output", type=Path, help="a JSON file of all results")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warm()
    cases = [case for kind in options.only for case in KINDS[kind](folder)]
    cases = [c for c in cases if options.match in c.name and not (options.alone and c.several)]
    cases = [case for case in cases if not (options.repeatable and case.timed)]
    results = []
    limits = {"minutes": options.minutes, "number_of": options.cases}
    for result in try_all(cases, options.seed, folder, **limits):
        results.append(result)
        mark = "held  " if result.held else "BROKEN"
        print(
            f"{mark} {result.seconds:6.1f} s  {result.kind}: {result.name}: {result.outcome}",
            flush=True,
        )
    print()
    tried, broken = Counter(r.kind for r in results), Counter(r.kind for r in results if not r.held)
    print(f"{'kind':<16}{'cases':>8}{'tried':>8}{'broken':>8}")
    for kind in options.only:
        number = sum(case.kind == kind for case in cases)
        print(f"{kind:<16}{number:>8}{tried[kind]:>8}{broken[kind]:>8}")
    if options.output:
        machine = {
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        content = {
            "seed": options.seed,
            "minutes": options.minutes,
            "machine": machine,
            "results": [asdict(r) for r in results],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    if broken:
        print(f"folders of the broken cases: {folder / 'attempts'}")
        raise SystemExit(1)
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
