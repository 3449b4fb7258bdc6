"""Prompts for a model to continue: the beginnings and further parts of a corpus' documents."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_modules.encoding import Piece, piece_ids, pieces
from data_modules.splitting import SPLITS, DocumentSplit
from data_modules.store_module import parts_in_rounds
from data_modules.tokenizers.base import Tokenizer
from mtp_lightning.errors import UserError


def take_prompts(
    split: DocumentSplit, tokenizer: Tokenizer, *, counts: Mapping[str, int], length: int
) -> list[tuple[str, np.ndarray]]:
    """Takes ``counts`` prompts of each split's documents, all different, across the splits too.

    Returns:
        (split, ids ``[length]`` int64), those of ``train`` first, in the order of
        :func:`~data_modules.store_module.parts_in_rounds`.

    Raises:
        UserError: if the documents hold fewer prompts, or a text is not Unicode.
    """
    taken: dict[str, dict[bytes, np.ndarray]] = {name: {} for name in SPLITS}
    rest: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}

    def take(name: str, prompt: np.ndarray) -> None:
        """Takes a prompt if it is new."""
        if not any(prompt.tobytes() in prompts for prompts in taken.values()):
            taken[name][prompt.tobytes()] = prompt

    for name, document in split:
        if all(len(taken[name]) == counts[name] for name in SPLITS):
            break
        if len(taken[name]) < counts[name]:
            ids = _beginning(document, tokenizer, counts[name] * length)
            if len(ids) >= length:
                take(name, ids[:length])
                rest[name].append(ids[length:])
    for name in SPLITS:
        for prompt in parts_in_rounds(rest[name], length):
            if len(taken[name]) == counts[name]:
                break
            take(name, prompt)
        if len(taken[name]) < counts[name]:
            split_name = {"train": "training", "val": "validation"}[name]
            raise UserError(
                f"the {split_name} documents of {split.source.name} hold only {len(taken[name])} "
                f"different prompts of {length} tokens, and {counts[name]} are needed: lower "
                "data.n_prompts or data.prompt_tokens, or take prompts from more text."
            )
    split.source.require_unchanged()
    return [(name, prompt) for name in SPLITS for prompt in taken[name].values()]


def _beginning(document: str, tokenizer: Tokenizer, n_tokens: int) -> np.ndarray:
    """At least ``n_tokens`` tokens of a document, if it has that many."""
    parts: list[np.ndarray] = []
    for text, last in pieces(document):
        piece = Piece("train", text, first=not parts, last=last)
        parts += [ids.astype(np.int64) for ids in piece_ids([piece], tokenizer)]
        if sum(map(len, parts)) >= n_tokens:
            break
    return np.concatenate(parts)
