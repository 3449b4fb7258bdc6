"""The reported metrics with names and units, and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_lightning.run.solved import EXACT
from sweeps.report.statistics import Interval

LOSS, BITS = "val/loss_depth_0", "val/bits_per_byte"
BITS_ERROR = "val/bits_per_byte_se"  # over the documents of the text, by bootstrap
STEPS, FLOPS, SECONDS = "step", "flops", "seconds"
PER_STEP, SPEEDUP = "decode/tokens_per_step", "decode/speedup"
DECODE_SPEED = "decode/tokens_per_second"
# Above 0; their intervals are those of their logarithms.
SPEEDS = (SPEEDUP, DECODE_SPEED, SECONDS)
CHANCE = "val/chance"  # the exact match of a random answer

# Tags of shares in 0 .. 1, whose intervals over seeds stay within 0 .. 1.
_SHARES = re.compile(
    r"(val|decode)/([^/]+/)?(forced_|candidate_)?"
    r"(accuracy|agreement|overlap|acceptance(?!_slope)|exact_match|creativity|rejection|recall|floor)(_.*)?"
)
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


@dataclass(frozen=True)
class Metric:
    """One column of the table of settings."""

    tag: str  # its key in `summary.json`
    name: str  # its name in the table
    unit: str  # its unit in the table
    form: str | int  # `%`, `si`, or the number of decimal places

    def show(self, value: float) -> str:
        return number(value, self.form)


TABLE = (
    Metric(LOSS, "Loss", "nats per token", 4),
    Metric(BITS, "Loss", "bits per byte", 4),
    Metric("val/agreement_depth_1", "Agreement", "of depth 1", "%"),
    Metric(PER_STEP, "Tokens", "per pass", 2),
    Metric(SPEEDUP, "Speed-up", "of decoding", 2),
    Metric(DECODE_SPEED, "Decoding", "tokens per second", 0),
    Metric("val/context_score", "Loss, late − early", "nats per token", 4),
    Metric("val/effective_context", "Effective context", "tokens", 0),
    Metric(STEPS, "Training", "steps", 0),
    Metric(FLOPS, "Training", "FLOPs", "si"),
    Metric(SECONDS, "Training", "seconds", 1),
)

ANSWERS = Metric(EXACT, "Exact match", "of answers", "%")
OF_TASKS = (  # metrics of single tasks
    Metric("val/creativity", "Creativity", "of sampled answers", "%"),
    Metric("val/excess_loss", "Excess loss", "nats per token", 4),
    Metric("val/belief_r2", "Beliefs", "R² of an affine probe", 3),
)

BY_TAG = {metric.tag: metric for metric in TABLE}

CURVE_AXES = {
    "tokens": ("progress/tokens", "training tokens"),
    "flops": ("progress/flops", "training FLOPs"),
    "seconds": ("progress/seconds", "seconds of training, validation left out"),
}


def number(value: float, form: str | int) -> str:
    """A number as text: ``0.4312`` as ``43.1 %``, ``1.97e11`` as ``197 G``, or with decimals."""
    if not math.isfinite(value):
        return str(value)
    if form == "%":
        return f"{value:.1%}".replace("%", " %").replace("-", "−")
    if form == "si":
        value = float(f"{value:.3g}")  # 999.7 is 1 k, not 1e+03
        power = min(max(int(math.log10(abs(value)) // 3), 0), 8) if value else 0
        return f"{value / 1000**power:.3g} {_PREFIXES[power]}".strip()
    return f"{value:,.{form}f}".replace("-", "−")


def is_share(tag: str) -> bool:
    """Whether a tag's values are shares, 0 .. 1."""
    return _SHARES.fullmatch(tag) is not None


def form_of(tag: str) -> str | int:
    """The form in which a tag's values are written."""
    if is_share(tag) or "/gap_depth" in tag:
        return "%"
    return BY_TAG[tag].form if tag in BY_TAG else 4


def spread(interval: Interval, form: str | int) -> str:
    """An interval as text: ``± 0.0021``, or ``28.4 % to 99.5 %`` for a share; empty without one."""
    if interval.ends is not None:
        return " to ".join(number(end, form) for end in interval.ends)
    return "" if interval.half is None else f"± {number(interval.half, form)}"


def with_interval(interval: Interval, metric: Metric) -> str:
    """``2.3456 ± 0.0021``; without an interval, the value alone."""
    return f"{metric.show(interval.mean)} {spread(interval, metric.form)}".rstrip()


def p_value(p: float | None) -> str:
    """``0.03``, ``< 0.001``; empty without a test."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def equals(p: float | None) -> str:
    """``= 0.03``, ``< 0.001``."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def first_to_last(texts: Sequence[str]) -> str:
    """``4 to 5``, the ends of a range; a single text alone."""
    return " to ".join(dict.fromkeys((*texts[:1], *texts[-1:])))


def first_few(names: Sequence[str], *, between: str = "; ") -> str:
    """The first four names, and the number of the others."""
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return between.join(names[:4]) + rest
