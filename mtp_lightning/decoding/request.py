"""What is asked of decoding: one text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtp_lightning.decoding.sampling import Sampling
from mtp_lightning.errors import UserError
from mtp_lightning.settings import is_whole, require_whole


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be made.

    Attributes:
        prompt: token ids, at least one; kept as a list.
        max_new_tokens: where it ends at the latest.
        sampling: how its tokens are chosen.
        seed: of its random numbers.
        index: which prompt of that seed it is: each has a stream of random numbers of its own.
        stop: strings that end the text; they are not part of it. Needs the engine's tokenizer.
        eot_id: end-of-text id that ends the text; None is the tokenizer's, -1 none.
        logprobs: None for no :class:`LogProb`; else one a token, with so many alternatives.

    Raises:
        UserError: a value out of range.
    """

    prompt: Sequence[int] | np.ndarray | Tensor
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    index: int = 0
    stop: tuple[str, ...] = ()
    eot_id: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        prompt = self.prompt
        ids = prompt.tolist() if isinstance(prompt, np.ndarray | Tensor) else list(prompt)
        object.__setattr__(self, "prompt", ids)
        for name in ("max_new_tokens", "seed"):
            if not is_whole(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} must be a whole number.")
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.logprobs is not None:
            require_whole("logprobs", self.logprobs, least=0)
        for string in self.stop:
            if not isinstance(string, str) or not string:
                raise UserError(f"stop={string!r} must be a string of at least one character.")
