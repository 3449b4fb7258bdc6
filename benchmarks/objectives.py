"""What every objective costs in the head: forward and backward of the main prediction and D depths.

Run ``python -m benchmarks.objectives``. Micro's width, batch 8 x 256, hidden states that are given;
the objectives take turns in one process, so that only ratios to cross-entropy mean anything on a
busy machine. ``alone`` is heads side by side, whose teacher is made anew for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from data_modules.windows import WindowBatch
from mtp_lightning.mtp.feed import Prediction, Together
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.stream import prepass, stream_loss
from mtp_lightning.objective.targets import (
    DepthTarget,
    PositionCounts,
    by_depth,
    count_taught,
)
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from mtp_lightning.objective.terms.nla import NLA
from mtp_lightning.objective.terms.reverse_kl import ReverseKL
from mtp_lightning.objective.terms.tv import TV
from mtp_lightning.objective.through_head import HeadWeight, through_head
from mtp_lightning.runtime import keep_freed_memory

TERMS: dict[str, Term] = {
    "ce": CrossEntropy(),
    "kl": KL(),
    "reverse_kl": ReverseKL(),
    "js": JS(),
    "tv": TV(),
    "nla": NLA(),
    "lk": LK(),
    "mix{ce, tv}": Mixture({"ce": 0.1, "tv": 0.9}),
    "feature": Mixture({"kl": 0.1, "feature": 1}),
    "e2e_tv": E2ETV(),
}


def one_pass(
    objective: Objective,
    weight_VC: Tensor,
    states: list[Tensor],
    batch: WindowBatch,
    *,
    alone: bool = False,
) -> float:
    """The head's part of a step: as a chain's depths go through it, or one depth after another."""
    weight_VC.grad = None
    counts = PositionCounts(batch.counts().tolist(), count_taught(batch).tolist())
    targets = [DepthTarget(0, batch.targets(0), 1 / counts.valid[0], CrossEntropy())]
    for k in range(1, batch.depth + 1):
        targets += objective.targets(k, batch, 0.1, counts, place=k)
    feed = Together(states[0], list(enumerate(states))[1:], {})
    seen = prepass(weight_VC, feed, targets, objective.measures)
    targets = objective.settle(targets, seen)
    if not alone:
        loss, _ = stream_loss(weight_VC, feed, targets)
        loss.backward()
        return float(loss.detach())
    head = HeadWeight(weight_VC, needs_gradient=True)
    total = 0.0
    for k, own in by_depth(targets).items():
        sums = torch.zeros(len(own), dtype=torch.float64)
        through_head(head, [Prediction(states[k], own)], sums, main_hidden=states[0])
        total += float(sum(t.coefficient * s for t, s in zip(own, sums, strict=True)))
    return total


ALONE = "kl, alone"


def measure(
    vocab_size: int, d_model: int, depth: int, repeats: int, names: list[str], *, windows: int = 8
) -> list[dict[str, Any]]:
    """One row an objective; the first of ``names`` is what the others are compared with."""
    generator = torch.Generator().manual_seed(0)
    seq_len = 256
    states = [
        torch.randn(windows, seq_len, d_model, generator=generator).requires_grad_()
        for _ in range(depth + 1)
    ]
    weight = (0.05 * torch.randn(vocab_size, d_model, generator=generator)).requires_grad_()
    tokens = torch.randint(vocab_size, (windows, seq_len + depth + 1), generator=generator)
    batch = WindowBatch(tokens, depth)
    functions: dict[str, Callable[[], float]] = {
        name: partial(
            one_pass,
            Objective(term=TERMS["kl" if name == ALONE else name]),
            weight,
            states,
            batch,
            alone=name == ALONE,
        )
        for name in names
    }
    losses = {name: function() for name, function in functions.items()}
    seconds = common.median_times(functions, repeats=repeats)
    return [
        {
            "vocab_size": vocab_size,
            "depth": depth,
            "objective": name,
            "loss": losses[name],
            "ms": taken * 1e3,
            "over_first": taken / seconds[names[0]],
        }
        for name, taken in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, writes the JSON and returns it."""
    parser = common.parser("Measures what every objective costs in the head.", "objectives")
    parser.add_argument("--vocab-sizes", type=common.whole_numbers, default=[4096, 32768])
    parser.add_argument("--d-model", type=int, help="default: micro's")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="default 9, with --quick 3")
    parser.add_argument("--objectives", nargs="+", choices=[*TERMS, ALONE], default=[*TERMS, ALONE])
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        common.use_cpu_time()
    repeats = options.repeats or (3 if options.quick else 9)
    d_model = options.d_model or common.compose_config(["model=micro"]).model.d_model
    measured = []
    for vocab_size in options.vocab_sizes:
        common.progress(f"V={vocab_size}")
        measured += measure(vocab_size, d_model, options.depth, repeats, options.objectives)
    result = {
        "benchmark": "objectives",
        "d_model": d_model,
        "repeats": repeats,
        "rows": measured,
        "machine": common.machine(),
    }
    common.print_table(
        f"Forward and backward of the head, 8 x 256 x {d_model}, D = {options.depth}, fp32",
        {
            "V": "vocab_size|,",
            "objective": "objective",
            "ms": "ms|.1f",
            "over first": "over_first|.2f",
        },
        measured,
    )
    common.write_json(result, options.output)
    return result


if __name__ == "__main__":
    keep_freed_memory()  # as the apps do
    main()
