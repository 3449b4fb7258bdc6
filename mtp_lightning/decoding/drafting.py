"""How the rounds of decoding draft: what was asked for, and whether a model can do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mtp_lightning.decoding.tree import Tree
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.settings import is_whole, require_choice, require_number, require_whole

Cache = Literal["per_depth", "single"]


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Settings of all rows of an engine; see :func:`~mtp_lightning.decoding.generate`.

    Attributes:
        speculative: draft with the MTP modules; False is plain decoding.
        draft_depth: tokens to draft in a round; None is the model's depth, ``"auto"`` what pays.
        min_confidence: stop drafting where the model believes less than this in what it drafted.
        cache: of a single sequential module, one a depth or one for all.
        compile: run compiled passes, of one row at a time.
        tree: candidates of every token that is drafted, one number a depth; None drafts a chain.
        draft_vocab: how many tokens drafts are chosen from, those of the first ids; None is all.

    Raises:
        UserError: a value out of range.
    """

    speculative: bool = True
    draft_depth: int | Literal["auto"] | None = None
    min_confidence: float = 0.0
    cache: Cache = "per_depth"
    compile: bool = False
    tree: Tree | None = None
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        require_number("min_confidence", self.min_confidence, least=0, most=1)
        require_choice("cache", self.cache, ("per_depth", "single"))
        depth = self.draft_depth
        if depth is None or depth == "auto" or (is_whole(depth) and depth >= 1):
            return
        raise UserError(
            f"draft_depth={depth} must be a whole number of at least 1, or 'auto'; "
            "speculative=false is plain decoding."
        )

    @property
    def auto(self) -> bool:
        """Whether the number of drafts is measured."""
        return self.speculative and self.draft_depth == "auto"

    def max_draft(self, model: MTPModel) -> int:
        """The most tokens that a round drafts.

        Raises:
            UserError: the model cannot draft as it is asked to.
        """
        if self.draft_vocab is not None:
            self._check_vocabulary(self.draft_vocab, model)
        if self.tree is not None:
            return self._tree_depth(self.tree, model)
        drafted = self._max_draft(model) if self.speculative else 0
        if self.min_confidence:
            self._check_confidence(model, drafted)
        if self.cache == "single":
            self._check_single_cache(model, drafted)
        return drafted

    def _check_vocabulary(self, tokens: int, model: MTPModel) -> None:
        model.mtp.require_drafts()
        least = 1 if self.tree is None else max(self.tree.widths)
        require_whole("draft_vocab", tokens, least=least)
        vocab = model.config.trunk.vocab_size
        if tokens > vocab:
            raise UserError(
                f"draft_vocab={tokens}, but the model has {vocab} tokens: use at most {vocab}."
            )
        others = {
            "speculative=false": not self.speculative,
            "compile=true": self.compile,
            f"mtp.rank={model.config.mtp.rank}": model.config.mtp.rank > 1,
        }
        _refuse_together(f"draft_vocab={tokens}", others)

    def _tree_depth(self, tree: Tree, model: MTPModel) -> int:
        others = {
            "speculative=false": not self.speculative,
            f"draft_depth={self.draft_depth}": self.draft_depth is not None,
            f"min_confidence={self.min_confidence}": self.min_confidence > 0,
            "cache=single": self.cache == "single",
            "compile=true": self.compile,
        }
        _refuse_together(f"tree={list(tree.widths)}", others)
        if max(tree.widths) > model.config.trunk.vocab_size:
            raise UserError(
                f"tree={list(tree.widths)} has more candidates than the model has tokens, "
                f"{model.config.trunk.vocab_size}."
            )
        model.mtp.require_drafts()
        most = model.mtp.max_draft_depth
        if most is not None and tree.depth > most:
            raise UserError(
                f"tree={list(tree.widths)} drafts {tree.depth} tokens deep, but the model drafts "
                f"{most}: give at most {most} numbers."
            )
        return tree.depth

    def _max_draft(self, model: MTPModel) -> int:
        most, depth = model.mtp.max_draft_depth, self.draft_depth
        if depth is None or depth == "auto":
            if most is not None:
                return most
            # A single module has no end; twice the trained depth is where auto stops looking.
            return model.depth if depth is None else 2 * model.depth
        model.mtp.require_drafts()
        if most is not None and depth > most:
            raise UserError(
                f"draft_depth={depth}, but the model drafts {most} tokens: use at most {most}."
            )
        return depth

    def _check_confidence(self, model: MTPModel, drafted: int) -> None:
        asked = f"min_confidence={self.min_confidence}"
        if model.mtp.confidence is None:
            raise UserError(
                f"{asked} needs a model that says how sure it is of its drafts: train one with "
                "objective.confidence=true, or leave it 0."
            )
        _refuse_together(asked, {"speculative=false": not drafted})

    def _check_single_cache(self, model: MTPModel, drafted: int) -> None:
        if not model.mtp.is_recursive:
            raise UserError(
                f"cache={self.cache} is for a single module that reads its own output: decode a "
                "model of mtp=sequential with mtp.depth=1 or mtp.share_layers=true, or leave it "
                "per_depth."
            )
        others = {"speculative=false": not drafted, "compile=true": self.compile}
        _refuse_together(f"cache={self.cache}", others)


def _refuse_together(asked: str, others: Mapping[str, bool]) -> None:
    """Refuse ``asked`` beside the first of the others that is set."""
    for other, is_set in others.items():
        if is_set:
            raise UserError(f"{asked} does not go together with {other}: leave one of them out.")
