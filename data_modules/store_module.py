"""The base of every LightningDataModule that reads a token store."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_modules.cache import cache_folder
from data_modules.evaluation_text import COMPRESSED, EvaluationWindows, choose, compressors
from data_modules.token_store import TokenFile, TokenStore
from data_modules.tokenizers.base import Tokenizer
from data_modules.window_dataset import WindowDataset
from data_modules.window_module import WindowDataModule
from mtp_lightning.errors import UserError, counted
from mtp_lightning.settings import require_whole

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False, kw_only=True)
class StoreDataModule(WindowDataModule):
    """Windows of T + D + 1 tokens of a store, and an evaluation text of whole documents.

    Args:
        eval_bytes: UTF-8 bytes of the evaluation text
            (:func:`~data_modules.evaluation_text.choose`), or ``all``.
        train_windows: number of training windows, chosen over the whole text and the same for every
            seed, or ``all``.
        document_mask: whether batches carry document ids: targets in another document do not count,
            and attention is block-diagonal.
        cache_states: whether a frozen trunk's states of the training windows are kept on disk, for
            all epochs and runs; the owner of the model sets :attr:`states`.
        cache_dir: the cache folder; None for that of :func:`~data_modules.cache.cache_folder`.
    """

    eval_bytes: int | Literal["all"] = 300_000
    train_windows: int | Literal["all"] = "all"
    document_mask: bool = False
    cache_states: bool = False
    cache_dir: Path = None  # type: ignore[assignment]  # may be a string; None is replaced
    # The folder of the trunk's states; None if they are not kept.
    states: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("eval_bytes", "train_windows"):
            if (number := getattr(self, key)) != "all":
                require_whole(f"data.{key} (all for the whole split)", number, least=1)
        self.cache_dir = cache_folder(self.cache_dir)

    @cached_property
    @abstractmethod
    def opened(self) -> tuple[TokenStore, Tokenizer]:
        """The store, built or found at the first use, and the tokenizer of its ids, trained."""

    def prepare_data(self) -> None:
        """Lightning's hook, which one process per node calls: builds the store."""
        _ = self.opened

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook, which every process calls."""
        self.prepare(stage or "fit")

    @property
    def store(self) -> TokenStore:
        return self.opened[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.opened[1]

    @property
    def masks_targets(self) -> bool:
        return self.document_mask

    @property
    def fingerprint(self) -> str:
        """Hex digest of source, tokenizer and split options: equal digests mean equal tokens."""
        return str(self.store.meta["fingerprint"])

    @property
    def training_text(self) -> TokenFile:
        return self.store["train"]

    @property
    def training(self) -> WindowDataset:
        return WindowDataset(
            self.training_text,
            **self.sizes,
            document_mask=self.document_mask,
            states=self.states,
            limit=None if self.train_windows == "all" else self.train_windows,
        )

    @cached_property
    def evaluation(self) -> EvaluationWindows:
        text = choose(self.store["val"], None if self.eval_bytes == "all" else self.eval_bytes)
        return EvaluationWindows(
            text, **self.sizes, eot_id=self.tokenizer.eot_id, document_mask=self.document_mask
        )

    @cached_property
    def evaluated_bytes(self) -> list[int] | None:
        """UTF-8 bytes of the predicted part of each document of the evaluation text: all bytes, or
        with ``document_mask`` all except the first token's. None where an id of the store has no
        text."""
        if not self.store.meta.get("bytes_defined", True):
            return None
        self._warn_of_unknown_text()
        sizes = [int(n) for n in self.evaluation.text.bytes]
        if not self.document_mask:
            return sizes
        return [n - len(piece) for n, piece in zip(sizes, self._first_pieces, strict=True)]

    def _warn_of_unknown_text(self) -> None:
        if (unknown := self.tokenizer.unknown_id) is None:
            return
        text = self.evaluation.text
        if n := sum(int((ids == unknown).sum()) for ids in text.documents()):
            log.warning(
                "%.3g %% of the evaluated tokens are %s, which stands for any text that the "
                "tokenizer does not know: bits per byte are too low, and not comparable.",
                100 * n / text.n_tokens,
                self.tokenizer.decode([unknown]).strip(),
            )

    @cached_property
    def _first_pieces(self) -> list[bytes]:
        """The bytes of the token that begins each document of the evaluation text, without the
        space that SentencePiece's tokenizers add to a text and drop in decoding."""
        pieces = self.tokenizer.text_bytes()
        first = [int(ids[0]) for ids in self.evaluation.text.documents()]
        adds_space = {
            i: pieces[i].startswith(b" ") and self.tokenizer.decode([i])[:1] != " "
            for i in set(first)
        }
        return [pieces[i][adds_space[i] :] for i in first]

    def evaluation_summary(self) -> dict[str, Any]:
        """Facts about the evaluation text: its ``fingerprint``, its number of ``documents``, and
        ``tokens``, the number of depth-0 targets; where ids stand for text, also the targets'
        ``bytes``, and ``gzip_bits_per_byte`` and ``xz_bits_per_byte`` of the text."""
        n_bytes = self.evaluated_bytes
        text = self._evaluated_text() if n_bytes else b""
        return {
            "fingerprint": self.evaluation.text.fingerprint,
            "documents": len(self.evaluation.text.starts),
            **({} if n_bytes is None else {"bytes": sum(n_bytes)}),
            "tokens": self.evaluation.n_targets,
            **(compressors(text) if text else {}),
        }

    def _evaluated_text(self) -> bytes:
        """The evaluation text's documents in order, up to the bytes that are compressed."""
        data, pieces = bytearray(), self.tokenizer.text_bytes()
        documents = self.evaluation.text.documents()
        for first, ids in zip(self._first_pieces, documents, strict=True):
            data += first + b"".join(pieces[i] for i in ids[1:].tolist())
            if len(data) >= COMPRESSED:
                break
        return bytes(data)

    def summary(self) -> dict[str, Any]:
        """Plain facts about the data, for the run's summary and checkpoints;
        ``val.lines_in_training`` is :meth:`LineOverlap.share`."""
        meta = self.store.meta
        facts: dict[str, Any] = {
            "source": meta["source"],
            "tokenizer": meta["tokenizer"],
            "fingerprint": self.fingerprint,
            "versions": meta["versions"],
            "store": str(self.store.folder),
        }
        for split, file in self.store.splits.items():
            n_bytes = file.n_bytes
            facts[split] = {
                "tokens": file.n_tokens,
                "bytes": n_bytes,
                "documents": file.n_documents,
                "bytes_per_token": None if n_bytes is None else n_bytes / max(file.n_tokens, 1),
            }
        facts["train"]["windows"] = len(self.training)
        facts["val"]["lines_in_training"] = meta["lines_in_training"]
        return facts

    def held_out_prompts(self, n: int, length: int, *, fewer: bool = False) -> list[Tensor]:
        """Prompts ``[length]`` from validation documents, in the order of
        :func:`parts_in_rounds`: the beginnings of all documents first."""
        file = self.store["val"]
        tokens = file.tokens()
        # Without the end-of-text token that ends each document.
        edges = pairwise([*file.starts().tolist(), file.n_tokens])
        documents = [range(start, end - 1) for start, end in edges]
        prompts = [
            torch.from_numpy(tokens[part.start : part.stop].astype("int64"))
            for part in islice(parts_in_rounds(documents, length), n)
        ]
        if len(prompts) == n or (fewer and prompts):
            return prompts
        raise UserError(
            f"the validation documents hold only {counted(len(prompts), 'prompt')} of {length} "
            f"tokens, {1 if fewer else n} were asked for: ask for fewer or shorter ones, or hold "
            "out more of the text (data.val_fraction; of token files data.held_out)"
        )


def parts_in_rounds(documents: Sequence[Any], length: int) -> Iterator[Any]:
    """Yields the first ``length`` tokens of each document, in order, then the next ``length`` of
    each, and so on. A document is an array of tokens, or a range of their indices."""
    while documents := [document for document in documents if len(document) >= length]:
        yield from (document[:length] for document in documents)
        documents = [document[length:] for document in documents]
