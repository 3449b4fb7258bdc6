"""``data=self_generated``: a model's own continuations as the corpus for heads on its trunk.

Heads are to draft the trunk's own text. For an imported model, whose training text is often not
public, generating text is also the way to get a fitting corpus (self-distillation of Medusa-2, Cai
et al. 2024, arXiv 2401.10774, section 2.3.2).
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_modules import TokenDataModule
from data_modules.digests import digest
from data_modules.encoding import Encoded, encoded_piece
from data_modules.overlap import LineOverlap
from data_modules.prompts import take_prompts
from data_modules.sources.base import Source
from data_modules.store_builder import keep_store, progress, write_documents
from data_modules.token_store import FORMAT, TokenStore
from data_modules.tokenizers import Tokenizer
from mtp_lightning.command_line.check_config import check_settings
from mtp_lightning.decoding.generate import generate
from mtp_lightning.decoding.precision import use_activations
from mtp_lightning.decoding.sampling import Sampling
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.init import parameter_seed
from mtp_lightning.opening import OpenedModel, open_model
from mtp_lightning.run.atomic import write_bytes
from mtp_lightning.runtime import pick_accelerator


class SelfGenerated(TokenDataModule):
    """Windows of texts that a model has continued, in a token store that is built once.

    A text is a prompt and the model's continuation, as the generated ids. It is decoded without
    drafts, so that it depends on the trunk alone. Every prompt has its own random stream. A text
    ends after ``new_tokens`` at the latest, with an end-of-text token as any document.

    Args:
        prompts: the corpus of the prompts. A share of ``val_fraction`` of them comes from its
            validation documents, and makes the validation texts.
        tokenizer: the run's tokenizer, which must be the model's. One that is still to be trained
            is replaced with the model's.
        weights: the digest of the model's trunk, if it is known. The model is then not read if the
            cache has its texts. With None the model is read, and sets :attr:`weights`.
        options: all other arguments of :class:`TokenDataModule`.

    The comments of conf/data/self_generated.yaml explain the other settings.

    Raises:
        UserError: a number is out of range. At the first use: there is no model, it is a task's, it
            has another vocabulary or too short a context, or there are too few prompts.
    """

    def __init__(
        self,
        prompts: Source,
        tokenizer: Tokenizer,
        *,
        model: str | None,
        n_prompts: int = 2000,
        prompt_tokens: int = 32,
        new_tokens: int = 224,
        temperature: float = 1.0,
        top_p: float | None = None,
        sample_seed: int = 0,
        decode_batch_size: int = 32,
        accelerator: str = "auto",
        activations: str = "fp32",
        chat_share: float = 0.0,
        chat_before: str | None = None,
        chat_after: str | None = None,
        weights: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(prompts, tokenizer, **options)
        self.sampling = Sampling(temperature=temperature, top_p=top_p)
        self.model = model
        self.n_prompts = n_prompts
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.sample_seed = sample_seed
        self.decode_batch_size = decode_batch_size
        self.accelerator = accelerator
        self.activations = activations
        self.chat_share = chat_share
        self.chat = (chat_before or "", chat_after or "")
        self.weights = weights
        check_settings(self, "data")
        if chat_share and not chat_after:
            raise UserError(
                f"data.chat_share={chat_share} needs the model's chat format: give "
                "data.chat_before and data.chat_after, its texts before a question and between a "
                "question and the answer."
            )

    def resolved_settings(self) -> dict[str, Any]:
        """The settings found, including the model's digest: with it the model need not be read."""
        return super().resolved_settings() | {"weights": self.weights}

    @cached_property
    def opened(self) -> tuple[TokenStore, Tokenizer]:
        writer: OpenedModel | None = None
        if self.weights is None or self._tokenizer.needs_training:
            writer = self._read()
        vocabulary = digest(json.dumps(_vocabulary(self._tokenizer), sort_keys=True))
        key = digest("self_generated", FORMAT, self.weights, vocabulary, *self._settings().values())
        texts = self.cache_dir / "texts" / f"{key}.jsonl"  # only a build opens it
        store = keep_store(
            self.cache_dir,
            key,
            lambda folder: self._write(folder, writer or self._read(), KeptTexts(texts)),
        )
        with suppress(OSError):  # it is not there, or the cache is read-only
            texts.unlink()
        return store, self._tokenizer

    def _settings(self) -> dict[str, Any]:
        """The settings that the generated texts depend on."""
        chat = {"chat_share": self.chat_share, "chat": list(self.chat)} if self.chat_share else {}
        begin = self._begin(self._tokenizer)
        return {
            "prompts": self.split.source.fingerprint(),
            "val_fraction": self.split.val_fraction,
            "split_seed": self.split.seed,
            "n_prompts": self.n_prompts,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "temperature": float(self.sampling.temperature),
            "top_p": None if self.sampling.top_p in (None, 1) else self.sampling.top_p,
            "sample_seed": self.sample_seed,
            **chat,
            **({"begin": begin} if begin else {}),
            **({} if self.activations == "fp32" else {"activations": self.activations}),
        }

    def _read(self) -> OpenedModel:
        """Open the model, and check that its texts fit this run."""
        if self.model is None:
            raise UserError(
                "data=self_generated has no model to generate its texts: set init_from, or "
                "data.model."
            )
        device = pick_accelerator(self.accelerator)
        run = open_model(self.model, device=device, allow=self.allow)
        ours, theirs = self._tokenizer, run.tokenizer
        if theirs.kind == "symbols":
            raise UserError(
                f"data.model={self.model} was trained on a task, whose symbols are not text: give "
                "a model of text."
            )
        if ours.needs_training and _would_be(ours, theirs):
            ours = self._tokenizer = theirs
        if ours.needs_training or _vocabulary(ours) != _vocabulary(theirs):
            raise UserError(
                f"data.model={self.model} has another vocabulary (tokenizer {theirs.kind}, "
                f"{theirs.vocab_size} ids) than this run ({ours.kind}): use the model's tokenizer "
                "in this run."
            )
        begin, chat = len(self._begin(theirs)), sum(map(len, self._chat_ids(theirs)))
        # The model does not read the last token.
        total = self.prompt_tokens + max(begin, chat) + self.new_tokens - 1
        if total > run.seq_len:
            extra = f", the beginning of a text ({begin})" if begin else ""
            extra = f", the chat format ({chat})" if chat > begin else extra
            raise UserError(
                f"data.prompt_tokens={self.prompt_tokens}{extra} and "
                f"data.new_tokens={self.new_tokens} make {total} tokens to read, and "
                f"data.model={self.model} was trained on {run.seq_len}: lower one of them."
            )
        weights = trunk_digest(run.model)
        if self.weights not in (None, weights):
            raise UserError(
                f"data.model={self.model} has other weights now than when this run's texts were "
                "generated, and the cache does not have these texts: give the model as it was."
            )
        self.weights = weights
        use_activations(run.model, self.activations)
        return run

    def _write(self, folder: Path, writer: OpenedModel, kept: KeptTexts) -> dict[str, Any]:
        n_val = min(max(1, round(self.n_prompts * self.split.val_fraction)), self.n_prompts - 1)
        counts = {"train": self.n_prompts - n_val, "val": n_val}
        chats = {name: round(n * self.chat_share) for name, n in counts.items()}
        taken = take_prompts(
            self.split,
            writer.tokenizer,
            counts={name: n - chats[name] for name, n in counts.items()},
            length=self.prompt_tokens,
        )
        begin = self._begin(writer.tokenizer)
        prompts = [(name, [*begin, *prompt.tolist()]) for name, prompt in taken]
        of_chats = [name for name, n in chats.items() for _ in range(n)]
        prompts += zip(of_chats, self._questions(writer, len(of_chats), kept), strict=True)
        begun, seed = [ids for _, ids in prompts], self.sample_seed
        ends = self._continue(writer, begun, self.new_tokens, kept, part="texts", seed=seed)
        pairs = zip(prompts, ends, strict=True)
        texts = [(name, [*ids, *end]) for (name, ids), end in pairs]
        pieces = writer.tokenizer.token_bytes()
        # A trunk may have more rows than its tokenizer has ids.
        pieces += [b""] * (writer.model.config.trunk.vocab_size - len(pieces))
        overlap = LineOverlap()
        encoded: list[Encoded] = []
        for name, ids in texts:
            text = b"".join(pieces[i] for i in ids)
            overlap.add(name, text.decode("utf-8", "replace"))
            encoded.append(encoded_piece(name, np.asarray(ids, np.int64), text, True))
        meta = write_documents(
            folder, writer.tokenizer, self.split, encoded, overlap, vocab_size=len(pieces)
        )
        meta["bytes_defined"] = all(pieces[i] for _, ids in texts for i in ids)
        meta["source"] = {
            "name": "self_generated",
            "fingerprint": digest(self.weights, *self._settings().values()),
            "model": str(writer.path),
            "weights": self.weights,
            **self._settings(),
            "prompts": self.split.source.summary(),
        }
        return meta

    def _begin(self, tokenizer: Tokenizer) -> list[int]:
        """The ids before every text that is not a chat, whose format begins with its own."""
        return [] if tokenizer.needs_training else tokenizer.encode_prompt("").tolist()

    def _chat_ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """The ids before a question, and those between a question and the answer."""
        if not self.chat_share:
            return [], []
        before, after = (tokenizer.encode_specials(text).tolist() for text in self.chat)
        return before, after

    def _questions(self, writer: OpenedModel, n: int, kept: KeptTexts) -> list[list[int]]:
        """Generate ``n`` chats up to the answer. The model makes up each question by continuing the
        chat format's text before a question (Magpie, Xu et al. 2024, arXiv 2406.08464)."""
        before, after = self._chat_ids(writer.tokenizer)
        if not n:
            return []
        seed = parameter_seed(self.sample_seed, "chat")
        texts = self._continue(
            writer, [before] * n, self.prompt_tokens, kept, part="questions", seed=seed
        )
        questions = [_until(self.chat[1].strip(), ids, writer.tokenizer) for ids in texts]
        return [[*before, *question, *after] for question in questions]

    def _continue(
        self,
        writer: OpenedModel,
        prompts: list[list[int]],
        n: int,
        kept: KeptTexts,
        *,
        part: str,
        seed: int,
    ) -> list[list[int]]:
        """Continue each prompt by up to ``n`` tokens; the token that ends a text is left out. Texts
        of this part that a stopped process has finished are not generated again."""
        ends, done = writer.tokenizer.end_ids, kept.of(part)
        unfinished = [i for i in range(len(prompts)) if i not in done]
        resumed = f" ({len(done):,} were there)" if done else ""
        title = f"{part} of {writer.path}{resumed}"
        with progress(title, len(unfinished) * n, unit=" tokens") as bar:
            generate(
                writer.model,
                [prompts[i] for i in unfinished],
                indices=unfinished,
                max_new_tokens=n,
                speculative=False,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                seed=seed,
                tokenizer=writer.tokenizer,
                batch_size=self.decode_batch_size,
                on_tokens=lambda _, fresh: bar.update(len(fresh.token_ids)),
                on_end=lambda i, text: kept.add(part, i, text.token_ids),
            )
        texts = kept.of(part)
        return [[token for token in texts[i] if token not in ends] for i in range(len(prompts))]


