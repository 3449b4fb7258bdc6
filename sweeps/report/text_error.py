"""The error that bits per byte have from the text alone: another text would have given another
number, however many seeds are averaged."""

from __future__ import annotations

from collections.abc import Sequence

from sweeps.report.metrics import BITS, BITS_ERROR, BY_TAG
from sweeps.report.settings import Setting


def error_of_text(setting: Setting) -> float | None:
    """Standard error of a setting's bits per byte over the documents of the evaluation text, by
    bootstrap, mean over seeds; None where a finished run has none."""
    found = setting.estimate(BITS_ERROR).interval
    return found.mean if found else None


def text_errors(settings: Sequence[Setting]) -> str:
    """What stands beside intervals over seeds, and what it is not; empty without errors."""
    errors = [error for setting in settings if (error := error_of_text(setting)) is not None]
    if not errors:
        return ""
    least, most = (BY_TAG[BITS].show(error) for error in (min(errors), max(errors)))
    size = least if least == most else f"{least} to {most}"
    return (
        f"The text's own error in bits per byte is {size}: the standard error over its documents "
        "(bootstrap, mean over seeds), beside the ± over seeds. It says how far another text would "
        "move the numbers, all of them together; it is not the error of a difference between runs "
        "on the same text."
    )
