"""Opens a model and runs all cells, a part of the prompts at a time."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mtp_lightning.certify.cells import BATCH, PLAIN, Cell, cells
from mtp_lightning.certify.certificate import Certificate, Row
from mtp_lightning.certify.others import compare_others, require_programs
from mtp_lightning.certify.texts import decode, prompts
from mtp_lightning.decoding.fused import rounded_weights_need
from mtp_lightning.decoding.precision import (
    AUTO,
    PRECISIONS,
    check_precision,
    packer_after_rounding,
    split_precision,
    use_activations,
)
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn import ops
from mtp_lightning.opening import OpenedModel, open_model
from mtp_lightning.system import processor

# Prompts whose logits are in memory at the same time, if the time has no limit.
_PART = 16


def certify(
    path: Path,
    *,
    count: int = 1000,
    length: int = 16,
    precisions: Sequence[str] | None = None,
    few: bool = False,
    minutes: float | None = None,
    file: Path | None = None,
    seed: int = 0,
    allow: Sequence[str] = (),
    against: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    interrupted: Callable[[Certificate], None] = lambda so_far: None,
) -> Certificate:
    """Run all cells of a model.

    Args:
        path: a run, a checkpoint, a Hugging Face folder or a GGUF file.
        count, length: number of prompts, and of new tokens of each.
        precisions: precisions of the weights; None for those that this machine decodes in.
            ``int4/int8`` are weights in int4 with ``activations=int8``.
        few: run only few cells, see :func:`~mtp_lightning.certify.cells.cells`.
        minutes: no more prompts are taken after this time, divided equally among the precisions;
            each precision is tried on eight prompts at least.
        file: the prompts' text; None as in :func:`~mtp_lightning.certify.texts.prompts`.
        seed: the seed of prompts and samples.
        allow: packages whose variants the model may use.
        against: other programs to count for, see :mod:`~mtp_lightning.certify.others`.
        say: called with a line after every part.
        interrupted: called with the results so far if Ctrl-C or SIGTERM ends the work.

    Raises:
        UserError: an option is out of range, the model cannot be opened, or another program cannot
            be asked.
    """
    if precisions is None:
        precisions = ("fp32",) if rounded_weights_need() else PRECISIONS
    if repeated := [name for name in precisions if precisions.count(name) > 1]:
        raise UserError(f"--weights names {repeated[0]} twice: name each precision once.")
    for precision in precisions:
        weights, activations = split_precision(precision)
        check_precision(weights, activations=activations)
    require_programs(against, path)
    threads = (1,) if torch.get_num_threads() == 1 else (1, 2)
    seconds = None if minutes is None else 60 * minutes / len(precisions)
    beginnings: list[list[int]] = []  # the same for every precision
    result: Certificate | None = None
    try:
        for precision in precisions:
            run = _opened(path, precision, length, allow)
            if not beginnings:
                longest = run.seq_len - length
                beginnings = prompts(run.tokenizer, count, longest=longest, seed=seed, file=file)
            settings = {"new_tokens": length, "seed": seed}
            result = result or _empty_certificate(path, run.model, settings)
            rows = [Row(precision, cell) for cell in cells(run.model, threads, few=few)]
            result.rows += rows
            _run_cells(run.model, rows, beginnings, length, seed=seed, seconds=seconds, say=say)
        assert result is not None
        if against:
            compared = beginnings[: max(row.greedy.texts for row in result.rows)]
            result.others = compare_others(against, path, compared, length, say)
    except KeyboardInterrupt:
        if result is not None:
            result.rows = [row for row in result.rows if row.greedy.texts]
            if result.rows:
                interrupted(result)
        raise
    return result


def _opened(path: Path, precision: str, length: int, allow: Sequence[str]) -> OpenedModel:
    """The model in a precision, if ``length`` new tokens fit its context."""
    weights, activations = split_precision(precision)
    packer = packer_after_rounding(weights, AUTO)  # the formats that generate.py reads
    # Without its path, the model leaves no packed copy in the cache folder.
    run = open_model(path, allow=allow, packer_for=lambda model, _: packer(model, None))
    if length >= run.seq_len:
        raise UserError(
            f"{length} new tokens do not fit the context of {run.seq_len} that {path} was "
            "trained on: lower --new-tokens."
        )
    use_activations(run.model, activations)
    return run


def _empty_certificate(path: Path, model: MTPModel, settings: dict[str, int]) -> Certificate:
    """A certificate without rows, with the facts of this machine and the ``settings``."""
    code, layers = ops.code()
    machine = {"machine": platform.machine(), "processor": processor(), "torch": torch.__version__}
    trunk = model.config.trunk
    return Certificate(
        model=str(path),
        facts={**machine, "layers": layers, **settings},
        same_bits=code.startswith("native"),  # the C++ for CPUs
        prompts_alike=trunk.same_bits_in_wide_passes,
    )


def _run_cells(
    model: MTPModel,
    rows: Sequence[Row],
    beginnings: Sequence[list[int]],
    length: int,
    *,
    seed: int,
    seconds: float | None,
    say: Callable[[str], None],
) -> None:
    """Try the rows of one precision on the prompts ``beginnings``, a part at a time, until
    ``seconds`` have passed; other arguments as of :func:`certify`."""
    step, end = _PART, float("inf")
    if seconds is not None:
        # A batch is the least that every cell can be tried on.
        step, end = BATCH, time.monotonic() + seconds
    for first in range(0, len(beginnings), step):
        part = beginnings[first : first + step]
        wanted = decode(model, PLAIN, part, [length] * len(part))
        for row in rows:
            row.greedy.try_on(model, row.cell, part, wanted, first=first)
            if _is_sampled(row.cell):
                row.sampled.draw(model, row.cell, part, length, first=first, seed=seed)
        done = first + len(part)
        late = time.monotonic() > end
        why = ", as many as the given time holds" if late and done < len(beginnings) else ""
        say(f"{rows[0].precision}: {done:,} of {len(beginnings):,} prompts{why}, {len(rows)} cells")
        if late:
            break


def _is_sampled(cell: Cell) -> bool:
    """Whether a cell's samples are drawn. One cell per way of drafting is enough: greedy texts test
    everything else that their distribution depends on. Drafts are looked up for single texts."""
    batch = 1 if cell.options.lookup else BATCH
    return cell == replace(PLAIN, drafts=cell.drafts, options=cell.options, batch=batch)
