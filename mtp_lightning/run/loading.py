"""Loading what a run left: model and tokenizer, from its folder or from one of its checkpoints."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.run import checkpoints
from mtp_lightning.run.layout import BEST, CHECKPOINTS, LAST
from mtp_lightning.settings import require_whole

if TYPE_CHECKING:
    from data_modules.tokenizers import Tokenizer

log = logging.getLogger(__name__)

# More depths than any window has tokens are nobody's.
_FREE_DEPTHS = 4096


class Stored(ABC):
    """A weight that is still on the disk."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Its shape here."""

    @abstractmethod
    def copy_to(self, target: torch.Tensor) -> None:
        """Write it into memory of its shape and of any dtype."""

    def numel(self) -> int:
        """How many numbers it is."""
        return self.shape.numel()

    def tensor(self) -> torch.Tensor:
        """In memory of its own, float32."""
        found = torch.empty(self.shape)
        self.copy_to(found)
        return found


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model and what is needed to use it.

    Attributes:
        model: in evaluation mode.
        tokenizer_state: the tokenizer as plain data; :attr:`tokenizer` revives it.
        config: the composed config that the run was started with, plain containers.
        step: optimizer steps trained.
        path: the checkpoint's file.
        threads: of the CPU that it was trained with; None if unknown.
    """

    model: MTPModel
    tokenizer_state: dict[str, Any]
    config: dict[str, Any]
    step: int
    path: Path
    threads: int | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own tokenizer.

        Raises:
            UserError: it is damaged, or has more ids than the model.
        """
        from data_modules.tokenizers import tokenizer_from_state

        tokenizer, rows = tokenizer_from_state(self.tokenizer_state), self.model.config.trunk
        if tokenizer.vocab_size > rows.vocab_size:
            raise UserError(
                f"{self.path} is damaged or forged: its tokenizer has {tokenizer.vocab_size:,} "
                f"ids, and its model {rows.vocab_size:,}."
            )
        return tokenizer

    @property
    def seq_len(self) -> int:
        """T, the context that the model was trained on."""
        length = self.config["data"]["seq_len"]
        return require_whole(f"data.seq_len of {self.path}", length, least=1)


def pretrained_state(folder: str | Path) -> dict[str, Any]:
    """The state of the tokenizer whose tokenizer.json lies in a folder.

    Raises:
        UserError: it cannot be read, or has no end-of-text token.
    """
    from data_modules.tokenizers import PretrainedTokenizer

    return PretrainedTokenizer(str(folder)).state()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a file, a run folder (its best one) or a checkpoints folder.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint in it.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint or run folder at {path}.")
    for folder in (path / CHECKPOINTS, path):
        best = folder / BEST
        if best.is_file() and checkpoints.intact(best):
            return best
        newest = checkpoints.newest_intact(folder) if folder.is_dir() else None
        if newest is not None:
            return newest
    raise FileNotFoundError(
        f"{path} holds no intact checkpoint: give a run folder (with checkpoints/) or a .ckpt file."
    )


def read_checkpoint(path: str | Path, *, needs: Collection[str]) -> tuple[Path, dict[str, Any]]:
    """The file that :func:`find_checkpoint` finds, and what is in it.

    Args:
        path: a run folder or a checkpoint file.
        needs: keys that must be in it.

    Raises:
        FileNotFoundError: no checkpoint there.
        UserError: it is damaged, or was not written by this platform.
    """
    file = find_checkpoint(path)
    checkpoint = checkpoints.load(file, optimizer=False)
    missing = set(needs) - checkpoint.keys()
    if missing:
        raise UserError(
            f"{file} is not a checkpoint of this platform: it has no {', '.join(sorted(missing))}."
        )
    return file, checkpoint


def model_config(
    checkpoint: dict[str, Any], *, source: Path, allow: Collection[str] = ()
) -> ModelConfig:
    """The model that a checkpoint describes.

    Args:
        checkpoint: its content.
        source: its file, for messages.
        allow: packages whose variants it may ask for.

    Raises:
        UserError: a description that no model has, or that needs a package that is not allowed.
    """
    try:
        return ModelConfig.from_dict(checkpoint["model_config"], allow=allow)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source} describes no model: {error}") from error


