"""What can be asked of decoding: the one table of options, from YAML to engine.

:class:`TextOptions` belong to one text and may differ between texts that are decoded together;
:class:`DecodingOptions` add those that all texts of an engine share. A value is checked here, when
the object is made, and so is what goes together; whether a model can do it is for
:meth:`DecodingOptions.max_draft` to say. An option more is a field here, a key in conf/ and the
code that does it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
from torch import Tensor

from mtp_lightning.decoding.sampling import Sampling
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.settings import (
    is_whole,
    require_bool,
    require_choice,
    require_number,
    require_whole,
)

Prompt = Sequence[int] | np.ndarray | Tensor

# Texts that are decoded together where nobody says how many.
_TOGETHER = 8
# How drafts are made, if they are.
_DRAFTING = ("draft_depth", "draft_vocab", "min_confidence", "cache", "tree")
# An option, and those that may not be set beside it.
_NOT_TOGETHER = {
    "draft_vocab": ("speculative", "compile"),
    "tree": ("speculative", "draft_depth", "min_confidence", "cache", "compile"),
    "min_confidence": ("speculative",),
    "cache": ("speculative", "compile"),
}


@dataclass(frozen=True, kw_only=True)
class TextOptions(Sampling):
    """How one text is made; how its tokens are chosen is :class:`Sampling`'s.

    Attributes:
        max_new_tokens: where it ends at the latest.
        seed: of its random numbers.
        stop: strings that end it; they are not part of it. They need a tokenizer.
        eot_id: the end-of-text id that ends it; None is the tokenizer's, -1 none.
        logprobs: None for no log-probabilities; else also return each token's, by the trunk before
            temperature, ``top_k`` and ``top_p``, with so many alternatives.

    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = 200
    seed: int = 0
    stop: tuple[str, ...] = ()
    eot_id: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_whole("max_new_tokens", least=1)
        self._settle_whole("seed")
        self._settle_whole("logprobs", least=0)
        self._settle("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for string in self.stop:
            if not isinstance(string, str) or not string:
                raise UserError(f"stop={string!r} must be a string of at least one character.")

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen, by itself."""
        return Sampling(**_values(self, Sampling))

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _settle_whole(self, name: str, *, least: int | None = None) -> None:
        """Check a whole number, and make one of numpy Python's own; None is left alone."""
        value = getattr(self, name)
        if value is not None:
            value = operator.index(value) if is_whole(value) else value
            self._settle(name, require_whole(name, value, least=least))


@dataclass(frozen=True, kw_only=True)
class Request(TextOptions):
    """One text that is asked for.

    Attributes:
        prompt: token ids, at least one; kept as a list.
        index: which prompt of its seed it is: each has a stream of random numbers of its own.
        draft_depth: the most drafts that it accepts in a round; 0 is plain decoding, None is as
            many as the engine drafts.
    """

    prompt: Prompt
    index: int = 0
    draft_depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_whole("draft_depth", least=0)
        ids = self.prompt
        self._settle("prompt", ids.tolist() if isinstance(ids, np.ndarray | Tensor) else list(ids))


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(TextOptions):
    """How texts are made together, and how they are drafted.

    Attributes:
        batch_size: texts decoded together; None is 8, and 1 with ``compile``. The place of one that
            has ended is taken by the next.
        max_context: most tokens that the model may read at once: the ``seq_len`` that it was
            trained on. None is no limit.
        long: what happens beyond it: ``"refuse"`` raises, ``"slide"`` goes on from the last half of
            the context, read anew.
        speculative: draft with the MTP modules; False is plain decoding.
        draft_depth: tokens to draft in a round; None is the model's depth. A single module can
            draft more. ``"auto"`` measures what pays, down to plain decoding; with a temperature
            its samples then depend on timing, their distribution does not.
        draft_vocab: choose drafts from so many tokens, those of the first ids, and read no more of
            the head for them (``short_head.py``); None is all.
        min_confidence: stop drafting where the model believes that the drafts so far are accepted
            with less than this probability; 0 never does. For models trained with
            ``objective.confidence=true``.
        cache: of a single sequential module that drafts several tokens: ``"per_depth"`` keeps one
            for each draft, at the positions of training, ``"single"`` one for all
            (``single_cache.py``).
        tree: draft several candidates a depth: ``[3, 2, 1]`` is three for the next token, two after
            each of them, one after each of these, all judged in one pass; None drafts a chain.
        compile: run compiled passes (``compiled.py``): several times as fast once they are built,
            which takes about ten seconds a program. One text at a time; greedy texts can part from
            plain decoding where two tokens' logits agree to about 1e-5.

    Raises:
        UserError: a value out of range, or two that do not go together.
    """

    batch_size: int | None = None
    max_context: int | None = None
    long: Literal["refuse", "slide"] = "refuse"
    speculative: bool = True
    draft_depth: int | Literal["auto"] | None = None
    draft_vocab: int | None = None
    min_confidence: float = 0.0
    cache: Literal["per_depth", "single"] = "per_depth"
    tree: Tree | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_whole("batch_size", least=1)
        self._settle_whole("max_context", least=1)
        require_choice("long", self.long, ("refuse", "slide"))
        require_bool("speculative", self.speculative)
        depth = self.draft_depth
        if not (depth is None or depth == "auto" or (is_whole(depth) and depth >= 1)):
            raise UserError(
                f"draft_depth={depth} must be a whole number of at least 1, or 'auto'; "
                "speculative=false is plain decoding."
            )
        require_number("min_confidence", self.min_confidence, least=0, most=1)
        require_choice("cache", self.cache, ("per_depth", "single"))
        if self.tree is not None and not isinstance(self.tree, Tree):
            self._settle("tree", Tree(tuple(self.tree)))
        least = 1 if self.tree is None else max(self.tree.widths)
        self._settle_whole("draft_vocab", least=least)
        require_bool("compile", self.compile)
        if self.compile and self.places != 1:
            raise UserError(
                f"compile=true decodes one prompt at a time: set batch_size=1, not {self.places}."
            )
        for option, others in _NOT_TOGETHER.items():
            asked = self._asked(option)
            for other in filter(None, map(self._asked, others)) if asked else ():
                raise _not_together(str(asked), other)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], **known: Any) -> Self:
        """The options that a config sets.

        Args:
            cfg: a composed config, or a node of it: its keys that are options here.
            known: options that come from elsewhere.

        Raises:
            UserError: as the class.
        """
        given = {name: cfg[name] for name in (field.name for field in fields(cls)) if name in cfg}
        if not isinstance(stop := given.get("stop", ()), str):
            given["stop"] = tuple(map(str, stop))  # YAML reads digits as a number
        return cls(**given | known)

    def request(self, prompt: Prompt, index: int = 0) -> Request:
        """A text by these options."""
        return Request(prompt=prompt, index=index, **_values(self, TextOptions))

    @property
    def places(self) -> int:
        """Most texts at a time."""
        if self.batch_size is None:
            return 1 if self.compile else _TOGETHER
        return self.batch_size

    @property
    def auto(self) -> bool:
        """Whether the number of drafts is measured."""
        return self.speculative and self.draft_depth == "auto"

    @property
    def drafts_as_trained(self) -> bool:
        """Whether drafts are made as teacher forcing sees them: no option of theirs is set."""
        return not any(map(self._asked, _DRAFTING))

    def plain(self) -> Self:
        """The same without drafts."""
        known = {field.name: field.default for field in fields(self)}
        defaults: dict[str, Any] = {name: known[name] for name in _DRAFTING}
        return replace(self, speculative=False, **defaults)

    def _asked(self, name: str) -> str | None:
        """``name=value`` as one types it; None where it has its default."""
        value = getattr(self, name)
        if value == self.__dataclass_fields__[name].default:
            return None
        if isinstance(value, Tree):
            value = list(value.widths)
        return f"{name}={str(value).lower() if isinstance(value, bool) else value}"

    def max_draft(self, model: MTPModel) -> int:
        """The most tokens that a round drafts one after the other.

        Raises:
            UserError: the model cannot draft as it is asked to.
        """
        drafted = self._depth(model)
        if self.draft_vocab is not None:
            self._check_vocabulary(self.draft_vocab, model)
        if self.min_confidence and model.mtp.confidence is None:
            raise UserError(
                f"min_confidence={self.min_confidence} needs a model that says how sure it is of "
                "its drafts: train one with objective.confidence=true, or leave it 0."
            )
        if self.cache == "single" and not model.mtp.is_recursive:
            raise UserError(
                f"cache={self.cache} is for a single module that reads its own output: decode a "
                "model of mtp=sequential with mtp.depth=1 or mtp.share_layers=true, or leave it "
                "per_depth."
            )
        return drafted

    def _depth(self, model: MTPModel) -> int:
        most, depth = model.mtp.max_draft_depth, self.draft_depth
        if self.tree is not None:
            model.mtp.require_drafts()
            if most is not None and self.tree.depth > most:
                raise UserError(
                    f"{self._asked('tree')} drafts {self.tree.depth} tokens deep, but the model "
                    f"drafts {most}: give at most {most} numbers."
                )
            vocab = model.config.trunk.vocab_size
            if max(self.tree.widths) > vocab:
                raise UserError(
                    f"{self._asked('tree')} has more candidates than the model has tokens, {vocab}."
                )
            return self.tree.depth
        if not self.speculative:
            return 0
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

    def _check_vocabulary(self, tokens: int, model: MTPModel) -> None:
        model.mtp.require_drafts()
        vocab, rank = model.config.trunk.vocab_size, model.config.mtp.rank
        if tokens > vocab:
            raise UserError(
                f"draft_vocab={tokens}, but the model has {vocab} tokens: use at most {vocab}."
            )
        if rank > 1:
            raise _not_together(f"draft_vocab={tokens}", f"mtp.rank={rank}")


def _values(options: Any, kind: type) -> dict[str, Any]:
    """The fields of a class that options of a class below it have."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}


def _not_together(asked: str, other: str) -> UserError:
    return UserError(f"{asked} does not go together with {other}: leave one of them out.")
