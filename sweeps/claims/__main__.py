"""Runs claims and decides whether their predictions hold, each by one command.

python -m sweeps.claims list
python -m sweeps.claims hours --hours 8 --cores 2     # the cost of missing runs, and what fits
python -m sweeps.claims run text_summaries            # missing runs; the same command continues
python -m sweeps.claims run lambda curriculum --seeds 0 1
python -m sweeps.claims verdict text_summaries
python -m sweeps.claims verdict --all                 # also updates the pages
python -m sweeps.claims replicate second_token_rates  # run again, compare with the stored result
python -m sweeps.claims questions                     # the README's three questions, answered
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
from sweeps.claims.figure import write_figures
from sweeps.claims.hours import left_of
from sweeps.claims.listing import costs, listing, planned
from sweeps.claims.pages import block, write_pages
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.recall import stored_seeds
from sweeps.claims.register import predicted_in
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
    # Results of a user's own claims lie next to those claims, and no page is made from them.
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
    """Run a claim again, finished seeds included, and compare with its stored result."""
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
    print(f"Compared with {args.results / claim.label}.json, {committed['date']}:")
    for line in words.beside(here, committed):
        print(f"  {line}")
    return 1 if left else 0


def _weights(args: argparse.Namespace) -> int:
    """Train the runs that are not in the folder of runs, and write the final weights of all."""
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
    """Run claims whose predictions are in a commit; returns how many runs are not done."""
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
        raise UserError("verdict needs either names of claims or --all.")
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
    listing = actions.add_parser("list", help="all claims with their verdicts")
    costing = actions.add_parser(
        "hours", help="what missing runs cost on this machine, and what fits"
    )
    running = actions.add_parser("run", help="start missing runs, seed by seed")
    judging = actions.add_parser("verdict", help="decide from finished runs")
    asking = actions.add_parser(
        "questions", help="the README's three questions, answered from results, as Markdown"
    )
    replicating = actions.add_parser(
        "replicate", help="run a claim again, and compare with its stored result"
    )
    weighing = actions.add_parser(
        "weights", help="train runs again, and write their weights as safetensors"
    )
    costing.add_argument("names", nargs="*", metavar="NAME", help="claims, in this order")
    costing.add_argument("--hours", type=float, help="wall time: plan what fits into it")
    costing.add_argument(
        "--cores", type=int, default=1, help="jobs at once, one per core (default 1)"
    )
    running.add_argument("names", nargs="+", metavar="NAME", help="claims")
    for action in (replicating, weighing):
        action.add_argument("name", metavar="NAME", help="a claim")
    weighing.add_argument("--arms", nargs="+", metavar="ARM", help="arms (default all)")
    weighing.add_argument(
        "--to", type=Path, default=Path("runs/weights"), help="output folder (runs/weights)"
    )
    for action in (running, replicating, weighing):
        action.add_argument("--seeds", nargs="+", type=int, help="seeds (default the claim's)")
        action.add_argument("--jobs", type=int, default=1, help="jobs at once (default 1)")
        action.add_argument("--retry-failed", action="store_true", help="start failed runs again")
        action.add_argument(
            "--unpredicted",
            action="store_true",
            help="run a claim that no commit contains; its verdict will say so",
        )
    judging.add_argument("names", nargs="*", metavar="NAME", help="claims")
    judging.add_argument("--all", action="store_true", help="all claims, and the pages")
    for action in (running, judging, replicating, weighing):
        action.add_argument("--gpu", action="store_true", help="at the published scale")
    for action in (listing, costing, running, judging, replicating, weighing):
        # Repeated runs must not count in the verdict on the original ones.
        folder = "runs/replicated" if action in (replicating, weighing) else "runs/claims"
        action.add_argument(
            "--runs", type=Path, default=Path(folder), help=f"folder of runs ({folder})"
        )
    for action in (listing, costing, running, judging, asking, replicating, weighing):
        action.add_argument(
            "--claims", type=_folder, default=FOLDER, help="a folder with your own claims"
        )
        action.add_argument(
            "--allow",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="a package whose classes arms may name; may be repeated",
        )
        action.add_argument(
            "--root",
            type=Path,
            help="folder with results/ and the pages (this checkout, or the parent of --claims)",
        )
    return parser


def _folder(given: str) -> Path:
    """An existing folder."""
    if not Path(given).is_dir():
        raise argparse.ArgumentTypeError(f"{given} is not a folder: check the path")
    return Path(given)


if __name__ == "__main__":
    main()
