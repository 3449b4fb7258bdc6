"""Divides the time of a decoding round among its passes and the work around them.

    python -m benchmarks.rounds runs/smollm2 [--drafts 1] [--draft-vocab 4096] [--temperature 1]

One text at a time on one thread, in CPU seconds. Every part of a round is timed without the parts
that it calls, so that the parts sum to the round. Then single passes are timed in turn: the trunk
over 1 to 4 tokens, a draft with the whole head and with the short one, over 1 to 3 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import cli, harness
from benchmarks.harness import Row
from benchmarks.pretrained_heads import PROMPTS, prompt_ids
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.sequence import TextSequence
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.speculative import Decoder
from mtp_lightning.experiment.generating import open_for_decoding
from mtp_lightning.model import MTPModel
from mtp_lightning.system import processor

# The names of the parts in the table, and their methods.
PARTS: dict[str, tuple[harness.Method, ...]] = {
    "verify: the trunk and the head": ((Session, "verify"),),
    "draft: the module and its head": ((Session, "_newest_states"),),
    "catching up with tokens not drafted at": ((Session, "catch_up"),),
    "states and logits of a draft": ((Session, "draft"),),
    "token buffer": ((Session, "put"), (Session, "accept")),
    "choosing, comparing, copying": ((Decoder, "round"),),
    "text, stop strings, counts": ((TextSequence, "take"), (Engine, "step")),
}


def parts_of_rounds(
    model: MTPModel, prompts: list[list[int]], options: DecodingOptions
) -> tuple[Row, float]:
    """Milliseconds of every part of a round, and tokens per round."""
    total, rounds, tokens = Counter[str](), 0, 0
    for number, prompt in enumerate(prompts):
        with Engine(model, options) as engine:
            (sequence,) = engine.add([options.request(prompt, number)])
            engine.step()  # reads the prompt with the modules, too
            before = len(sequence.token_ids)
            with harness.timed_calls(PARTS) as seconds:
                while sequence.finish_reason is None:
                    engine.step()
                    rounds += 1
            tokens += len(sequence.token_ids) - before
        total.update({name: sum(own) for name, own in seconds.items()})
    return {name: 1e3 * total[name] / rounds for name in PARTS}, tokens / rounds


def single_passes(
    model: MTPModel, prompt: list[int], draft_vocab: int | None, repeats: int
) -> dict[str, float]:
    """Median milliseconds of single passes, which take turns."""
    deepest = model.mtp.max_draft_depth or 3
    with decoding_passes(model):
        calls: dict[str, Callable[[], Any]] = {}
        for vocab in dict.fromkeys((None, draft_vocab)):
            head = "whole head" if vocab is None else f"head of {vocab} tokens"
            room: Row = {"slots": 1, "capacity": len(prompt) + 32, "max_draft": deepest}
            session = Session(model, **room, draft_vocab=vocab)
            session.join([prompt])
            session.draft(1)
            for n in range(1, min(4, deepest + 1) + 1) if vocab is None else ():
                name = f"trunk, {n} tokens" if n > 1 else "trunk, 1 token"
                calls[name] = partial(session.verify, n - 1)
            for n in (1, 2, 3):
                calls[f"draft, {head}, reads {n}"] = partial(_draft, session, n)
        seconds = harness.median_times(calls, repeats=repeats)
    return {name: 1e3 * found for name, found in seconds.items()}


def _draft(session: Session, reads: int) -> None:
    """A draft of a module that reads the last tokens first."""
    session.filled[1] = [n - reads for n in session.n_read]
    session.draft(1)


@cli.command(quick={"new_tokens": 8, "repeats": 2})
def rounds(
    run: str,
    /,
    drafts: int = 1,
    draft_vocab: int = 0,
    precision: str = "fp32",
    head_precision: str = "auto",
    activations: str = "fp32",
    temperature: float = 0.0,
    new_tokens: int = 64,
    repeats: int = 40,
) -> Row:
    """The parts of a round, plain and with drafts, and single passes.

    Args:
        run: a run folder, a checkpoint, a Hugging Face folder or a GGUF file.
        drafts: drafts a round.
        draft_vocab: tokens that drafts are chosen from; 0 for all.
        precision: of the weights.
        head_precision: of the modules' own matrices.
        activations: of products with weights in blocks.
        temperature: 0 is greedy.
    """
    harness.use_cpu_time()
    opened = open_for_decoding(
        run,
        precision=precision,
        head_precision=head_precision,
        activations=activations,
    )
    model, tokenizer = opened.model, opened.tokenizer
    prompts = [prompt_ids(tokenizer, kind, PROMPTS[kind][0]) for kind in ("code", "prose")]
    base = DecodingOptions(
        batch_size=1, max_new_tokens=new_tokens, temperature=temperature, eot_id=-1
    )
    ways = {"plain": base.plain()}
    if model.mtp.max_draft_depth != 0:
        ways["with drafts"] = replace(base, draft_depth=drafts, draft_vocab=draft_vocab or None)
    rows: list[Row] = []
    for way, options in ways.items():
        parts, tokens = parts_of_rounds(model, prompts, options)
        whole = sum(parts.values())
        own = {"way": way, "tokens_per_round": tokens}
        rows += [
            {**own, "part": name, "ms": ms, "share": ms / whole} for name, ms in parts.items() if ms
        ]
        rows.append({**own, "part": "the round", "ms": whole, "share": 1.0})
    cli.print_table(
        f"{run}: a round on one thread, CPU time",
        "way: way; tokens: tokens_per_round .2f; part: part; ms: ms .3f; share: share .1%",
        rows,
    )
    passes = single_passes(model, prompts[1], draft_vocab or None, repeats)
    first = passes["trunk, 1 token"]
    singles = [{"part": name, "ms": ms, "over": ms / first} for name, ms in passes.items()]
    cli.print_table(
        "single passes", "pass: part; ms: ms .3f; over the trunk of 1 token: over .2f", singles
    )
    return {"processor": processor(), "rows": rows, "passes": singles}


main = cli.program(rounds)

if __name__ == "__main__":
    main()
