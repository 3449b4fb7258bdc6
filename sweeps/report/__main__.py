"""`python -m sweeps.report FOLDER [FOLDER ...]`: compare the runs of one or more sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.run.atomic import write_bytes
from mtp_lightning.run.solved import SOLVED
from sweeps.report import require_packages
from sweeps.report.collect import collect
from sweeps.report.compare import compare
from sweeps.report.equivalent import families
from sweeps.report.findings import answer
from sweeps.report.read import SweepRecord, read_sweep
from sweeps.report.watch import SECONDS, watch


def report(
    folders: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    reference: str | None = None,
    level: float = SOLVED,
    watched: bool = False,
) -> tuple[Path, list[str], bool]:
    """Write `report.html`, `runs.csv` and `figures/`.

    Args:
        folders: folders of sweeps or runs; the names of several are shown.
        output: the output folder; by default the folder itself, or for several a folder next to
            the first.
        reference: label of the setting that all are compared with; by default the one without
            MTP, or the first.
        level: a seed solves a task if its exact match is above this level.
        watched: while jobs are unfinished, the page reloads itself.

    Returns:
        The page's path, the sentences that it begins with, and whether jobs are unfinished.

    Raises:
        FileNotFoundError: a folder has no runs.
        UserError: ``reference`` names no setting, ``level`` is invalid, or a package is missing.
    """
    require_packages("the report")
    if not 0 <= level < 1:
        raise UserError(f"--solved {level:g} must be at least 0 and below 1, such as {SOLVED}.")
    from sweeps.report import chart, figures, page

    sweeps = _read(folders)
    settings = collect(sweeps, level=level)
    comparisons = compare(settings, reference=reference)
    priced = [] if settings.is_task else families(settings)
    target = Path(output) if output is not None else _default_output(sweeps)
    target.mkdir(parents=True, exist_ok=True)
    with chart.styled():
        drawings = figures.draw(settings, comparisons, priced)
        svgs = page.write_figures(drawings, target / page.FIGURES)
    if len(sweeps) == 1:
        page.write_events(target / page.FIGURES, settings, drawings)
    write_bytes(page.runs_csv(settings).encode(errors="backslashreplace"), target / "runs.csv")
    sentences = answer(settings, comparisons, priced)
    options = [] if reference is None else ["--reference", reference]
    options += ["--solved", str(level)] if settings.is_task and level != SOLVED else []
    html = page.render(
        settings,
        comparisons,
        priced,
        drawings,
        svgs,
        sentences=sentences,
        command=["mtp-lightning", "report", *map(str, folders), *options],
        folder=target,
        reload_seconds=SECONDS if watched and settings.running else None,
    )
    write_bytes(html.encode(errors="backslashreplace"), target / "report.html")
    return target / "report.html", sentences, settings.running


def _read(folders: Sequence[str | Path]) -> list[SweepRecord]:
    if len(folders) == 1:
        return [read_sweep(folders[0])]
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("A folder is given twice: give every folder once.")
    parts = [path.resolve().parts for path in paths]
    # The shortest ends of the paths that differ: a/sweep and b/sweep.
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [read_sweep(path, name=name) for path, name in zip(paths, names, strict=True)]


def _default_output(sweeps: Sequence[SweepRecord]) -> Path:
    if len(sweeps) == 1:
        return sweeps[0].folder
    names = "_".join(sweep.folder.resolve().name for sweep in sweeps)
    return sweeps[0].folder.resolve().parent / f"report_{names}"


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m sweeps.report"
) -> None:
    parser = Parser(prog=program, description="Compare the runs of one or more sweeps.")
    option = parser.add_argument
    option("folders", nargs="+", metavar="FOLDER", help="a folder of a sweep or of runs")
    option("--output", metavar="DIR", help="output folder")
    against = "compare with this, as 'mtp.depth=0' (default: no MTP, or the first setting)"
    option("--reference", metavar="SETTING", help=against)
    solves = "val/exact_match above which a seed solves its task (default: %(default)s)"
    option("--solved", type=float, default=SOLVED, metavar="LEVEL", help=solves)
    serve = "update the report while jobs run, and serve it on 127.0.0.1"
    option("--watch", action="store_true", help=serve)
    port = "port of --watch (default: a free one)"
    option("--port", type=int, default=0, metavar="PORT", help=port)
    diff = "print how two runs' configs differ and both runs' numbers, instead of a report"
    option("--diff", action="store_true", help=diff)
    args = parser.parse_args(arguments)
    with readable_errors():
        if not 0 <= args.port <= 65535:
            raise UserError(f"--port {args.port}: give a number from 0 to 65535.")
        if args.port and not args.watch:
            raise UserError(f"--port {args.port} is of --watch: give that, too, or leave it out.")
        if args.diff:
            if args.watch or args.output or args.reference or args.solved != SOLVED:
                raise UserError("--diff prints differences alone: leave the other options out.")
            from sweeps.report.page import differences

            print("\n".join(differences(args.folders)))
            return
        options = {"output": args.output, "reference": args.reference, "level": args.solved}
        if args.watch:
            watch(lambda: report(args.folders, **options, watched=True), port=args.port)
            return
        path, sentences, _ = report(args.folders, **options)
        print("\n".join(sentences))
        print(f"\nreport    {path}")
        print(f"numbers   {path.with_name('runs.csv')}")
        print(f"figures   {path.with_name('figures')}")


if __name__ == "__main__":
    main()
