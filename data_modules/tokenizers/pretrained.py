"""An existing tokenizer: a ``tokenizer.json``, a folder with one, or a hub name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.digests import digest
from data_modules.tokenizers.base import Tokenizer
from data_modules.tokenizers.library import decode, library_tokenizer, written
from mtp_lightning.errors import UserError
from mtp_lightning.settings import is_whole
from mtp_lightning.stored import kept_json, special_token

log = logging.getLogger(__name__)

KNOWN_EOT = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]",
)  # fmt: skip
"""Names of the end-of-text token in common tokenizers; the first that is found is taken."""

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
_EOT = f"tokenizer.eot_token, or as eos_token in a {CONFIG} next to its tokenizer.json"
BESIDE = (CONFIG, "chat_template.jinja", "special_tokens_map.json", GENERATION)
"""Files next to a ``tokenizer.json`` that other programs read; they are kept as text."""


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, which may change a text in the round trip.

    Args:
        path: a ``tokenizer.json``, a folder that holds one, or a name on the Hugging Face hub.
        eot_token: the token that ends a document. Default: ``eos_token`` of the
            ``tokenizer_config.json`` next to it, else the first of :data:`KNOWN_EOT` among its
            special tokens.

    Raises:
        FileNotFoundError: at the first use, if there is no such file, folder or hub name.
        UserError: at the first use, if it is not a tokenizer or has no such end-of-text token.
    """

    kind = "pretrained"

    def __init__(self, path: str, *, eot_token: str | None = None) -> None:
        self.path = str(path)
        self.eot_token = eot_token
        self.beside: dict[str, str] = {}  # the files of ``BESIDE`` next to it, by name

    @cached_property
    def _library(self) -> Any:
        library, self.beside = _read(self.path)
        return self._adopted(library, self.eot_token or special_token(self.beside, "eos_token"))

    def _adopted(self, library: Any, eot_token: str | None) -> Any:
        """The library's tokenizer, after its end-of-text token was found."""
        specials = {t.content for t in library.get_added_tokens_decoder().values() if t.special}
        if eot_token is None:
            eot_token = next((name for name in KNOWN_EOT if name in specials), None)
        if eot_token is None:
            raise UserError(
                f"The tokenizer {self.path} has no end-of-text token among its special tokens "
                f"({', '.join(sorted(specials)) or 'it has none'}): name one as {_EOT}."
            )
        if library.token_to_id(eot_token) is None:
            raise UserError(
                f"The tokenizer {self.path} has no token {eot_token!r}: name one of its tokens as "
                f"{_EOT}."
            )
        library.encode_special_tokens = True
        self.eot_token = eot_token
        return library

    def generation_config(self) -> dict[str, Any]:
        own = super().generation_config()
        return {**own, **kept_json(self.beside, GENERATION), "eos_token_id": own["eos_token_id"]}

    def files_beside(self) -> dict[str, str]:
        """The files :attr:`beside`, which name this tokenizer's end of text."""
        assert self.eot_token is not None
        if special_token(self.beside, "eos_token") == self.eot_token:
            return self.beside
        files = dict(self.beside)
        for name in files:
            content = kept_json(files, name) if name.endswith(".json") else {}
            if "eos_token" in content or name == CONFIG:
                files[name] = json.dumps({**content, "eos_token": self.eot_token}, indent=2)
        return files

    @cached_property
    def vocab_size(self) -> int:
        # Ids may have gaps; the embedding must hold the largest.
        return int(max(self._library.get_vocab(with_added_tokens=True).values())) + 1

    @cached_property
    def eot_id(self) -> int:
        return int(self._library.token_to_id(self.eot_token))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        first, ends = self.eot_id, kept_json(self.beside, GENERATION).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        known = [end for end in ends if is_whole(end) and end in range(self.vocab_size)]
        if unknown := [end for end in ends if end is not None and end not in known]:
            log.warning("eos_token_id of %s: %s is not in the tokenizer", GENERATION, unknown)
        return tuple(dict.fromkeys([first, *known]))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._library.encode(text, add_special_tokens=False).ids, np.int64)

    @cached_property
    def unknown_id(self) -> int | None:
        model = json.loads(self.library_json())["model"]
        name = model.get("unk_token")
        number = model.get("unk_id") if name is None else self._library.token_to_id(name)
        return None if number == self.eot_id else number  # CLIP's has no token of its own

    @cached_property
    def before_piece(self) -> str:
        lines, line, rest = (self.encode(text).tolist() for text in ("a\na", "a\n", "a"))
        return "" if lines == line + rest else "a\n"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encoded]

    def encode_specials(self, text: str) -> np.ndarray:
        self._library.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._library.encode_special_tokens = True

    def encode_prompt(self, text: str) -> np.ndarray:
        ids, begin = self.encode_specials(text), self._beginning
        has_begin = len(begin) and ids[: len(begin)].tolist() == begin.tolist()
        return ids if has_begin else np.concatenate([begin, ids])

    @cached_property
    def _beginning(self) -> np.ndarray:
        """The ids before every text: those of the ``tokenizer.json``, unless ``add_bos_token`` in
        the ``tokenizer_config.json`` decides, as in transformers."""
        begin, adds = self.special_ids().get("bos_token_id"), self._adds_begin()
        if adds is not None and (begin is not None or not adds):
            return np.asarray([begin] if adds else [], np.int64)
        whole, text = (self._library.encode("a", add_special_tokens=s).ids for s in (True, False))
        return np.asarray(whole[: whole.index(text[0])] if text else [], np.int64)

    def _adds_begin(self) -> bool | None:
        add_bos = kept_json(self.beside, CONFIG).get("add_bos_token")
        return add_bos if isinstance(add_bos, bool) else None

    def without_beginning(self) -> PretrainedTokenizer:
        if not len(self._beginning):
            return self
        state = self.state()
        content = json.loads(state["tokenizer_json"]) | {"post_processor": None}
        beside = dict(state.get("beside", {}))
        if self._adds_begin() is not None:
            config = {**kept_json(beside, CONFIG), "add_bos_token": False}
            beside[CONFIG] = json.dumps(config, indent=2)
        text = json.dumps(content, ensure_ascii=False)
        return self.from_state({**state, "tokenizer_json": text, "beside": beside})

    def special_ids(self) -> dict[str, int]:
        library, ids = self._library, {}
        for role in ("bos", "pad"):
            name = special_token(self.beside, f"{role}_token")
            if name is not None and (number := library.token_to_id(name)) is not None:
                ids[f"{role}_token_id"] = int(number)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return decode(self._library, ids)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "content": self.fingerprint()}

    def fingerprint(self) -> str:
        return digest(json.dumps(self._ids_state(), sort_keys=True))

    def state(self) -> dict[str, Any]:
        state = self._ids_state()  # which reads the other files, too
        return state | ({"beside": self.beside} if self.beside else {})

    def _ids_state(self) -> dict[str, Any]:
        """The part of the state that determines the ids."""
        text = written(self._library)  # first, since reading the file sets eot_token
        state = {"kind": self.kind, "path": self.path, "eot_token": self.eot_token}
        return {**state, "tokenizer_json": text}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PretrainedTokenizer:
        tokenizer = cls(state["path"], eot_token=state["eot_token"])
        library = library_tokenizer(state["tokenizer_json"], source="the stored tokenizer")
        tokenizer._library = tokenizer._adopted(library, state["eot_token"])
        tokenizer.beside = {k: str(v) for k, v in state.get("beside", {}).items() if k in BESIDE}
        special_token(tokenizer.beside, "eos_token")  # refuses a damaged tokenizer_config.json
        return tokenizer


def _read(location: str) -> tuple[Any, dict[str, str]]:
    """The library's tokenizer, and the files of :data:`BESIDE`."""
    from tokenizers import Tokenizer as Library

    path = Path(os.path.expanduser(location))
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"the folder {location} holds no tokenizer.json: point tokenizer.path to one "
                f"(a slow-only tokenizer must be converted first)"
            )
    if path.suffix in (".gguf", ".model"):
        raise UserError(
            f"{path} is not a tokenizer.json: export.py writes one from a GGUF file, and "
            "save_pretrained of transformers' AutoTokenizer from a folder with a .model."
        )
    if path.is_file():
        files = [file for name in BESIDE if (file := path.with_name(name)).is_file()]
        library = library_tokenizer(_text(path), source=path)
        return library, {file.name: _text(file) for file in files}
    if path.suffix == ".json" or location.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{location} does not exist: check tokenizer.path")
    try:
        return library_tokenizer(Library.from_pretrained(location).to_str(), source=location), {}
    except Exception as error:
        raise FileNotFoundError(
            f"{location!r} is neither a file nor a folder, and the Hugging Face hub did not give a "
            f"tokenizer of that name ({' '.join(str(error).split())[:200]}): check tokenizer.path"
        ) from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read as text: {error}.") from None
