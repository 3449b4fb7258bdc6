"""The interface of tokenizers, and how one is stored with a run and read back."""

from __future__ import annotations

import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_modules.digests import digest
from data_modules.tokenizers.library import bytes_of_pieces
from mtp_lightning.errors import UserError
from mtp_lightning.stored import read_json

STATE_FILE = "tokenizer_state.json"
# The class of every kind that a stored tokenizer may be of, imported when it is needed.
KINDS = {
    "bpe": "data_modules.tokenizers.bpe:BPETokenizer",
    "byte": "data_modules.tokenizers.byte:ByteTokenizer",
    "ids": "data_modules.tokenizers.ids:IdTokenizer",
    "pretrained": "data_modules.tokenizers.pretrained:PretrainedTokenizer",
    "symbols": "data_modules.tokenizers.symbols:SymbolTokenizer",
}
END_OF_TEXT = "<|endoftext|>"
"""What :meth:`Tokenizer.decode` writes for the end-of-text token of the byte and bpe tokenizers."""


class Tokenizer(ABC):
    """Text to token ids and back. ``encode`` never adds special tokens, and reads the name of one
    as ordinary text; the token store appends ``eot_id`` to every document itself."""

    kind: ClassVar[str]
    eot_token: str | None = END_OF_TEXT
    """Name of the end-of-text token."""
    reads_text: ClassVar[bool] = True
    """Whether every text has ids, and not only the tokenizer's own symbols."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, the end-of-text token included."""

    @property
    @abstractmethod
    def eot_id(self) -> int:
        """Id of the end-of-text token that ends every document."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text: :attr:`eot_id`, and those of a chat model that end a
        turn."""
        return (self.eot_id,)

    @property
    def unknown_id(self) -> int | None:
        """Id of all text that the tokenizer does not know, if there is such text."""
        return None

    @property
    def before_piece(self) -> str:
        """What is encoded before a later piece of a text and left out again: a line, if the
        tokenizer puts a space before every text."""
        return ""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """``[n]`` int64 ids of one text, without the end-of-text token."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids (a sequence, array or tensor of ints); bytes that are not UTF-8 become
        U+FFFD, and a special token its name."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that :func:`tokenizer_from_state` needs, as plain JSON containers."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tokenizer:
        """The tokenizer with this state; by default made of its values."""
        return cls(**{key: value for key, value in state.items() if key != "kind"})

    def spec(self) -> dict[str, Any]:
        """The values that determine the ids of a given corpus: before training the options, after
        training the content."""
        return self.state()

    def token_bytes(self) -> list[bytes]:
        """The bytes of the text that each id stands for, by id: the name of a special token, none
        for an unused id. They may be part of a character."""
        return bytes_of_pieces(self.library_json(), self.vocab_size)

    def text_bytes(self) -> list[bytes]:
        """:meth:`token_bytes`, with no bytes for the end-of-text token."""
        token_bytes = self.token_bytes()
        token_bytes[self.eot_id] = b""
        return token_bytes

    def facts(self) -> dict[str, Any]:
        """Plain facts, for a store's ``meta.json``."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint(),
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
        }

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of every text, in one call of the library where that is faster."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of a text that a model continues, as other programs read a prompt: after the
        beginning-of-text tokens, if there are any, and with names of special tokens read as
        these."""
        return self.encode(text)

    def without_beginning(self) -> Tokenizer:
        """The tokenizer of a model that was trained on text without these tokens."""
        return self

    def encode_specials(self, text: str) -> np.ndarray:
        """``encode`` of a text in which names of special tokens stand for those tokens, as in a
        chat template; refused by a tokenizer without such tokens."""
        raise UserError(
            f"the {self.kind} tokenizer has no special tokens to write a chat with: only a model "
            "with a tokenizer of its own (tokenizer=pretrained) can be asked."
        )

    def special_ids(self) -> dict[str, int]:
        """Ids of the beginning-of-text and padding tokens, if it has them, by their names in a
        config.json."""
        return {}

    def generation_config(self) -> dict[str, Any]:
        """The content of a generation_config.json: the ids that end a text, and for a model that
        came with such a file how it is sampled."""
        ends = list(self.end_ids)
        end = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
        return {"do_sample": False, **self.special_ids(), **end}

    @property
    def needs_training(self) -> bool:
        """Whether :meth:`train` has to be called before it has ids."""
        return False

    def train(self, documents: Iterable[str]) -> Tokenizer:
        """A trained copy, for tokenizers with :attr:`needs_training`."""
        raise TypeError(f"the {self.kind} tokenizer is not trained")

    def fingerprint(self) -> str:
        """Hex digest of the state: equal digests mean equal ids for every text."""
        return digest(json.dumps(self.state(), sort_keys=True))

    def library_json(self) -> str:
        """The same tokenizer as a ``tokenizer.json`` of the tokenizers library."""
        return str(self.state()["tokenizer_json"])

    def save(self, folder: str | Path) -> None:
        """Writes the state into a folder, and for other programs a ``tokenizer.json`` if there is
        one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state()
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        if "tokenizer_json" in state:
            (folder / "tokenizer.json").write_text(state["tokenizer_json"], encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads a tokenizer of any kind that :meth:`save` wrote."""
        return tokenizer_from_state(read_json(Path(folder) / STATE_FILE))


def class_of(kind: str) -> type[Tokenizer] | None:
    """This project's class for a kind, imported; None for an unknown kind."""
    return pkgutil.resolve_name(KINDS[kind]) if kind in KINDS else None


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer with this state (see :meth:`Tokenizer.state`).

    Raises:
        UserError: for a state of unknown kind or a damaged one.
    """
    kind = state.get("kind") if isinstance(state, dict) else None
    tokenizer_class = class_of(kind) if isinstance(kind, str) else None
    if tokenizer_class is None:
        raise UserError(f"unknown tokenizer kind {kind!r}: known are {sorted(KINDS)}")
    try:
        return tokenizer_class.from_state(state)
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"the stored tokenizer of the kind {kind} is damaged ({type(error).__name__}: {error})"
        ) from error
