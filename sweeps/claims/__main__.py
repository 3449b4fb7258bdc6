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
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.errors import UserError, require_package
from mtp_lightning.paths import CONF, ROOT
from sweeps.claims import words
from sweeps.claims.claim import Claim, is_stale
from sweeps.claims.figure import write_figures
from sweeps.claims.hours import Pending, costs, listing, pending_of, planned
from sweeps.claims.jobs import require_equal
from sweeps.claims.pages import answers, pairs_of, write_pages
from sweeps.claims.preregistration import predicted_in
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.result import (
    NOT_RUN,
    Result,
    file_of,
    in_order,
    judge,
    read_result,
    read_results,
    state,
    write_result,
)
from sweeps.claims.reuse import left_to_run, stored_runs
from sweeps.claims.run import run
from sweeps.claims.weights import write_weights
from sweeps.compose import typed_folder
from sweeps.report import require_packages

RUNS = Path("runs/claims")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(arguments)
    args.typed = ["python -m sweeps.claims", *arguments]
    # Results of a user's own claims lie next to those claims, and no page is made from them. An
    # installed copy has no pages, and keeps results where it is run.
    own_claims, checkout = args.claims.resolve() != FOLDER.resolve(), CONF.parent == ROOT
    args.has_pages = args.root is not None or (checkout and not own_claims)
    default = args.claims.absolute().parent if own_claims else ROOT if checkout else Path.cwd()
    args.given_root, args.root = args.root, args.root or default
    args.results = args.root / "results"
    args.read_options = {"allow": args.allow, "config_dir": args.config_dir}
    with readable_errors():
        sys.exit(_ACTIONS[args.action][0](args))


def _list(args: argparse.Namespace) -> int:
    claims = _claims(args, names(args.claims))
    print("\n".join(listing(claims, read_results(args.results), args.runs.absolute())))
    legend = "decided: predictions with a verdict; hours left: core-hours, where they are known"
    print(f"{legend} ({args.typed[0]} hours estimates them)", file=sys.stderr)
    return 0


def _hours(args: argparse.Namespace) -> int:
    if args.hours is not None and not 0 < args.hours < math.inf:
        raise UserError(f"--hours {args.hours:g}: give hours of the clock above 0.")
    if args.cores < 1:
        raise UserError(f"--cores {args.cores}: give a whole number of at least 1.")
    claims, results = _claims(args, args.names or names(args.claims)), read_results(args.results)
    if not args.names:
        claims = [claim for claim in in_order(claims, results) if not claim.superseded_by]
    print("Composing the runs that are left: about a minute.", file=sys.stderr, flush=True)
    runs = args.runs.absolute()
    pending = pending_of(claims, runs, results)
    refused = {item.claim.label: why for item in pending if (why := _refused(item, runs, results))}
    print("\n".join(costs([item for item in pending if item.costs or args.names])))
    if refused:
        print("\n" + "\n".join(refused.values()))
    if args.hours is not None and any(item.costs for item in pending):
        pending = [item for item in pending if item.claim.label not in refused]
        more = "" if args.runs == RUNS else f" --runs {shlex.quote(str(args.runs))}"
        if args.given_root is not None:
            more += f" --root {shlex.quote(str(args.given_root))}"
        print("\n" + "\n".join(planned(pending, hours=args.hours, cores=args.cores, more=more)))
    return 0


def _refused(pending: Pending, runs: Path, results: Mapping[str, Result]) -> str:
    """Why a claim's pending runs cannot be started from this checkout; empty if they can."""
    stored = results.get(pending.claim.label)
    if not pending.costs or stored is None:
        return ""
    try:
        left_to_run(pending.claim, pending.claim.scale.seeds, runs, stored)
    except UserError as error:
        return str(error)
    return ""


def _run(args: argparse.Namespace) -> int:
    claims = _claims(args, args.names)
    return 1 if _start(args, claims, seeds=args.seeds, results=args.results) else 0


