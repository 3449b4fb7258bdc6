"""An existing tokenizer: a ``tokenizer.json``, a folder with one, or a hub name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_modules.digests import digest
from data_modules.tokenizers.base import Tokenizer
from data_modules.tokenizers.library import library_tokenizer, written
from mtp_lightning.errors import UserError

KNOWN_EOT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
)
"""Names of the end-of-text token in common tokenizers; the first that is found is taken."""

BESIDE = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""Files next to a ``tokenizer.json`` that other programs read; they are kept as text."""


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library.

    Whether a text survives the round trip depends on that tokenizer. Special tokens are never
    added, and their names in a text are text.

    Args:
        path: a ``tokenizer.json``, a folder that holds one, or a name on the Hugging Face hub.
        eot_token: the token that ends a document. Default: ``eos_token`` of the
            ``tokenizer_config.json`` next to it, else the first of :data:`KNOWN_EOT` among its
            special tokens.

    Attributes:
        beside: the files of :data:`BESIDE` next to it, by name.

    Raises:
        FileNotFoundError: at the first use, if there is no such file, folder or hub name.
        UserError: at the first use, if the file is not a tokenizer or has no such end-of-text
            token.
    """

    kind: ClassVar[str] = "pretrained"

    def __init__(self, path: str, *, eot_token: str | None = None) -> None:
        self.path = str(path)
        self.eot_token = eot_token
        self.beside: dict[str, str] = {}

    @cached_property
    def _library(self) -> Any:
        library, self.beside = _read(self.path)
        named = _named(self.beside, "eos_token")
        return self._adopted(library, self.eot_token or named)

    def _adopted(self, library: Any, eot_token: str | None) -> Any:
        """The library's tokenizer, after its end-of-text token was found."""
        specials = {t.content for t in library.get_added_tokens_decoder().values() if t.special}
        if eot_token is None:
            eot_token = next((name for name in KNOWN_EOT if name in specials), None)
        if eot_token is None:
            raise UserError(
                f"the tokenizer {self.path} has no end-of-text token among its special tokens "
                f"({', '.join(sorted(specials)) or 'it has none'}): name one with "
                f"tokenizer.eot_token"
            )
        if library.token_to_id(eot_token) is None:
            raise UserError(
                f"the tokenizer {self.path} has no token {eot_token!r}: "
                f"set tokenizer.eot_token to one of its tokens"
            )
        library.encode_special_tokens = True
        self.eot_token = eot_token
        return library

    def files_beside(self) -> dict[str, str]:
        """The files :attr:`beside`, which name this tokenizer's end of text."""
        assert self.eot_token is not None
        if _named(self.beside, "eos_token") in (None, self.eot_token):
            return self.beside
        found = dict(self.beside)
        for name, text in found.items():
            if name.endswith(".json") and "eos_token" in (content := json.loads(text)):
                found[name] = json.dumps({**content, "eos_token": self.eot_token}, indent=2)
        return found

    @cached_property
    def vocab_size(self) -> int:
        # Ids may have gaps; the embedding must hold the largest.
        return int(max(self._library.get_vocab(with_added_tokens=True).values())) + 1

    @cached_property
    def eot_id(self) -> int:
        return int(self._library.token_to_id(self.eot_token))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._library.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encoded]

    def encode_specials(self, text: str) -> np.ndarray:
        library = self._library
        library.encode_special_tokens = False
        try:
            return np.asarray(library.encode(text, add_special_tokens=False).ids, np.int64)
        finally:
            library.encode_special_tokens = True

    def special_ids(self) -> dict[str, int]:
        library, found = self._library, {}
        for role in ("bos", "pad"):
            name = _named(self.beside, f"{role}_token")
            if name is not None and (number := library.token_to_id(name)) is not None:
                found[f"{role}_token_id"] = int(number)
        return found

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        return str(self._library.decode(array.tolist(), skip_special_tokens=False))

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "content": self.fingerprint()}

    def fingerprint(self) -> str:
        return digest(json.dumps(self._ids_state(), sort_keys=True))

    def state(self) -> dict[str, Any]:
        state = self._ids_state()  # which reads the other files, too
        return state | ({"beside": self.beside} if self.beside else {})

    def _ids_state(self) -> dict[str, Any]:
        """The part of the state that determines the ids."""
        text = written(self._library)
        return {
            "kind": self.kind,
            "path": self.path,
            "eot_token": self.eot_token,
            "tokenizer_json": text,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PretrainedTokenizer:
        tokenizer = cls(state["path"], eot_token=state["eot_token"])
        library = library_tokenizer(state["tokenizer_json"], source="the stored tokenizer")
        tokenizer._library = tokenizer._adopted(library, state["eot_token"])
        found = state.get("beside", {})
        tokenizer.beside = {name: found[name] for name in BESIDE if name in found}
        return tokenizer


def _read(given: str) -> tuple[Any, dict[str, str]]:
    """The library's tokenizer, and the files of :data:`BESIDE`."""
    from tokenizers import Tokenizer as Library

    path = Path(given).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"the folder {given} holds no tokenizer.json: point tokenizer.path to one "
                f"(a slow-only tokenizer must be converted first)"
            )
    if path.is_file():
        files = [file for name in BESIDE if (file := path.with_name(name)).is_file()]
        library = library_tokenizer(_text(path), source=path)
        return library, {file.name: _text(file) for file in files}
    if path.suffix == ".json" or given.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{given} does not exist: check tokenizer.path")
    try:
        return library_tokenizer(Library.from_pretrained(given).to_str(), source=given), {}
    except Exception as error:
        raise FileNotFoundError(
            f"{given!r} is neither a file nor a folder, and the Hugging Face hub did not give a "
            f"tokenizer of that name ({' '.join(str(error).split())[:200]}): check tokenizer.path"
        ) from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read as text: {error}.") from None


def _named(beside: dict[str, str], role: str) -> str | None:
    """The special token of a role, such as ``eos_token``, that a tokenizer_config.json names."""
    try:
        named = json.loads(beside.get("tokenizer_config.json", "{}")).get(role)
        named = named["content"] if isinstance(named, dict) else named
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"the tokenizer's tokenizer_config.json is damaged: {error}.") from error
    return named if isinstance(named, str) else None
