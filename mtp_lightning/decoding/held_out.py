"""The held-out prompts that a run and evaluate.py decode: the same in both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtp_lightning.errors import UserError


def prompts_that_fit(
    data: Any, *, n_prompts: int, prompt_tokens: int, new_tokens: int
) -> tuple[list[Tensor], int]:
    """Held-out prompts and the number of tokens to generate, which fit into one window together.

    For a task, the prompts are whole and the number is the length of an answer.

    Args:
        data: a data module that is set up.
        n_prompts: the most prompts; there are fewer if the data holds fewer.
        prompt_tokens: for text, the most tokens of a prompt.
        new_tokens: for text, the number of tokens to generate.

    Raises:
        UserError: there are no prompts, or a window has no room for ``new_tokens`` and a prompt.
    """
    new_tokens = new_tokens if data.answer_length is None else data.answer_length
    room = data.seq_len - new_tokens
    if room < 1:
        raise UserError(
            f"data.seq_len={data.seq_len} leaves no room for a prompt and new_tokens={new_tokens}: "
            "lower new_tokens"
        )
    return data.held_out_prompts(n_prompts, min(prompt_tokens, room), fewer=True), new_tokens
