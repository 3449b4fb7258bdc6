"""Prompts for a model to continue: beginnings and further parts of a corpus' documents."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_modules.encoding import pieces, require_unicode
from data_modules.splitting import SPLITS, DocumentSplit
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError


def take_prompts(
    split: DocumentSplit, tokenizer: Tokenizer, *, counts: Mapping[str, int], length: int
) -> list[tuple[str, np.ndarray]]:
    """So many prompts of each split, no two the same, on whatever side.

    The first ``length`` tokens of each document in turn; where those are too few, then the
    ``length`` tokens after them, and so on. None crosses a document's end.

    Args:
        split: the corpus; a prompt is on the side of its document.
        tokenizer: a trained one.
        counts: prompts by split.
        length: tokens each.

    Returns:
        (split, ids ``[length]`` int64), those of ``train`` first.

    Raises:
        UserError: the documents hold fewer, or a text that is no Unicode.
    """
    taken: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    left: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    seen: set[bytes] = set()

    def take(name: str, ids: np.ndarray) -> None:
        """Of a document's tokens the next prompt, if it is a new one; the others are kept."""
        prompt = ids[:length]
        if len(taken[name]) < counts[name] and prompt.tobytes() not in seen:
            seen.add(prompt.tobytes())
            taken[name].append(prompt)
        if len(ids) >= 2 * length:
            left[name].append(ids[length:])

    for number, (name, document) in enumerate(split):
        if all(len(taken[name]) == counts[name] for name in SPLITS):
            break
        if len(taken[name]) < counts[name]:
            require_unicode(document, number, split.source)
            ids = _beginning(document, tokenizer, counts[name] * length)
            if len(ids) >= length:
                take(name, ids)
    for name in SPLITS:
        while left[name] and len(taken[name]) < counts[name]:
            now, left[name] = left[name], []
            for ids in now:
                take(name, ids)
        if len(taken[name]) < counts[name]:
            what = {"train": "training", "val": "validation"}[name]
            raise UserError(
                f"the {what} documents of {split.source.name} hold only {len(taken[name])} "
                f"different prompts of {length} tokens, and {counts[name]} are needed: lower "
                "data.n_prompts or data.prompt_tokens, or take prompts from more text."
            )
    return [(name, prompt) for name in SPLITS for prompt in taken[name]]


def _beginning(document: str, tokenizer: Tokenizer, n_tokens: int) -> np.ndarray:
    """At least so many tokens of a document, where it has them."""
    found: list[np.ndarray] = []
    for piece, _ in pieces(document):
        found.append(tokenizer.encode(piece).astype(np.int64))
        if sum(map(len, found)) >= n_tokens:
            break
    return np.concatenate(found)
