"""Byte-level byte-pair encoding, trained on the corpus with the ``tokenizers`` library."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data_modules.tokenizers.base import END_OF_TEXT, Tokenizer
from data_modules.tokenizers.library import decode, library_tokenizer, quiet_forks
from data_modules.tokenizers.pre_tokenizer import PATTERN, PreTokenizer, new_pre_tokenizer
from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_whole
from mtp_lightning.stored import LARGEST_VOCAB

log = logging.getLogger(__name__)

CACHED_WORDS = 500_000


class BPETokenizer(Tokenizer):
    """Byte-level BPE: every text survives the round trip, and equal texts give equal merges.

    Id 0 is the end-of-text token, then come the 256 bytes, then merges in the order of training.
    The library encodes each distinct word of a corpus once, and numpy gathers the ids of a text:
    faster on two cores than the library's own threads, with the same ids (a test compares them).

    Args:
        vocab_size: number of ids to train to, end-of-text included; a small corpus may have fewer
            merges.
        train_bytes: most bytes to train on: the training documents in the corpus' order, the last
            one cut.
    """

    kind = "bpe"
    eot_id = 0

    def __init__(self, vocab_size: int = 4096, *, train_bytes: int = 20_000_000) -> None:
        key = "tokenizer.vocab_size (256 bytes, end of text, and merges)"
        require_whole(key, vocab_size, least=257, most=LARGEST_VOCAB)
        require_whole("tokenizer.train_bytes", train_bytes, least=1)
        self.requested_vocab_size = vocab_size
        self.train_bytes = train_bytes
        self._json: str | None = None
        self._one_at_a_time = threading.Lock()  # the threads of a server share a tokenizer
        self._forget()

    @property
    def needs_training(self) -> bool:
        return self._json is None

    def train(self, documents: Iterable[str]) -> BPETokenizer:
        """A trained copy; the same documents give the same merges."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        quiet_forks()
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.requested_vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(_first_bytes(documents, self.train_bytes), trainer)
        trained = self.from_state({**self._options(), "tokenizer_json": library.to_str()})
        if trained.vocab_size < self.requested_vocab_size:
            log.warning(
                "The training text has pairs for %d ids only, not for tokenizer.vocab_size=%d.",
                trained.vocab_size,
                self.requested_vocab_size,
            )
        return trained

    @cached_property
    def _library(self) -> Any:
        library = library_tokenizer(self.state()["tokenizer_json"], source="the bpe tokenizer")
        # The name of the special token in a text is text: the round trip must be lossless.
        library.encode_special_tokens = True
        return library

    @property
    def vocab_size(self) -> int:
        return int(self._library.get_vocab_size())

    def encode(self, text: str) -> np.ndarray:
        library = self._library
        with self._one_at_a_time:
            try:
                numbers, new = self._words.split(text)
                if new:
                    for encoding in library.encode_batch_fast(new, add_special_tokens=False):
                        self._ids.extend(encoding.ids)
                        self._starts.append(len(self._ids))
            except BaseException:
                self._forget()  # the new words have numbers but no ids
                raise
            ids = _gather(np.asarray(self._ids), np.asarray(self._starts), numbers)
            if len(self._words) > CACHED_WORDS:
                self._forget()
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return decode(self._library, ids)

    def spec(self) -> dict[str, Any]:
        if self._json is not None:
            return {"kind": self.kind, "content": self.fingerprint()}
        return {**self._options(), "pattern": PATTERN}

    def state(self) -> dict[str, Any]:
        if self._json is None:
            raise UserError("the bpe tokenizer is not trained yet: prepare the data first")
        return {**self._options(), "tokenizer_json": self._json}

    def _options(self) -> dict[str, Any]:
        sizes = {"vocab_size": self.requested_vocab_size, "train_bytes": self.train_bytes}
        return {"kind": self.kind, **sizes}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> BPETokenizer:
        tokenizer = cls(state["vocab_size"], train_bytes=state["train_bytes"])
        tokenizer._json = state["tokenizer_json"]
        return tokenizer

    def _forget(self) -> None:
        """Empties the word cache: word -> number, the ids of all words, concatenated, and where
        each word's begin."""
        self._words: PreTokenizer = new_pre_tokenizer()
        self._ids = array("q")
        self._starts = array("q", [0])


def _gather(ids: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Ids of a sequence of words; the ids of word w are ``ids[starts[w] : starts[w+1]]``."""
    first = starts[numbers]
    lengths = starts[numbers + 1] - first
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # Index of every output in `ids`: a running index, shifted where each word begins.
    return ids[np.arange(total) + np.repeat(first - (ends - lengths), lengths)]


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    for document in documents:
        data = document.encode("utf-8")
        if len(data) >= limit:
            yield data[:limit].decode("utf-8", "ignore")
            return
        limit -= len(data)
        yield document