def _until(mark: str, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids before the first ``mark``: where no token ends a question, the model continues with
    the format's text after it, and an answer."""
    position = tokenizer.decode(ids).find(mark) if mark else -1
    if position < 0:
        return ids
    return ids[: next(n for n in range(len(ids)) if len(tokenizer.decode(ids[: n + 1])) > position)]


class KeptTexts:
    """The finished texts of a corpus that is being generated, so that a stopped build continues: a
    file of the cache folder with one JSON line per text, named by everything that the texts depend
    on, and made with the first text."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._texts: dict[tuple[str, int], list[int]] = {}
        content, intact = file.read_bytes() if file.is_file() else b"", 0
        for line in content.splitlines(keepends=True):
            try:
                part, index, ids = json.loads(line[: line.index(b"\n")])
                self._texts[str(part), int(index)] = [int(i) for i in ids]
            except (ValueError, TypeError):  # the process was killed while it wrote the line
                break
            intact += len(line)
        if intact < len(content):
            write_bytes(content[:intact], file)

    def of(self, part: str) -> dict[int, list[int]]:
        """The ids of the finished texts of a part, by index."""
        return {index: ids for (name, index), ids in self._texts.items() if name == part}

    def add(self, part: str, index: int, ids: list[int]) -> None:
        """Append a finished text."""
        self._texts[part, index] = ids
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            file.write(json.dumps([part, index, ids]).encode() + b"\n")


def trunk_digest(model: MTPModel) -> str:
    """Hex digest of everything that decides a model's text without drafts: its trunk and head."""
    parts: list[object] = [json.dumps(model.config.trunk.to_dict(), sort_keys=True)]
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("mtp."):
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            content = hashlib.blake2b(raw.data, digest_size=16).hexdigest()
            parts += [name, tensor.dtype, list(tensor.shape), content]
    return digest(*parts)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts of a tokenizer's state that decide its ids; paths and accompanying files do not."""
    return {k: v for k, v in tokenizer.state().items() if k not in ("path", "beside")}


def _would_be(untrained: Tokenizer, trained: Tokenizer) -> bool:
    """Whether ``trained`` has the settings of ``untrained``, a tokenizer still to be trained."""
    state = trained.state()
    return all(state.get(key, value) == value for key, value in untrained.spec().items())
