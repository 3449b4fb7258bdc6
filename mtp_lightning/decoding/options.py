"""The options of decoding, the same objects from YAML to engine.

:class:`TextOptions` belong to one text and may differ between texts that are decoded together;
:class:`DecodingOptions` add those that all texts of an engine share. An object checks its values
and their combination; :meth:`DecodingOptions.max_draft` checks whether a model supports them. A new
option needs a field here, a key in conf/ and the code that uses it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from torch import Tensor

from mtp_lightning.decoding.sampling import Sampling
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.decoding.verification import RULES
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH
from mtp_lightning.settings import (
    is_whole,
    require_bool,
    require_choice,
    require_number,
    require_whole,
)

if TYPE_CHECKING:
    from mtp_lightning.decoding.adaptive import Measured

Prompt = Sequence[int] | np.ndarray | Tensor

# Texts decoded together if batch_size is None.
_TOGETHER = 8
MOST_DRAFTS = MAX_VERIFY_WIDTH - 1
"""Most drafts of a round: a pass over them and the pending token has the bits of single passes."""
# Every option of how drafts are made and judged, and the options that it excludes.
_DRAFTING = {
    "draft_depth": ("speculative",),
    "draft_vocab": ("speculative", "compile"),
    "tree": ("speculative", "draft_depth", "min_confidence", "cache", "compile"),
    "min_confidence": ("speculative",),
    "cache": ("speculative", "compile"),
    "verify": ("tree",),
    "lookup": ("tree", "compile"),
}


@dataclass(frozen=True, kw_only=True)
class TextOptions(Sampling):
    """Options of one text, in addition to how its tokens are chosen (:class:`Sampling`).

    Attributes:
        max_new_tokens: the most tokens to generate.
        seed: seed of its random numbers.
        stop: strings that end the text and are not part of it; they need a tokenizer.
        eot_id: the id that ends the text; None for those of the tokenizer, -1 for none.
        logprobs: None for no log-probabilities; else also return each token's log-probability by
            the trunk before temperature, ``top_k`` and ``top_p``, and those of the ``logprobs``
            most likely tokens.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 200
    seed: int = 0
    stop: tuple[str, ...] = ()
    eot_id: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_new_tokens", 1), ("seed", None), ("logprobs", 0), ("eot_id", -1)):
            self._set_whole(name, least=least)
        if not isinstance(self.stop, Sequence):
            raise UserError(f"stop={self.stop!r} must be a string or a list of strings.")
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for string in self.stop:
            if not isinstance(string, str) or not string:
                raise UserError(f"stop={string!r} must be a string of at least one character.")

    @property
    def sampling(self) -> Sampling:
        """The options of how its tokens are chosen, alone."""
        return Sampling(**_values(self, Sampling))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_whole(self, name: str, *, least: int | None = None, most: int | None = None) -> None:
        """Check that a field is a whole number, or None if that is its default, and turn NumPy's
        integers into ``int``."""
        value = getattr(self, name)
        if value is not None or getattr(type(self), name) is not None:
            value = operator.index(value) if is_whole(value) else value
            self._set(name, require_whole(name, value, least=least, most=most))


