"""Text from a model: ``generate(model, prompts, ...)``, speculative or plain.

model, tokenizer = ...
prompt = tokenizer.encode("def main():")
print(generate(model, [prompt], max_new_tokens=100, tokenizer=tokenizer)[0].text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mtp_lightning.decoding.drafting import Drafting
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.request import Request
from mtp_lightning.decoding.row import Generation
from mtp_lightning.decoding.sampling import Sampling
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.settings import is_whole

Prompt = Sequence[int] | np.ndarray | Tensor
OnTokens = Callable[[int, list[int], list[bool]], None]


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
    logprobs: int | None = None,
    tree: Sequence[int] | None = None,
    draft_vocab: int | None = None,
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
        batch_size: prompts decoded together; by default all. The place of one that has ended is
            taken by the next.
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
        logprobs: also say how likely the trunk took every token for, and so many alternatives.
        tree: draft several candidates a depth, ``[3, 2, 1]`` three for the next token, two behind
            each of them, one behind each of these, and judge all in one pass.
        draft_vocab: choose drafts from so many tokens, those of the first ids, and read no more of
            the head for them (``short_head.py``); by default from all.

    Returns:
        One :class:`Generation` a prompt, in order.

    Raises:
        UserError: an option out of range, an empty prompt, a prompt longer than the context, a
            model that gives its answers at once.
    """
    if batch_size is not None and (not is_whole(batch_size) or batch_size < 1):
        raise UserError(f"batch_size={batch_size} must be a whole number of at least 1.")
    places = max(len(prompts), 1) if batch_size is None else int(batch_size)
    engine = Engine(
        model,
        places=1 if compile and batch_size is None else places,
        drafting=Drafting(
            speculative=speculative,
            draft_depth=draft_depth,
            min_confidence=min_confidence,
            cache=cache,
            compile=compile,
            tree=None if tree is None else Tree(tuple(tree)),
            draft_vocab=draft_vocab,
        ),
        tokenizer=tokenizer,
        max_context=max_context,
        long=long,
    )
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            index=index,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            eot_id=eot_id,
            logprobs=logprobs,
        )
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        engine.check(request)
    return _decode(engine, requests, on_tokens)


def _decode(
    engine: Engine, requests: Sequence[Request], on_tokens: OnTokens | None
) -> list[Generation]:
    """Decode all requests, as many at a time as there are places."""
    waiting, done = deque(requests), dict[int, Generation]()
    with engine:
        while waiting or engine.rows:
            joined = engine.add([waiting.popleft() for _ in range(min(engine.free, len(waiting)))])
            for row in (*joined, *engine.step()):
                fresh = row.fresh()
                if on_tokens is not None and fresh.token_ids:
                    on_tokens(row.request.index, fresh.token_ids, fresh.accepted_mask)
                if row.finish_reason is not None:
                    done[row.request.index] = row.generation()
    return [done[request.index] for request in requests]
