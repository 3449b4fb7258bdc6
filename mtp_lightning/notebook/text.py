"""Generated text that shows which of its tokens were drafts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mtp_lightning.decoding import Generation
from mtp_lightning.decoding.detokenizer import Detokenizer

_STYLE = "white-space:pre-wrap;font-family:monospace;margin:0"
# Backgrounds keep the page's own contrast of the text, light or dark.
_PROMPT, _DRAFT = "opacity:.8", "background:rgba(31,154,115,.2);text-decoration:underline dotted"


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation; a notebook colors the accepted drafts.

    Attributes:
        prompt: the prompt.
        generation: the continuation, with the counts of the draft-verify loop.
        tokenizer: the model's tokenizer.
    """

    prompt: str
    generation: Generation
    tokenizer: Any

    def __str__(self) -> str:
        return f"{self.prompt}{self.generation.text}"

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The generated text in parts, and whether each part was an accepted draft."""
        remaining = len(self.generation.text or "")  # without a stop string
        generation, tokenizer = self.generation, self.tokenizer
        reader = Detokenizer(tokenizer, tokenizer.encode_prompt(self.prompt), tokenizer.end_ids)
        for token, is_draft in zip(generation.token_ids, generation.accepted_mask, strict=True):
            text = reader.add(token)
            if text[:remaining]:
                yield text[:remaining], is_draft
            remaining = max(remaining - len(text), 0)

    def _repr_html_(self) -> str:
        spans = [_span(self.prompt, _PROMPT)]
        for is_draft, group in groupby(self.pieces(), key=lambda piece: piece[1]):
            text = "".join(piece for piece, _ in group)
            spans.append(_span(text, _DRAFT) if is_draft else html.escape(text))
        g = self.generation
        caption = f"{g.new_tokens} tokens, {g.tokens_per_second:.0f} per second"
        if any(g.accepted_mask):
            caption += f", {g.tokens_per_step:.2f} per pass; accepted drafts are underlined"
        return f'<pre style="{_STYLE}">{"".join(spans)}</pre><small>{caption}</small>'


def _span(text: str, style: str) -> str:
    return f'<span style="{style}">{html.escape(text)}</span>'