def load_run(
    path: str | Path, *, device: torch.device | str = "cpu", allow: Collection[str] = ()
) -> LoadedRun:
    """Build the model of a run and load its weights.

    Args:
        path: a run folder or a checkpoint file.
        device: where the model goes.
        allow: packages whose variants the checkpoint may ask for.

    Raises:
        FileNotFoundError: no checkpoint there.
        UserError: it is damaged, or was not written by this platform, or does not fit its config,
            or needs a package that is not allowed.
    """
    needs = ("model_config", "state_dict", "tokenizer", "config")
    file, checkpoint = read_checkpoint(path, needs=needs)
    config = model_config(checkpoint, source=file, allow=allow)
    weights = model_weights(checkpoint)
    require_held(config, weights, source=str(file))
    model = MTPModel(config)
    if any(tensor.dtype == torch.float64 for tensor in weights.values()):
        model.double()
    load_weights(model, weights, source=str(file))
    return LoadedRun(
        model=model.to(device).eval(),
        tokenizer_state=checkpoint["tokenizer"],
        config=checkpoint["config"],
        step=checkpoint["global_step"],
        path=file,
        threads=checkpoint.get("threads"),
    )


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's part of a checkpoint's tensors, by the model's own names."""
    prefix = "model."
    state = checkpoint["state_dict"]
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


def require_held(
    config: ModelConfig, weights: Mapping[str, torch.Tensor | Stored], *, source: str
) -> None:
    """Refuse a config that asks for more than the file's tensors hold, before anything is built:
    a few bytes of it could take all memory, or hours.

    Raises:
        UserError: with what is asked for and what is there.
    """
    for what, asked in (("layers", config.trunk.n_layers), ("MTP depths", config.mtp.depth)):
        # Each has a tensor of its own, but for depths that share one or have none.
        if asked > max(len(weights), _FREE_DEPTHS):
            raise UserError(
                f"{source} is damaged or forged: its config asks for {asked:,} {what}, and it "
                f"holds {len(weights):,} tensors."
            )
    held = sum(tensor.numel() for tensor in weights.values())
    if config.num_params() > held:
        raise UserError(
            f"{source} is damaged or forged: its config asks for {config.num_params():,} weights, "
            f"and it holds {held:,}."
        )


@torch.no_grad()
def load_weights(
    model: MTPModel, weights: Mapping[str, torch.Tensor | Stored], *, source: str
) -> None:
    """Load all weights or none, one at a time.

    Args:
        model: of the same names and shapes.
        weights: by the model's names; where the model holds bf16, they are rounded, which is said.
        source: for messages.

    Raises:
        UserError: names or shapes differ, or numbers are not finite; the message names them.
    """
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} has the shape {list(weights[name].shape)} where {list(own[name].shape)} is needed"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + ("; ..." if len(problems) > 8 else "")
        raise UserError(f"The weights in {source} do not fit the model: {shown}.")
    tied = {"head.weight"} if model.config.trunk.tie_embeddings else set()
    rounded, broken = 0, []
    for name in [name for name in own if name not in tied]:
        found, target = weights[name], own[name]
        if isinstance(found, Stored) and target.dtype != torch.bfloat16:
            found.copy_to(target)
        else:
            numbers = found.tensor() if isinstance(found, Stored) else found
            target.copy_(numbers)
            rounded += target.dtype == torch.bfloat16 and not torch.equal(target.float(), numbers)
        if not _is_finite(target):
            broken.append(name)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"{source} holds NaN or infinity in {broken[0]}{more}: such a model says nothing; take "
            "an earlier checkpoint, or the file from where it came."
        )
    if rounded:
        log.warning(
            "%d matrices of %s are rounded to bf16: the model is what the rounded numbers say.",
            rounded,
            source,
        )


def _is_finite(x: torch.Tensor) -> bool:
    """Whether all are finite: seen in their sum, in a fraction of the time of copying them, unless
    the sum itself overflows."""
    return not x.is_floating_point() or bool(x.sum().isfinite()) or bool(x.isfinite().all())


def describe_interrupt(folder: Path) -> str:
    """What Ctrl-C left, and how to go on from there."""
    last = folder / CHECKPOINTS / LAST
    if not last.is_file():
        return "interrupted before the first checkpoint: nothing was saved."
    step = checkpoints.stored_step(last)
    return f"interrupted; saved is step {step}: the same command with run_dir={folder} continues."