def _replicate(args: argparse.Namespace) -> int:
    """Run a claim again, finished seeds included, and compare with its stored result."""
    (claim,) = _claims(args, [args.name])
    require_packages("a verdict")
    n_unfinished = _start(args, [claim], seeds=args.seeds)
    here = judge(claim, args.runs.absolute())
    committed = read_result(claim.label, args.results)
    assert here is not None, "run has registered the claim"
    print(f"{claim.label}: {here['verdict']}. {claim.sentence}")
    _say(here)
    if committed is None or is_stale(committed, claim):
        print("There is no committed result of this claim to compare with.")
    else:
        print(f"Compared with {args.results / claim.label}.json, {committed['date']}:")
        print("\n".join(f"  {line}" for line in words.beside(here, committed)))
    return 1 if n_unfinished else 0


def _weights(args: argparse.Namespace) -> int:
    """Train the runs that are not in the folder of runs, and write the final weights of all."""
    (claim,) = _claims(args, [args.name])
    if unknown := sorted(set(args.arms or ()) - set(claim.arms)):
        raise UserError(f"--arms {unknown[0]}: choose from {', '.join(claim.arms)}.")
    arms, seeds = args.arms or list(claim.arms), args.seeds or list(claim.scale.seeds)
    require_package("safetensors", what="a file of weights", extra="hf")
    n_unfinished = _start(args, [claim], seeds=seeds, arms=arms)
    stored = stored_runs(claim, read_result(claim.label, args.results))
    runs, to = args.runs.absolute(), args.to / claim.label
    lines, n_missing = write_weights(claim, runs, to, seeds=seeds, arms=arms, stored=stored)
    print("\n".join(lines))
    return 1 if n_unfinished or n_missing else 0


def _start(args: argparse.Namespace, claims: Sequence[Claim], **selection: Any) -> int:
    """Run claims whose predictions are in a commit; returns how many runs are not done."""
    commits: dict[str, str | None] = {}
    for claim in claims:
        if others := sorted(set(args.seeds or ()) - set(claim.scale.seeds)):
            raise UserError(
                f"--seeds {others[0]}: {claim.name} predicts for the seeds "
                f"{' '.join(map(str, claim.scale.seeds))} alone, since seeds that are added until "
                "a claim is decided decide too often: write a new claim for others."
            )
        file, stored = args.claims / f"{claim.name}.yaml", read_result(claim.label, args.results)
        if stored is None:
            require_equal(claim, args.runs.absolute())
        commits[claim.label] = predicted_in(file, claim, stored, unpredicted=args.unpredicted)
    options = {"n_jobs": args.jobs, "retry_failed": args.retry_failed, "command": args.typed}
    return run(claims, args.runs.absolute(), commits=commits, **options, **selection)


def _verdict(args: argparse.Namespace) -> int:
    if args.all == bool(args.names):
        raise UserError("verdict needs either names of claims or --all.")
    require_packages("a verdict")
    claims = _claims(args, args.names or names(args.claims))
    if args.all and not args.gpu:
        claims = [scaled for claim in claims for scaled in claim.scales]
    code = max((_judge(args, claim) for claim in claims), default=0)
    if args.all and args.has_pages:
        for page in write_pages(args.root, args.claims, **args.read_options):
            print(f"wrote {page}")
    return code


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
    print(f"{claim.label}: {state(claim, result)}. {claim.sentence}")
    _say(result)
    if not args.has_pages:
        print(f"  all numbers: {file_of(claim.label, folder)}")
    return int(is_stale(result, claim))


def _questions(args: argparse.Namespace) -> int:
    text = answers(pairs_of(args.root, args.claims, **args.read_options), args.root)
    if not text.strip():
        raise UserError(
            f"No claim in {args.claims} that answers one of the three questions has a result in "
            f"{args.root / 'results'}: run one, as in python -m sweeps.claims run NAME."
        )
    print(text)
    return 0


