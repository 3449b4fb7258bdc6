"""Text from a model: ``generate(model, prompts, ...)``, speculative or plain.

model, tokenizer = ...
prompt = tokenizer.encode("def main():")
print(generate(model, [prompt], max_new_tokens=100, tokenizer=tokenizer)[0].text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mtp_lightning.decoding.adaptive import AutoDepth
from mtp_lightning.decoding.compiled import CompiledSession, compiled_decoding, require_compiler
from mtp_lightning.decoding.row import Generation, Row
from mtp_lightning.decoding.sampling import Noise, Sampling
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.single_cache import SingleCacheSession
from mtp_lightning.decoding.speculative import Decoder
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.kernels.matmul import packed_weights
from mtp_lightning.settings import is_whole, require_choice, require_number

Prompt = Sequence[int] | Tensor
OnTokens = Callable[[int, list[int], list[bool]], None]


@dataclass(frozen=True)
class _Options:
    max_new_tokens: int
    max_draft: int
    auto: bool
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    tokenizer: Any
    eot_id: int | None
    max_context: int | None
    long: str
    on_tokens: OnTokens | None
    compile: bool
    min_confidence: float
    cache: str


def generate(
    model: MTPModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    speculative: bool = True,
    draft_depth: int | Literal["auto"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    eot_id: int | None = None,
    batch_size: int | None = None,
    max_context: int | None = None,
    long: Literal["refuse", "slide"] = "refuse",
    on_tokens: OnTokens | None = None,
    compile: bool = False,
    min_confidence: float = 0.0,
    cache: Literal["per_depth", "single"] = "per_depth",
) -> list[Generation]:
    """Continue every prompt.

    Greedy output is, token for token, that of plain greedy decoding; sampled output has the
    model's distribution. Drafts change the speed alone.

    Args:
        model: any variant. It is put into eval mode for the call.
        prompts: token ids, at least one each.
        max_new_tokens: for every prompt.
        speculative: draft with the MTP modules; False is plain decoding.
        draft_depth: tokens to draft in a round; by default the model's depth. A single module
            can draft more. ``"auto"`` measures what pays, down to plain decoding; with a
            temperature its samples then depend on timing, their distribution does not.
        temperature: 0 is greedy.
        top_k: see :class:`~mtp_lightning.decoding.sampling.Sampling`.
        top_p: likewise.
        seed: of the samples; every prompt has a stream of its own.
        stop: strings that end a text; they are not part of it. Needs ``tokenizer``.
        tokenizer: with ``decode(ids)`` and ``eot_id``, for texts.
        eot_id: end-of-text id that ends a text; by default the tokenizer's.
        batch_size: prompts decoded together; by default all.
        max_context: most tokens the model may read at once: the ``seq_len`` it was trained on.
        long: what happens beyond: ``"refuse"`` raises, ``"slide"`` goes on from the last half
            of the context, read anew.
        on_tokens: called as tokens are accepted, with the prompt's index, the token ids, and
            which of them were drafts.
        compile: run compiled passes, see ``compiled.py``: several times as fast once they are
            built, which takes about ten seconds a program. One prompt at a time; greedy texts can
            part from plain decoding where two tokens' logits agree to about 1e-5.
        min_confidence: stop drafting where the model believes that the drafts so far are accepted
            with less than this probability; 0 never does. For models trained with
            ``objective.confidence=true``.
        cache: of a single sequential module that drafts several tokens: ``per_depth`` keeps one for
            each draft, at the positions of training, ``single`` one for all (``single_cache.py``).

    Returns:
        One :class:`Generation` a prompt, in order.

    Raises:
        UserError: an option out of range, an empty prompt, a prompt longer than the context, a
            model that gives its answers at once.
    """
    if model.config.mtp.answers_at_once:
        raise UserError(
            f"a model of mtp={model.config.mtp.variant} says a task's answers all at once and not "
            "token by token: ask it by evaluate.py."
        )
    ids = [_token_ids(prompt, i, model) for i, prompt in enumerate(prompts)]
    options = _Options(
        max_new_tokens=_positive("max_new_tokens", max_new_tokens),
        max_draft=_max_draft(model, speculative, draft_depth),
        auto=speculative and draft_depth == "auto",
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=_whole("seed", seed),
        stop=_stop_strings(stop, tokenizer),
        tokenizer=tokenizer,
        eot_id=getattr(tokenizer, "eot_id", None) if eot_id is None else eot_id,
        max_context=None if max_context is None else _positive("max_context", max_context),
        long=long,
        on_tokens=on_tokens,
        compile=compile,
        min_confidence=require_number("min_confidence", min_confidence, least=0, most=1),
        cache=require_choice("cache", cache, ("per_depth", "single")),
    )
    if min_confidence:
        _check_confidence(model, options)
    if cache == "single":
        _check_single_cache(model, options)
    _check_lengths(ids, options)
    size = len(ids) if batch_size is None else _positive("batch_size", batch_size)
    if compile:
        require_compiler(model)
        if batch_size not in (None, 1):
            raise UserError(
                f"compile=true decodes one prompt at a time: set batch_size=1, not {batch_size}."
            )
        size = 1
    done: dict[int, Generation] = {}
    training = model.training
    model.eval()
    try:
        with compiled_decoding(model) if compile else eager_decoding(model):
            for start in range(0, len(ids), max(size, 1)):
                indices = range(start, min(start + size, len(ids)))
                _decode({i: ids[i] for i in indices}, model, options, done)
    finally:
        model.train(training)
    return [done[i] for i in range(len(ids))]


def _decode(
    prompts: dict[int, list[int]],
    model: MTPModel,
    options: _Options,
    done: dict[int, Generation],
) -> None:
    """Decode one batch to its end; ``done`` receives what is finished."""
    began = time.perf_counter()
    limit = options.max_context
    windows = list(prompts.values())
    if limit is not None:
        # Only long="slide" lets a longer prompt pass.
        windows = [w if len(w) <= limit else w[-_kept(limit) :] for w in windows]
    capacity = max(len(window) for window in windows) + options.max_new_tokens
    kind = SingleCacheSession if options.cache == "single" else Session
    session = (CompiledSession if options.compile else kind)(
        model,
        windows,
        capacity=capacity if limit is None else min(capacity, limit),
        max_draft=options.max_draft,
    )
    noise = Noise(options.seed, list(prompts), session.tokens_BS.device)
    decoder = Decoder(
        session,
        options.sampling,
        noise,
        max_draft=options.max_draft,
        min_confidence=options.min_confidence,
    )
    rows = [Row(index, options.max_draft, options) for index in prompts]
    auto = AutoDepth(options.max_draft) if options.auto and options.max_draft else None

    def finish() -> None:
        for i in range(len(rows) - 1, -1, -1):
            if rows[i].finish_reason is None:
                continue
            done[rows[i].index] = rows[i].generation(time.perf_counter() - began)
            rows[i] = rows[-1]
            rows.pop()
            noise.drop_row(i)
            session.drop_row(i)

    for row, token in zip(
        rows, decoder.first(session.prefill([len(w) for w in windows])), strict=True
    ):
        row.extend([token], accepted=0)
    finish()
    timed_rows = len(rows)
    while rows:
        if limit is not None:
            for i, n in enumerate(session.n):
                if n >= limit:
                    session.slide(i, _kept(limit))
        caps = [row.remaining - 1 for row in rows]
        if limit is not None:
            caps = [min(cap, limit - n - 1) for cap, n in zip(caps, session.n, strict=True)]
        if auto is not None and 2 * len(rows) <= timed_rows:
            timed_rows = len(rows)
            auto.forget_times()
        wanted = options.max_draft if auto is None else auto.depth
        # A compiled pass has one width; what is drafted beyond a cap is not judged.
        n_drafts = wanted if options.compile else min(wanted, max(caps))
        start = time.perf_counter()
        outcome = decoder.round(n_drafts, caps)
        if auto is not None and n_drafts == wanted:
            seconds, reached_by = time.perf_counter() - start, outcome.reached
            if options.min_confidence:  # a draft that was not believed in is one that failed
                reached_by = [
                    min(a + 1, n_drafts, cap) for a, cap in zip(outcome.accepted, caps, strict=True)
                ]
            auto.record(n_drafts, seconds, outcome.accepted, reached_by)
        for row, tokens, accepted, reached in zip(
            rows, outcome.tokens, outcome.accepted, outcome.reached, strict=True
        ):
            row.take_round(tokens, accepted, reached)
        if any(row.finish_reason is not None for row in rows):
            finish()


@contextmanager
def eager_decoding(model: MTPModel) -> Iterator[None]:
    """How passes of a :class:`Session` run: without autograd, with packed weights, uncompiled.

    What was compiled for training is left alone: passes of ever other sizes would be compiled.
    """
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with torch.inference_mode(), packed_weights(model), stance:
        yield


def _kept(limit: int) -> int:
    """Tokens of a full context of ``limit`` that sliding keeps."""
    return max(limit // 2, 1)


def _max_draft(model: MTPModel, speculative: bool, draft_depth: object) -> int:
    most = model.mtp.max_draft_depth
    if draft_depth is None or draft_depth == "auto":
        if most is None:
            # A single module has no end; twice the trained depth is where auto stops looking.
            most = model.depth if draft_depth is None else 2 * model.depth
        return most if speculative else 0
    if not is_whole(draft_depth) or draft_depth < 1:
        raise UserError(
            f"draft_depth={draft_depth} must be a whole number of at least 1, or 'auto'; "
            "speculative=false is plain decoding."
        )
    if speculative:
        model.mtp.require_drafts()
    if speculative and most is not None and draft_depth > most:
        raise UserError(
            f"draft_depth={draft_depth}, but the model drafts {most} tokens: use at most {most}."
        )
    return draft_depth if speculative else 0


def _check_confidence(model: MTPModel, options: _Options) -> None:
    asked = f"min_confidence={options.min_confidence}"
    if model.mtp.confidence is None:
        raise UserError(
            f"{asked} needs a model that says how sure it is of its drafts: train one with "
            "objective.confidence=true, or leave it 0."
        )
    if not options.max_draft:
        raise UserError(
            f"{asked} does not go together with speculative=false: leave one of them out."
        )


def _check_single_cache(model: MTPModel, options: _Options) -> None:
    if not model.mtp.is_recursive:
        raise UserError(
            f"cache={options.cache} is for a single module that reads its own output: decode a "
            "model of mtp=sequential with mtp.depth=1 or mtp.share_layers=true, or leave it "
            "per_depth."
        )
    if options.compile or not options.max_draft:
        other = "compile=true" if options.max_draft else "speculative=false"
        raise UserError(
            f"cache={options.cache} does not go together with {other}: leave one of them out."
        )


def _token_ids(prompt: Prompt, index: int, model: MTPModel) -> list[int]:
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    vocab = model.config.trunk.vocab_size
    if not ids:
        raise UserError(f"Prompt {index} is empty: give at least one token.")
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < vocab:
            raise UserError(
                f"Prompt {index} holds {token!r}, not a token id of the model (0 to {vocab - 1}): "
                "encode it with the tokenizer that the model was trained with."
            )
    return ids


def _check_lengths(prompts: list[list[int]], options: _Options) -> None:
    if options.long not in ("refuse", "slide"):
        raise UserError(f"long={options.long} is unknown: choose refuse or slide.")
    limit = options.max_context
    if limit is None or options.long == "slide":
        return
    for i, prompt in enumerate(prompts):
        # The last new token is never read.
        total = len(prompt) + options.max_new_tokens - 1
        if total > limit:
            raise UserError(
                f"Prompt {i} has {len(prompt)} tokens and {options.max_new_tokens} new ones are "
                f"asked for: {total} to read, but the model was trained on {limit}. Shorten the "
                "prompt, lower max_new_tokens, or set long=slide."
            )


def _stop_strings(stop: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise UserError(f"stop={string!r} must be a string of at least one character.")
    if strings and tokenizer is None:
        raise UserError(f"stop={list(strings)} needs a tokenizer: pass tokenizer=.")
    return strings


def _whole(name: str, value: object) -> int:
    if not is_whole(value):
        raise UserError(f"{name}={value} must be a whole number.")
    return value


def _positive(name: str, value: object) -> int:
    if _whole(name, value) < 1:
        raise UserError(f"{name}={value} must be at least 1.")
    assert isinstance(value, int)
    return value
