"""The sentences about a task's sweep: how many seeds solve it, when, and where that differs."""

from __future__ import annotations

from collections.abc import Sequence

from sweeps.report.compare_solved import smallest_p
from sweeps.report.comparisons import LEVEL, Comparison
from sweeps.report.metrics import EXACT, equals, p_value, some
from sweeps.report.settings import Setting, Settings
from sweeps.report.shares import Share
from sweeps.report.solving import solved_share, time_to_solve, wait_of
from sweeps.report.table_task import ends


def how_many_solve(group: Sequence[Setting], level: float) -> list[str]:
    """The largest share of seeds that solve, with its interval, and the shortest median time."""
    shares = [(s, share) for s in group if (share := solved_share(s, level))]
    if not shares:
        return []
    # Of equal shares the one of most seeds, whose interval is the narrowest.
    best, top = max(shares, key=lambda pair: (pair[1].rate, pair[1].n))
    equal = [s.label for s, share in shares if share.rate == top.rate and s is not best]
    above = f"a final {EXACT} above {level:g}"
    if top.count == 0:
        many = f"; so with {some(equal)}" if equal else ""
        return [f"No seed solves the task ({above}): with {best.label} {_shown(top)}{many}."]
    if len(shares) == 1:
        solve = "solves" if top.n == 1 else "solve"
        first = f"{_shown(top)} {solve} the task ({above}) with {best.label}."
    else:
        many = f"; an equal share with {some(equal)}" if equal else ""
        first = f"The largest share of seeds solves the task ({above}) with {best.label}: "
        first += f"{_shown(top)}{many}."
    return [first, *_median(group, level)]


def _median(group: Sequence[Setting], level: float) -> list[str]:
    curves = [(s, curve) for s in group if (curve := time_to_solve(s, level))]
    known = [(curve.median, s.label) for s, curve in curves if curve.median is not None]
    if not known:
        return []
    step = min(median for median, _ in known)
    labels = some([label for median, label in known if median == step])
    earliest = "earliest " * (len(known) > 1)
    return [
        f"Half of the seeds have solved it {earliest}by step {step:,.0f}, with {labels} "
        "(Kaplan-Meier)."
    ]


def which_differ(comparisons: Sequence[Comparison]) -> list[str]:
    """The shares that differ beyond noise, and what so few seeds can show at all."""
    tested = [c for c in comparisons if c.adjusted is not None]
    if not comparisons:
        return []
    if not tested:
        return ["No difference can be tested: that takes two seeds of each setting."]
    beyond = sorted((c for c in tested if c.differs), key=lambda c: c.adjusted or 0)
    sentences = []
    for c in beyond[:4]:
        assert c.solved is not None
        own, other = c.solved.own, c.solved.other
        sentences.append(
            f"{c.setting.label} has a {'larger' if own.rate > other.rate else 'smaller'} share of "
            f"seeds that solve than {c.against}: {own.count} of {own.n} against {other.count} of "
            f"{other.n}, beyond noise (Fisher's exact test, unpaired, Holm's p "
            f"{equals(c.adjusted)})."
        )
    if len(beyond) > 4:
        sentences.append(f"So are {len(beyond) - 4} more, in the table of differences.")
    within = len(tested) - len(beyond)
    if not beyond:
        closest = min(c.adjusted for c in tested if c.adjusted is not None)
        tests = "1 exact test" if len(tested) == 1 else f"{len(tested)} exact tests"
        sentences.append(
            "No setting's share of seeds that solve differs from its reference's by more than "
            f"chance (Fisher, {tests}, unpaired, smallest p after Holm's correction "
            f"{p_value(closest)})."
        )
    elif within:
        are = "difference is" if within == 1 else "differences are"
        sentences.append(f"{within} other {are} within noise.")
    least = smallest_p(tested)
    if least is not None and least >= LEVEL:
        sentences.append(
            "So few seeds can show nothing: all of one setting's and none of the other's would "
            f"give a smallest p of {p_value(least)} after the correction."
        )
    return sentences


def task_caveats(settings: Settings) -> list[str]:
    """Runs that say nothing of solving, in a report of a task."""
    if not settings.is_task:
        return []
    notes = []
    others = [s.label for s in settings.all if s.done and not s.answers]
    if others:
        notes.append(
            f"No run has {EXACT} with {some(others)}: nothing is said of solving there. To compare "
            "losses on text, report those runs alone."
        )
    silent = [
        run.name
        for setting in settings.all
        for run in setting.done
        if setting.answers and wait_of(run, settings.level) is None
    ]
    if silent:
        notes.append(f"No validation with {EXACT} is logged by {some(silent)}: no time to solve.")
    return notes


def _shown(share: Share) -> str:
    seeds = "seed" if share.n == 1 else "seeds"
    return f"{share.count} of {share.n} {seeds} (95 % interval {ends(share)})"
