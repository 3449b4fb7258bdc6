"""Opens the model at a path: a run, a checkpoint, a Hugging Face folder or a GGUF file.

    opened = open_model("runs/mine")
    opened.model, opened.tokenizer, opened.seq_len

``run/loading.py`` reads this project's runs. An optional part reads every other kind of path
(``parts.py``), and is imported when such a path is opened. A reader returns the model's config and
its weights (``weights.py``), from which :func:`open_model` builds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtp_lightning import parts
from mtp_lightning.command_line.conf_comments import value_at
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.run import loading
from mtp_lightning.settings import require_whole
from mtp_lightning.weights import StoredModel, WeightPacker

if TYPE_CHECKING:
    from data_modules.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A trained model in evaluation mode; the other attributes are its :class:`StoredModel`'s."""

    model: MTPModel
    tokenizer_state: dict[str, Any]
    run_config: dict[str, Any]
    step: int
    path: Path
    brings_trunk: bool = False
    threads: int | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer. Documents of a training from scratch have no beginning-of-text
        token, so the tokenizer of such a model puts none before a prompt.

        Raises:
            UserError: it is damaged, or has more ids than the model.
        """
        from data_modules.tokenizers import tokenizer_from_state

        tokenizer, trunk = tokenizer_from_state(self.tokenizer_state), self.model.config.trunk
        if tokenizer.vocab_size > trunk.vocab_size:
            raise UserError(
                f"the tokenizer of {self.path} has {tokenizer.vocab_size:,} ids, and the model "
                f"{trunk.vocab_size:,}: in a folder, take the tokens with the ids beyond out of "
                "tokenizer.json."
            )
        return tokenizer if self.brings_trunk else tokenizer.without_beginning()

    @property
    def seq_len(self) -> int:
        """T, the context in tokens that the model was trained on."""
        length = self.run_config["data"]["seq_len"]
        return require_whole(f"data.seq_len of {self.path}", length, least=1)


def draft_vocab_of(run_config: dict[str, Any]) -> int | None:
    """The number of first token ids that a model's modules were trained to draft; None for all."""
    return value_at(run_config, "objective.draft_vocab")


def open_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    allow: Collection[str] = (),
    packer_for: Callable[[MTPModel, Path], WeightPacker | None] | None = None,
) -> OpenedModel:
    """Build a trained model.

    Args:
        path: a run folder (its best checkpoint), a .ckpt file, a folder in Hugging Face's layout,
            or a GGUF file.
        allow: packages whose variants the model may use.
        packer_for: ``packer_for`` of ``decoding/fused.py`` for a model that only decodes.

    Raises:
        FileNotFoundError: the path does not exist.
        UserError: the model is damaged, does not fit its config, needs a package that is not
            allowed, or has no tokenizer; or the part that reads it is missing.
    """
    stored = read_model(path, allow=allow)
    if stored.tokenizer_state is None:
        raise UserError(f"{path} holds no tokenizer.json: put the model's own one there.")
    model_packer = None if packer_for is None else lambda model: packer_for(model, stored.path)
    return OpenedModel(
        model=stored.build(model_packer).to(device),
        tokenizer_state=stored.tokenizer_state,
        run_config=stored.run_config,
        step=stored.step,
        path=stored.path,
        brings_trunk=stored.brings_trunk,
        threads=stored.threads,
    )


def read_model(path: str | Path, *, allow: Collection[str] = ()) -> StoredModel:
    """Read a model without building it; arguments and errors as for :func:`open_model`, except that
    an imported model may have no tokenizer."""
    return (parts.reader(Path(path)) or loading.read)(Path(path), allow=allow)


def pretrained_state(folder: str | Path) -> dict[str, Any]:
    """The state of the tokenizer in a folder with a tokenizer.json. One that cannot be read, or has
    no end-of-text token, raises a :class:`UserError`."""
    from data_modules.tokenizers import PretrainedTokenizer

    return PretrainedTokenizer(str(folder)).state()
