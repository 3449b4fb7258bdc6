"""Text from a model: ``generate(model, prompts, ...)``, speculative or plain.

    from mtp_lightning.opening import open_model

    run = open_model("runs/mine")
    prompt = run.tokenizer.encode_prompt("def main():")
    print(generate(run.model, [prompt], max_new_tokens=100, tokenizer=run.tokenizer)[0].text)

It is a loop over an :class:`~mtp_lightning.decoding.engine.Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import DecodingOptions, Prompt
from mtp_lightning.decoding.sequence import Fresh, Generation
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel


def generate(
    model: MTPModel,
    prompts: Sequence[Prompt],
    options: DecodingOptions | None = None,
    *,
    tokenizer: Any = None,
    on_tokens: Callable[[int, Fresh], None] | None = None,
    on_end: Callable[[int, Generation], None] | None = None,
    indices: Sequence[int] | None = None,
    **changes: Any,
) -> list[Generation]:
    """Continue every prompt. Returns one :class:`Generation` per prompt, in order.

    Greedy output equals that of plain greedy decoding token for token; sampled output has the
    model's distribution. Drafts change the speed alone.

    Args:
        model: any variant. The call puts it into eval mode and restores its mode afterwards.
        prompts: token ids, at least one each.
        options: see :class:`~mtp_lightning.decoding.options.DecodingOptions`.
        tokenizer: with ``decode(ids)`` and ``end_ids``; gives texts, and the end of text.
        on_tokens: called as tokens are accepted, with the prompt's index and the new tokens.
        on_end: called as a text ends, with the prompt's index and the text.
        indices: of the prompts, which choose their random streams; 0, 1, .. by default.
        changes: options by name, which replace those of ``options``.

    Raises:
        UserError: an option is out of range, a prompt is empty or longer than the context, two
            indices are equal, one is missing, or the model predicts a task's whole answer at once.
    """
    options = replace(options or DecodingOptions(), **changes)
    # Allocate storage for no more texts than there are.
    options = replace(options, batch_size=min(options.slots, max(len(prompts), 1)))
    engine = Engine(model, options, tokenizer=tokenizer)
    indices = range(len(prompts)) if indices is None else indices
    if not len(set(indices)) == len(indices) == len(prompts):
        raise UserError(f"indices={list(indices)} must be {len(prompts)} different numbers.")
    requests = [options.request(p, index) for index, p in zip(indices, prompts, strict=True)]
    for request in requests:
        engine.check(request)
    generations: dict[int, Generation] = {}
    with engine:
        for sequence in engine.run(requests):
            if on_tokens is not None and (fresh := sequence.fresh()).token_ids:
                on_tokens(sequence.request.index, fresh)
            if sequence.finish_reason is not None:
                generation = generations[sequence.request.index] = sequence.generation()
                if on_end is not None:
                    on_end(sequence.request.index, generation)
    return [generations[index] for index in indices]
