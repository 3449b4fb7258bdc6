"""docs/results.md and the READMEs' part, between their markers, from ``results/*.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_lightning.errors import UserError
from mtp_lightning.markdown import plain
from mtp_lightning.run.atomic import write_bytes
from sweeps.claims import words
from sweeps.claims.claim import Claim
from sweeps.claims.enough import said, seeds_enough
from sweeps.claims.figure import files_of
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.readme import LANGUAGES, NOT_RUN, part, state
from sweeps.claims.result import Result, is_stale, read_result

BEGIN, END = "<!-- claims: made by python -m sweeps.claims verdict --all -->", "<!-- /claims -->"


def write_pages(root: Path, claims: Path = FOLDER) -> list[Path]:
    """Replace what is between the markers of the pages.

    Args:
        root: has ``results/``, ``docs/results.md``, ``README.md`` and, perhaps, its translations.
        claims: the folder of the claims' files.

    Returns:
        The pages that have changed.

    Raises:
        OSError: a page is missing.
        UserError: it has no markers.
    """
    changed = []
    for page, text in pages(root, claims).items():
        if page.read_text(encoding="utf-8") != text:
            write_bytes(text.encode(), page)
            changed.append(page)
    return changed


def pages(root: Path, claims: Path = FOLDER) -> dict[Path, str]:
    """What the pages should be; arguments and errors as :func:`write_pages`."""
    found = [(claim, read_result(claim.label, root / "results")) for claim in _all(claims)]
    texts = {root / "docs" / "results.md": _long(found)}
    for name, language in LANGUAGES.items():
        if name == "README.md" or (root / name).exists():
            texts[root / name] = part(found, language)
    return {page: _between(page, text) for page, text in texts.items()}


def _all(claims: Path) -> list[Claim]:
    """All claims, each at its published scale, too, where it has one."""
    read = [read_claim(name, claims) for name in names(claims)]
    return [at for claim in read for at in [claim, *([claim.on_gpu()] if claim.gpu else [])]]


def _between(page: Path, text: str) -> str:
    whole = page.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(END) < whole.index(BEGIN):
        raise UserError(f"{page} needs the lines {BEGIN} and {END}, once and in this order.")
    start, end = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    return f"{whole[:start]}\n\n{text}\n\n{whole[end:]}"


def _long(found: Sequence[tuple[Claim, Result | None]]) -> str:
    return "\n\n".join(part for claim, result in found for part in _section(claim, result))


def _section(claim: Claim, result: Result | None) -> list[str]:
    if claim.setting != "cpu":
        where = f"At the published scale (`{claim.command}`, {_minutes(claim)})"
        if result is None:
            return [f"{where}: {NOT_RUN}."]
        return [f"{where}: {state(claim, result)}.", *_body(claim, result)]
    title = f"### {claim.name}: {state(claim, result)}"
    named = {"flops": "At equal FLOPs. ", "nothing": ""}
    equal = named.get(claim.equal, f"At equal {claim.equal}. ")
    said = plain(f"{claim.sentence} Source: {claim.source}. {equal}{claim.note}".strip())
    if claim.superseded_by:
        said = f"{said} **Superseded by {plain(claim.superseded_by)}.**"
    if claim.remark:
        said = f"{said}\n\n**Said since:** {plain(claim.remark)}"
    if result is None:
        return [title, said, _predictions(claim), f"`{claim.command}`, {_minutes(claim)}."]
    return [title, said, *_body(claim, result)]


def _body(claim: Claim, result: Result) -> list[str]:
    pictures = [
        f"![{claim.label}](../results/{file.name})"
        for file in files_of(result, claim.label, Path())
    ]
    more = map(said, seeds_enough(result["predictions"], claim.scale.minimum))
    rows = [
        "| prediction | published | measured | test | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {_asked(e)} | {plain(e['published'])} | {plain(words.measured(e))} "
            f"| {plain(words.tested(e))} | {words.verdict(e, help_)} |"
            for e, help_ in zip(result["predictions"], more, strict=True)
        ),
    ]
    stale = (
        "The claim was changed after these runs began: the verdict is that of the earlier one."
        if is_stale(result, claim)
        else ""
    )
    missing = plain(f"Unfinished: {'; '.join(result['unfinished'])}.")
    return [
        *([stale] if stale else []),
        *pictures,
        "\n".join(rows),
        *([times] if (times := _times(result)) else []),
        *([missing] if result["unfinished"] else []),
        f"`{result['command']}`; "
        + plain(
            f"{result['minutes']:g} minutes on {_machines(result)}, "
            f"{result['date'] or 'none finished yet'}; predicted in "
            f"{_commit(result['predicted_in'])}, "
            f"run by {', '.join(map(_commit, result['commits'])) or 'no finished run'}."
        ),
    ]


def _asked(entry: words.Entry) -> str:
    """What a prediction is about, and what it says."""
    said = f"{words.subject(entry)}: {words.quantity(entry['measure'])} {words.predicted(entry)}"
    return plain(said)


def _predictions(claim: Claim) -> str:
    """Of a claim that was not run."""
    from dataclasses import asdict

    rows = ["| prediction | published |", "|---|---|"]
    for entry in map(asdict, claim.predictions):
        rows.append(f"| {_asked(entry)} | {plain(entry['published'])} |")
    return "\n".join(rows)


def _times(result: Result) -> str:
    """Median steps to solve, by Kaplan and Meier."""
    medians = [
        f"{arm} {found['median_steps']:g}" if found["median_steps"] is not None else f"{arm} never"
        for arm, content in result["arms"].items()
        for found in content["time_to_solve"].values()
    ]
    return plain(f"Median steps to solve (Kaplan-Meier): {', '.join(medians)}.") if medians else ""


def _minutes(claim: Claim) -> str:
    on = "two cores" if claim.setting == "cpu" else "one GPU"
    return f"about {claim.scale.minutes:g} minutes on {on}"


def _machines(result: Result) -> str:
    return ", ".join(result["machines"]) or "no machine yet"


def _commit(commit: str | None) -> str:
    return "no commit" if commit is None else commit[:8]
