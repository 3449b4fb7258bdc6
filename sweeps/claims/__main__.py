"""Claims, each by one command: what was predicted, what was run, and whether it holds.

python -m sweeps.claims list
python -m sweeps.claims hours --hours 8 --cores 2     # what is left costs, and what fits
python -m sweeps.claims run text_summaries            # what is missing; again: it goes on
python -m sweeps.claims run lambda curriculum --seeds 0 1
python -m sweeps.claims verdict text_summaries
python -m sweeps.claims verdict --all                 # and the pages made anew
python -m sweeps.claims replicate second_token_rates  # anew, beside what is committed
python -m sweeps.claims questions                     # the front page's three, answered by results
python -m sweeps.claims weights star_graph_summaries --arms joint --seeds 0
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.cli import Parser, readable_errors, require_package
from mtp_lightning.errors import UserError
from mtp_lightning.paths import ROOT
from sweeps.claims import words
from sweeps.claims.claim import Claim
from sweeps.claims.commit import predicted_in
from sweeps.claims.figure import write_figures
from sweeps.claims.hours import left_of
from sweeps.claims.listing import costs, listing, planned
from sweeps.claims.pages import block, write_pages
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.recall import stored_seeds
from sweeps.claims.result import (
    NOT_RUN,
    Result,
    file_of,
    in_order,
    is_stale,
    judge,
    read_result,
    read_results,
    state,
    write_result,
)
from sweeps.claims.run import run
from sweeps.claims.weights import write_weights
from sweeps.pool import Interrupted


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(arguments)
    args.typed = ["python -m sweeps.claims", *arguments]
    # What came out of one's own claims is one's own, too, and has no pages that are made of it.
    own = args.claims.resolve() != FOLDER.resolve()
    args.has_pages = args.root is not None or not own
    args.root = args.root or (args.claims.absolute().parent if own else ROOT)
    args.results = args.root / "results"
    with readable_errors():
        seeds = getattr(args, "seeds", None) or [0]
        if min(seeds) < 0:
            raise UserError(f"--seeds {min(seeds)}: give whole numbers >= 0.")
        try:
            actions = {
                "list": _list,
                "hours": _hours,
                "run": _run,
                "verdict": _verdict,
                "questions": _questions,
                "replicate": _replicate,
                "weights": _weights,
            }
            sys.exit(actions[args.action](args))
        except Interrupted as interrupt:
            print("interrupted. The same command continues.", flush=True)
            sys.exit(128 + interrupt.signum)


def _list(args: argparse.Namespace) -> int:
    claims, results = _read(args, names(args.claims))
    print("\n".join(listing(claims, results, args.runs.absolute())))
    return 0


def _hours(args: argparse.Namespace) -> int:
    if args.hours is not None and not 0 < args.hours < math.inf:
        raise UserError(f"--hours {args.hours:g}: give hours of the clock above 0.")
    if args.cores < 1:
        raise UserError(f"--cores {args.cores}: give a whole number of at least 1.")
    claims, results = _read(args, args.names or names(args.claims))
    if not args.names:
        claims = [claim for claim in in_order(claims, results) if not claim.superseded_by]
    left = left_of(claims, args.runs.absolute(), results)
    print("\n".join(costs([each for each in left if each.costs or args.names])))
    if args.hours is not None:
        print("\n" + "\n".join(planned(left, hours=args.hours, cores=args.cores)))
    return 0


def _read(args: argparse.Namespace, wanted: Sequence[str]) -> tuple[list[Claim], dict[str, Result]]:
    claims = [read_claim(name, args.claims, allow=args.allow) for name in wanted]
    return claims, read_results(args.results)


def _run(args: argparse.Namespace) -> int:
    claims = [_at(args, read_claim(name, args.claims, allow=args.allow)) for name in args.names]
    return 1 if _start(args, claims, seeds=args.seeds, results=args.results) else 0


def _replicate(args: argparse.Namespace) -> int:
    """Run a claim whatever its result has, and compare."""
    claim = _at(args, read_claim(args.name, args.claims, allow=args.allow))
    require_package("scipy", what="a verdict", extra="report")
    left = _start(args, [claim], seeds=args.seeds)
    here = judge(claim, args.runs.absolute())
    committed = read_result(claim.label, args.results)
    assert here is not None, "run has registered the claim"
    print(f"{claim.label}: {here['verdict']}. {claim.sentence}")
    _say(here)
    if committed is None or is_stale(committed, claim):
        print("There is no committed result of this claim to compare with.")
        return 1 if left else 0
    print(f"Beside {args.results / claim.label}.json, {committed['date']}:")
    for line in words.beside(here, committed):
        print(f"  {line}")
    return 1 if left else 0


def _weights(args: argparse.Namespace) -> int:
    """Train again what is not in the folder of runs, and write what all of it ended with."""
    claim = _at(args, read_claim(args.name, args.claims, allow=args.allow))
    unknown = sorted(set(args.arms or ()) - set(claim.arms))
    if unknown:
        raise UserError(f"--arms {unknown[0]}: choose from {', '.join(claim.arms)}.")
    arms, seeds = args.arms or list(claim.arms), args.seeds or list(claim.scale.seeds)
    require_package("safetensors", what="a file of weights", extra="hf")
    left = _start(args, [claim], seeds=seeds, arms=arms)
    stored = stored_seeds(claim, read_result(claim.label, args.results))
    to = args.to / claim.label
    runs = args.runs.absolute()
    lines, gone = write_weights(claim, runs, to, seeds=seeds, arms=arms, stored=stored)
    print("\n".join(lines))
    return 1 if left or gone else 0


def _start(args: argparse.Namespace, claims: Sequence[Claim], **asked: Any) -> int:
    """Run claims whose predictions are in a commit; how many of the runs are not done."""
    commits = {
        claim.label: predicted_in(
            args.claims / f"{claim.name}.yaml",
            claim,
            read_result(claim.label, args.results),
            unpredicted=args.unpredicted,
        )
        for claim in claims
    }
    return run(
        claims,
        args.runs.absolute(),
        commits=commits,
        n_jobs=args.jobs,
        retry_failed=args.retry_failed,
        command=args.typed,
        **asked,
    )


def _verdict(args: argparse.Namespace) -> int:
    if args.all == bool(args.names):
        raise UserError("verdict wants names of claims, or --all.")
    require_package("scipy", what="a verdict", extra="report")
    code = 0
    for name in args.names or names(args.claims):
        claim = read_claim(name, args.claims, allow=args.allow)
        scales = [claim, *([claim.on_gpu()] if claim.gpu else [])] if args.all else [None]
        for at in scales:
            code |= _judge(args, at or _at(args, claim))
    if args.all and args.has_pages:
        for page in write_pages(args.root, args.claims):
            print(f"wrote {page}")
    return code


def _questions(args: argparse.Namespace) -> int:
    print(block(args.root, args.claims))
    return 0


def _judge(args: argparse.Namespace, claim: Claim) -> int:
    """Print and store a verdict; 1 where it is stale."""
    folder = args.results
    try:
        result = judge(claim, args.runs, folder)
    except ValueError as error:
        if not args.all:
            raise
        print(f"{claim.label}: {error}")
        return 1
    if result is not None:
        write_result(result, claim.label, folder)
    elif (result := read_result(claim.label, folder)) is None:
        print(f"{claim.label}: {NOT_RUN}; {claim.command}")
        return 0
    write_figures(result, claim.label, folder)
    stale = is_stale(result, claim)
    print(f"{claim.label}: {state(claim, result)}. {claim.sentence}")
    _say(result)
    if not args.has_pages:
        print(f"  all numbers: {file_of(claim.label, folder)}")
    return int(stale)


def _say(result: Result) -> None:
    for entry in result["predictions"]:
        print(
            f"  {entry['verdict']}: {words.subject(entry)}, {words.quantity(entry['measure'])} "
            f"{words.predicted(entry)}: {words.measured(entry)}"
        )
        details = "; ".join(filter(None, (words.tested(entry), entry["why"])))
        print(f"    {details}")
    for line in result["unfinished"]:
        print(f"  unfinished: {line}")


def _at(args: argparse.Namespace, claim: Claim) -> Claim:
    return claim.on_gpu() if args.gpu else claim


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sweeps.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="all claims, and what became of them")
    costing = actions.add_parser("hours", help="what is left costs on this machine, and what fits")
    running = actions.add_parser("run", help="run what is missing, seed by seed")
    judging = actions.add_parser("verdict", help="decide from what has run")
    asking = actions.add_parser(
        "questions", help="the front page's three questions, answered by results, as Markdown"
    )
    replicating = actions.add_parser(
        "replicate", help="run a claim anew, and compare with what is committed"
    )
    weighing = actions.add_parser(
        "weights", help="make runs again, and write their weights as safetensors"
    )
    costing.add_argument("names", nargs="*", metavar="NAME", help="of claims, in this order")
    costing.add_argument("--hours", type=float, help="of the clock: plan what fits into them")
    costing.add_argument("--cores", type=int, default=1, help="that run a job each (default 1)")
    running.add_argument("names", nargs="+", metavar="NAME", help="of claims")
    for action in (replicating, weighing):
        action.add_argument("name", metavar="NAME", help="of a claim")
    weighing.add_argument("--arms", nargs="+", metavar="ARM", help="instead of all")
    weighing.add_argument(
        "--to", type=Path, default=Path("runs/weights"), help="a folder (runs/weights)"
    )
    for action in (running, replicating, weighing):
        action.add_argument("--seeds", nargs="+", type=int, help="instead of the claim's")
        action.add_argument("--jobs", type=int, default=1, help="at once (default 1)")
        action.add_argument("--retry-failed", action="store_true", help="start failed runs again")
        action.add_argument(
            "--unpredicted",
            action="store_true",
            help="try a claim that is in no commit, as its verdict will say",
        )
    judging.add_argument("names", nargs="*", metavar="NAME", help="of claims")
    judging.add_argument("--all", action="store_true", help="all claims, and the pages")
    for action in (running, judging, replicating, weighing):
        action.add_argument("--gpu", action="store_true", help="at the published scale")
    for action in (listing, costing, running, judging, replicating, weighing):
        # What is made again must not count in a verdict on what is committed.
        folder = "runs/replicated" if action in (replicating, weighing) else "runs/claims"
        action.add_argument(
            "--runs", type=Path, default=Path(folder), help=f"their folder ({folder})"
        )
    for action in (listing, costing, running, judging, asking, replicating, weighing):
        action.add_argument(
            "--claims", type=_folder, default=FOLDER, help="a folder of your own YAMLs"
        )
        action.add_argument(
            "--allow",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="whose classes its arms may name beside this project's own; may be repeated",
        )
        action.add_argument(
            "--root",
            type=Path,
            help="has results/ and the pages (this checkout, or what --claims lies in)",
        )
    return parser


def _folder(given: str) -> Path:
    """A folder that is there."""
    if not Path(given).is_dir():
        raise argparse.ArgumentTypeError(f"{given} is not a folder: check the path")
    return Path(given)


if __name__ == "__main__":
    main()
