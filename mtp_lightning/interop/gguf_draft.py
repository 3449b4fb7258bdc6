"""Drafters as GGUF files of their own, with which llama.cpp drafts for the trunk's file
(``draft-NAME``): EAGLE-3's layer (``gguf_eagle3.py``) and DFlash's (``gguf_dflash.py``).

The architecture of the file has the drafter's name, and its tokenizer is the trunk's.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.interop import eagle3, gguf_tokenizer, gguf_writing, llama_cpp
from mtp_lightning.interop.gguf_fields import trunk_fields
from mtp_lightning.interop.gguf_layout import GGUFEntry
from mtp_lightning.interop.gguf_reader import read_header
from mtp_lightning.interop.gguf_writing import Written
from mtp_lightning.model import ModelConfig, MTPModel


class Drafter(ABC):
    """One kind of file; its ``name`` is that of the layout, too."""

    name: ClassVar[str]
    variant: ClassVar[str]  # of the stacks that it holds
    extra_tokens: ClassVar[int] = 0  # after those of the trunk

    def obstacle(self, config: ModelConfig) -> str:
        """The setting of a stack of the variant that the file cannot state; empty if it can."""
        return eagle3.obstacle(config)

    @abstractmethod
    def fields(self, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values of ``NAME.KEY`` by ``KEY`` besides the trunk's, and values of other keys;
        ``block_count`` is one of the first."""

    @abstractmethod
    def entries(self, model: MTPModel) -> Iterator[tuple[GGUFEntry, Tensor]]:
        """The entries of the file, with their values."""

    @abstractmethod
    def drafts(self, config: ModelConfig) -> int:
        """How many drafts a round has in the check."""

    def require_fits(self, config: ModelConfig) -> None:
        """Raise a ``UserError`` for a model whose heads llama.cpp does not compute from the
        file."""
        if config.mtp.variant != self.variant or not config.mtp.depth:
            raise UserError(
                f"layout={self.name} is for a model of mtp={self.variant}, not "
                f"mtp={config.mtp.variant}."
            )
        setting = self.obstacle(config)
        if not setting and config.trunk.rope_scaling is not None:
            setting = "model.rope_scaling"
        if setting:
            raise UserError(f"llama.cpp's {self.name} has nothing like {setting}: export a folder.")

    def write_file(
        self,
        file: Path,
        model: MTPModel,
        tokenizer: Any,
        *,
        dtype: str,
        max_positions: int,
        name: str = "model",
    ) -> Written:
        """Write the drafter of a model with the trunk's tokenizer; arguments and errors as of
        ``gguf_writing.write_file``."""
        self.require_fits(model.config)
        trunk = model.config.trunk
        own, others = self.fields(model.config)
        layers = own["block_count"]
        fields = trunk_fields(trunk, n_layers=layers, max_positions=max_positions) | own
        n_tokens = trunk.vocab_size + self.extra_tokens
        words, differences = gguf_tokenizer.to_fields(tokenizer, n_tokens)
        others = {"general.name": name, **words, **others}
        count = gguf_writing.write_entries(
            file, self.name, fields, others, self.entries(model), dtype=dtype
        )
        note = (
            "llama.cpp drafts with this file next to the trunk's (`llama-server --model TRUNK.gguf "
            f"--model-draft DRAFT.gguf --spec-type draft-{self.name}`); `mtp-lightning export "
            "output=TRUNK.gguf` writes that."
        )
        return Written(arch=self.name, modules=0, parameters=count, notes=[note, *differences])

    def check_file(self, file: Path, model: MTPModel, tokenizer: Any, dtype: str) -> Iterator[str]:
        """Check a file; arguments, results and errors as of ``gguf_writing.check_file``."""
        count = gguf_writing.check_entries(file, self.entries(model), dtype)
        yield f"{count} tensors, read back, are the drafter's"
        if not llama_cpp.is_there():
            yield llama_cpp.ABSENT
            return
        with tempfile.TemporaryDirectory() as folder:
            trunk = Path(folder) / "trunk.gguf"
            context = int(read_header(file).fields[f"{self.name}.context_length"])
            gguf_writing.write_file(trunk, model, tokenizer, dtype="float32", max_positions=context)
            drafter = llama_cpp.DraftFile(file, self.name, dtype, self.drafts(model.config))
            yield from llama_cpp.check(
                trunk, model, tokenizer, dtype="float32", context=context, drafter=drafter
            )
