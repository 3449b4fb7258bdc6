"""What a run and evaluate.py decode of held-out data, the same in both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtp_lightning.errors import UserError


def prompts_that_fit(
    data: Any, *, n_prompts: int, prompt_tokens: int, new_tokens: int
) -> tuple[list[Tensor], int]:
    """Held-out prompts, fewer where there are not so many, and the tokens to add to each, which fit
    into a window together. Of a task, whole prompts and the answer's length.

    Args:
        data: a data module that is set up.
        n_prompts: at most so many.
        prompt_tokens: of text, at most so long.
        new_tokens: of text.

    Raises:
        UserError: there are none, or a window has no room for ``new_tokens`` and a prompt.
    """
    new_tokens = new_tokens if data.answer_length is None else data.answer_length
    room = data.seq_len - new_tokens
    if room < 1:
        raise UserError(
            f"data.seq_len={data.seq_len} leaves no room for a prompt and new_tokens={new_tokens}: "
            "lower new_tokens"
        )
    return data.held_out_prompts(n_prompts, min(prompt_tokens, room), fewer=True), new_tokens