def _say(result: Result) -> None:
    for entry in words.entries(result):
        print(
            f"  {entry['verdict']}: {words.subject(entry)}, {words.quantity(entry['measure'])} "
            f"{words.predicted(entry)}: {words.measured(entry)}"
        )
        print("    " + "; ".join(filter(None, (words.tested(entry), entry["why"]))))
    for line in result["unfinished"]:
        print(f"  unfinished: {line}")


def _claims(args: argparse.Namespace, claim_names: Sequence[str]) -> list[Claim]:
    claims = [read_claim(name, args.claims, **args.read_options) for name in claim_names]
    if args.gpu and args.all:
        claims = [claim for claim in claims if claim.gpu]
    return [claim.on_gpu() for claim in claims] if args.gpu else claims


_ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "list": (_list, "all claims with their verdicts"),
    "hours": (_hours, "the cost of missing runs on this machine, and which fit"),
    "run": (_run, "start missing runs, seed by seed"),
    "verdict": (_verdict, "decide from finished runs whether predictions hold"),
    "questions": (_questions, "the README's three questions, answered from results, as Markdown"),
    "replicate": (_replicate, "run a claim again, and compare with its stored result"),
    "weights": (_weights, "train runs again, and write their weights as safetensors"),
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser.of(__doc__, module="sweeps.claims", program="python -m sweeps.claims")
    parser.set_defaults(all=False, gpu=False)  # of actions without these options
    actions = parser.add_subparsers(dest="action", required=True)
    parsers = {name: actions.add_parser(name, help=about) for name, (_, about) in _ACTIONS.items()}

    def option(commands: str, *flags: str, **settings: Any) -> None:
        for name in commands.split():
            parsers[name].add_argument(*flags, **settings)

    running, rerun = "run replicate weights", "replicate weights"
    option("hours", "names", nargs="*", metavar="NAME", help="claims, in this order")
    option("run", "names", nargs="+", metavar="NAME", help="claims")
    option("verdict", "names", nargs="*", metavar="NAME", help="claims")
    option(rerun, "name", metavar="NAME", help="a claim")
    option("hours", "--hours", type=float, help="wall time: list the runs that fit into it")
    cores = "jobs at once, one per core (default 1)"
    option("hours", "--cores", type=int, default=1, help=cores)
    option("weights", "--arms", nargs="+", metavar="ARM", help="arms (default all)")
    to = Path("runs/weights")
    option("weights", "--to", type=Path, default=to, help="output folder (runs/weights)")
    option(running, "--seeds", nargs="+", type=int, help="seeds (default the claim's)")
    option(running, "--jobs", type=int, default=1, help="jobs at once (default 1)")
    option(running, "--retry-failed", action="store_true", help="start failed runs again")
    trial = "run a claim that no commit contains; its verdict is then marked"
    option(running, "--unpredicted", action="store_true", help=trial)
    option("verdict", "--all", action="store_true", help="all claims; also update the pages")
    option(f"verdict {running}", "--gpu", action="store_true", help="use the published scale")
    # Repeated runs must not count in the verdict on the original ones.
    for commands, folder in (("list hours run verdict", RUNS), (rerun, Path("runs/replicated"))):
        option(commands, "--runs", type=Path, default=folder, help=f"folder of runs ({folder})")
    all_actions = " ".join(parsers)
    own_claims = "a folder with your own claims"
    option(all_actions, "--claims", type=typed_folder, default=FOLDER, help=own_claims)
    allow = "a package whose classes arms may name; may be repeated"
    option(all_actions, "--allow", action="append", default=[], metavar="PACKAGE", help=allow)
    more = "a folder with more configs for the arms"
    option(all_actions, "--config-dir", type=typed_folder, metavar="FOLDER", help=more)
    root = "folder with results/ and pages (this checkout or folder; the parent of --claims)"
    option(all_actions, "--root", type=Path, help=root)
    return parser


if __name__ == "__main__":
    main()