@dataclass(frozen=True, kw_only=True)
class Request(TextOptions):
    """A request for one text.

    Attributes:
        prompt: token ids, at least one; kept as a list.
        index: number of the prompt among those with the same seed; each has its own stream of
            random numbers.
        draft_depth: drafts that the modules make in its rounds, at most the engine's; 0 is plain
            decoding, None is as many as the engine drafts.
    """

    prompt: Prompt
    index: int = 0
    draft_depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_whole("index")
        self._set_whole("draft_depth", least=0)
        ids = self.prompt
        ids = ids.tolist() if isinstance(ids, np.ndarray | Tensor) else ids
        if not isinstance(ids, Iterable):
            raise UserError(f"The prompt {ids} is not a list of token ids: give a list of prompts.")
        self._set("prompt", list(ids))


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(TextOptions):
    """Options of texts that are decoded together, and of how drafts are made.

    Attributes:
        batch_size: texts decoded together; None is 8, and 1 with ``compile``. When a text ends, the
            next one takes its slot.
        max_context: the most tokens that the model may read at once, the ``seq_len`` that it was
            trained on; None for no limit.
        long: what happens to longer texts: ``"refuse"`` raises; ``"slide"`` reads the last half of
            the context again and continues from there.
        speculative: draft with the MTP modules; False is plain decoding.
        draft_depth: tokens to draft per round, up to 15; None is the model's depth. A model with a
            single module can draft more. ``"auto"`` measures the number that pays, down to plain
            decoding.
        measured: what ``"auto"`` knows of this machine. Samples then keep one number of drafts;
            without it they depend on timing, though their distribution does not.
        draft_vocab: choose drafts among the first ``draft_vocab`` token ids, and read only their
            rows of the head; None is all.
        min_confidence: stop drafting once the estimated probability that all drafts so far are
            accepted is below this; 0 never does. The estimate is that of a model trained with
            ``objective.confidence=true``, else the product of the likeliest drafts' probabilities.
        cache: for a single sequential module that drafts several tokens: ``"per_depth"`` keeps one
            cache per draft, at the positions of training; ``"single"`` keeps one for all
            drafts.
        tree: draft several candidates per depth: ``[3, 2, 1]`` drafts three for the next token, two
            after each of them and one after each of these, and verifies all in one pass; None
            drafts a chain.
        verify: which sampled drafts of a chain are kept: a rule of ``verification.py``.
        lookup: the most drafts of a round that are looked up in the text itself (``lookup.py``),
            with or without ``speculative``; up to 15, 0 for none. They replace the modules' drafts
            of a row whose last tokens have stood in its text before. On a CPU a greedy text has
            them while it is decoded alone, a sample if the engine has one slot.
        compile: run compiled passes (``compiled.py``): several times as fast once built, which
            takes about ten seconds per program. One text at a time; greedy texts can differ from
            plain decoding where two tokens' logits agree to about 1e-5.

    Raises:
        UserError: a value is out of range, or two options exclude each other.
    """

    batch_size: int | None = None
    max_context: int | None = None
    long: Literal["refuse", "slide"] = "refuse"
    speculative: bool = True
    draft_depth: int | Literal["auto"] | None = None
    measured: Measured | None = None
    draft_vocab: int | None = None
    min_confidence: float = 0.0
    cache: Literal["per_depth", "single"] = "per_depth"
    tree: Tree | None = None
    verify: str = "token"
    lookup: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_whole("batch_size", least=1)
        self._set_whole("max_context", least=1)
        require_choice("long", self.long, ("refuse", "slide"))
        require_bool("speculative", self.speculative)
        depth = self.draft_depth
        if not (depth in (None, "auto") or (is_whole(depth) and 1 <= depth <= MOST_DRAFTS)):
            raise UserError(
                f"draft_depth={depth} must be a whole number from 1 to {MOST_DRAFTS}, or 'auto'; "
                "speculative=false is plain decoding."
            )
        require_number("min_confidence", self.min_confidence, least=0, most=1)
        require_choice("cache", self.cache, ("per_depth", "single"))
        require_choice("verify", self.verify, list(RULES))
        self._set_whole("lookup", least=0, most=MOST_DRAFTS)
        if self.tree is not None and not isinstance(self.tree, Tree):
            self._set("tree", Tree(self.tree))
        least = 1 if self.tree is None else max(self.tree.widths)
        self._set_whole("draft_vocab", least=least)
        require_bool("compile", self.compile)
        if self.compile and self.slots != 1:
            raise UserError(
                f"compile=true decodes one prompt at a time: set batch_size=1, not {self.slots}."
            )
        for option, others in _DRAFTING.items():
            for other in others:
                if (setting := self._setting(option)) and (excluded := self._setting(other)):
                    raise not_together(setting, excluded)
        if (verify := self._setting("verify")) and not (self.speculative or self.lookup):
            raise not_together(verify, "speculative=false")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], **overrides: Any) -> Self:
        """The options that a config or a node of it sets, except for ``overrides``; other keys are
        ignored.

        Raises:
            UserError: see the class.
        """
        values = {field.name: cfg[field.name] for field in fields(cls) if field.name in cfg}
        if not isinstance(stop := values.get("stop", ()), str) and isinstance(stop, Iterable):
            values["stop"] = tuple(map(str, stop))  # YAML reads digits as a number
        return cls(**values | overrides)

    def request(self, prompt: Prompt, index: int = 0) -> Request:
        """A request for one text with these options."""
        return Request(prompt=prompt, index=index, **_values(self, TextOptions))

    @property
    def slots(self) -> int:
        """The most texts that are decoded at a time."""
        return self.batch_size or (1 if self.compile else _TOGETHER)

    @property
    def drafts_as_trained(self) -> bool:
        """Whether no option of drafting is set: drafts are then made as in training, and teacher
        forcing predicts their acceptance."""
        return not any(map(self._setting, _DRAFTING))

    def plain(self, *, but_lookups: bool = False) -> Self:
        """The same options without drafts, or with none but those that are looked up."""
        kept = ("lookup", "verify") if but_lookups and self.lookup else ()
        defaults = {name: getattr(DecodingOptions, name) for name in _DRAFTING if name not in kept}
        return replace(self, speculative=False, **defaults)

    def _setting(self, name: str) -> str | None:
        """``name=value`` as a user types it; None if the option has its default."""
        value = getattr(self, name)
        if value == getattr(DecodingOptions, name):  # a dataclass holds its defaults
            return None
        if isinstance(value, Tree):
            value = list(value.widths)
        return f"{name}={str(value).lower() if isinstance(value, bool) else value}"

    def max_draft(self, model: MTPModel) -> int:
        """The deepest draft of a round: 0 for plain decoding.

        Raises:
            UserError: the model does not support these options.
        """
        depth = self._depth(model)
        if self.draft_vocab is not None:
            self._check_vocabulary(self.draft_vocab, model)
        if self.compile and model.mtp.one_cache and depth:
            raise UserError(
                f"compile=true has passes for a cache per draft, and mtp={model.config.mtp.variant}"
                " drafts in one cache: leave it out."
            )
        if self.cache == "single" and not model.mtp.is_recursive:
            raise UserError(
                f"cache={self.cache} is for a single module that reads its own output: decode a "
                "model of mtp=sequential with mtp.depth=1 or mtp.share_layers=true, or leave it "
                "per_depth."
            )
        return depth

    def _depth(self, model: MTPModel) -> int:
        most, depth = model.mtp.max_draft_depth, self.draft_depth
        if self.tree is not None:
            model.mtp.require_drafts()
            if most is not None and self.tree.depth > most:
                raise UserError(
                    f"{self._setting('tree')} drafts {self.tree.depth} tokens deep, but the model "
                    f"drafts {most}: give at most {most} numbers."
                )
            vocab = model.config.trunk.vocab_size
            if max(self.tree.widths) > vocab:
                raise UserError(
                    f"{self._setting('tree')} has more candidates than the model's {vocab} tokens."
                )
            return self.tree.depth
        if not self.speculative:
            return 0
        if depth is None or depth == "auto":
            if most is None:
                # A recursive module drafts any number; "auto" tries up to twice the trained depth.
                most = model.depth if depth is None else 2 * model.depth
            return min(most, MOST_DRAFTS)
        model.mtp.require_drafts()
        if most is not None and depth > most:
            raise UserError(
                f"draft_depth={depth}, but the model drafts {most} tokens: use at most {most}."
            )
        return depth

    def _check_vocabulary(self, tokens: int, model: MTPModel) -> None:
        model.mtp.require_drafts()
        vocab, mtp = model.config.trunk.vocab_size, model.config.mtp
        if tokens > vocab:
            raise UserError(
                f"draft_vocab={tokens}, but the model has {vocab} tokens: use at most {vocab}."
            )
        if mtp.depths_are_mixed:
            raise not_together(f"draft_vocab={tokens}", f"mtp.rank={mtp.rank}")
        if model.head_of(1) is not model.head:
            raise UserError(
                f"draft_vocab={tokens} shortens the trunk's head, and mtp={mtp.variant} drafts by "
                "a head of its own: leave it out."
            )


def _values(options: Any, kind: type) -> dict[str, Any]:
    """The values of the fields of ``kind``, a base class of the options' class."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}


def not_together(setting: str, other: str) -> UserError:
    """The error for two settings of which only one may be given."""
    return UserError(f"{setting} does not go together with {other}: leave one of them out.")
