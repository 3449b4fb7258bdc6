"""What a depth's teacher-forced numbers mean: some heads read the true tokens, some do not.

Sequential modules are given the true tokens up to i + k before they predict the next one; parallel
and linear heads and bare targets predict it from the tokens up to i. The losses, agreements and
overlaps of a depth are then those of two different tasks. The depth of a head that summarises what
comes, or of registers, predicts no token of its own at all.
"""

from __future__ import annotations

from sweeps.report.metrics import some
from sweeps.report.settings import Setting, Settings

MEANS = {
    True: "Depth k reads the true tokens before its target (teacher-forced): its loss, agreement "
    "and overlap are those of the token after one that it has seen.",
    False: "Depth k reads no token beyond the main prediction's: its loss, agreement and overlap "
    "are those of a token k places beyond the next.",
}


def reads_tokens(setting: Setting) -> bool | None:
    """Whether the depths of a setting read true tokens; None where there is no depth, or no
    finished run that says it."""
    said = {run.summary.get("mtp_reads_tokens") for run in setting.done if setting.depth}
    return said.pop() if len(said) == 1 and predicts_tokens(setting) else None


def predicts_tokens(setting: Setting) -> bool:
    """Whether the depths of a setting predict a token each, unless a finished run says it not."""
    return all(run.summary.get("mtp_predicts_tokens", True) for run in setting.done)


def meaning(settings: Settings) -> str:
    """What the teacher-forced numbers of these settings' depths are, for beneath a chart or table
    of them; empty where no run says it."""
    others = [setting.label for setting in settings.all if not predicts_tokens(setting)]
    remark = _of_tokens(settings)
    if others:
        remark += (
            f" The depth of {some(others)} predicts no token of its own: its loss is of another "
            "kind, stands in no chart of losses by depth, and compares with no other head's."
        )
    return remark.lstrip()


def _of_tokens(settings: Settings) -> str:
    """:func:`meaning` of the settings whose depths predict tokens."""
    by_kind: dict[bool, list[str]] = {}
    for setting in settings.all:
        reads = reads_tokens(setting)
        if reads is not None:
            by_kind.setdefault(reads, []).append(setting.label)
    if len(by_kind) < 2:
        return "".join(MEANS[reads] for reads in by_kind)
    given, blind = (some(by_kind[reads]) for reads in (True, False))
    return (
        f"Two tasks stand side by side here. With {given} depth k reads the true tokens before its "
        f"target, with {blind} none beyond the main prediction's. Loss, agreement and overlap of a "
        "depth do not compare between the two: compare what the decoding loop accepts, decode/*."
    )
