"""The config of a stack: its depth and its switches, which several variants share.

A checkpoint stores it, and it builds the stack (``base.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from mtp_lightning.errors import UserError
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.registry import Registered
from mtp_lightning.settings import require, require_choice, require_whole

if TYPE_CHECKING:
    from mtp_lightning.mtp.base import MTPStack

Branch = Literal["final", "before_last"]
InputNorm = Literal["post", "pre"]
Concat = Literal["embedding_first", "hidden_first"]
Detach = Literal["none", "trunk", "all"]
Init = Literal["random", "last_block"]

_CHOICES = dict(branch=Branch, input_norm=InputNorm, concat=Concat, detach=Detach, init=Init)


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Registered, ABC, family="mtp"):
    """Depth and switches of a stack.

    Attributes:
        depth: D, tokens predicted beyond the next one; 0 is plain next-token training.
        confidence: whether every depth also estimates the acceptance of its drafts
            (``objective.confidence``).

    Raises:
        UserError: the depth is not a whole number of at least 0, or a switch of the variant has an
            unknown value, or no effect.
    """

    newer: ClassVar[dict[str, Any]] = {"confidence": False}

    depth: int
    confidence: bool = False

    # The switches of variants that do not have them; a variant overrides its own with a field.
    branch = "final"
    input_norm = "post"
    detach = "none"
    freeze_trunk = False
    init = "random"
    stride = 1
    rank = 1
    blocks = 1

    # How many of the trunk's states the stack starts from, side by side in one tensor.
    n_states: ClassVar[int] = 1
    # The only depth that the variant has; None for any.
    fixed_depth: ClassVar[int | None] = None
    # Settings that change the meaning of the weights: init_from requires them to be equal.
    meaning: ClassVar[tuple[str, ...]] = ()
    # Whether the trunk reads windows with their answers hidden. Such a model predicts a task's
    # whole answer at once and cannot be decoded token by token.
    answers_at_once: ClassVar[bool] = False
    # Whether a depth's hidden state predicts one token through the shared head, so that the depth
    # has an accuracy, an agreement and an overlap. Otherwise it has a loss at most, and no drafts.
    predicts_tokens: ClassVar[bool] = True
    # Whether the depths have their own loss, with their own matrix (MTPStack.own_loss).
    brings_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("mtp.depth", self.depth, least=0)
        if self.fixed_depth is not None:
            expected = f"{self.fixed_depth} with mtp={self.variant}"
            require(self.depth == self.fixed_depth, "mtp.depth", self.depth, expected)
        for name, choices in _CHOICES.items():
            if hasattr(self, name):  # not every stack concatenates
                require_choice(f"mtp.{name}", getattr(self, name), get_args(choices))
        if self.freeze_trunk and self.depth == 0:
            raise UserError(
                "mtp.freeze_trunk=true with mtp.depth=0 leaves nothing to train: "
                "set mtp.depth to 1 or more, or mtp.freeze_trunk=false."
            )

    @property
    def trains_trunk(self) -> bool:
        """Whether embedding, trunk and head are trained."""
        return not self.freeze_trunk

    @property
    def how_to_freeze(self) -> str:
        """What to set so that only the stack is trained, for messages."""
        if any(field.name == "freeze_trunk" for field in fields(self)):
            return "set mtp.freeze_trunk=true"
        return f"mtp={self.variant} needs it trained, so set mtp=sequential mtp.freeze_trunk=true"

    @property
    def read_states(self) -> tuple[Any, ...]:
        """The trunk's states that the stack starts from, as a part of the key of their cache."""
        return self.branch, self.input_norm

    @property
    def depths_are_mixed(self) -> bool:
        """Whether one mixture predicts the next token and all depths, so that no depth has a loss
        and a head's logits of its own."""
        return self.rank > 1

    def shared_blocks(self, n_layers: int) -> int:
        """How many of the trunk's blocks the depths read, from the first on."""
        return n_layers - (self.branch == "before_last")

    @property
    def places_ahead(self) -> int:
        """How many tokens ahead of a position the stack looks; windows hold at least D + 1."""
        return self.depth + 1

    @property
    def data_options(self) -> dict[str, Any]:
        """The arguments of a data module for windows that are long enough; none for most stacks, so
        that data modules of users need not take them."""
        return {"lookahead": self.places_ahead} if self.extra_places else {}

    @property
    def extra_places(self) -> int:
        """E, the number of tokens that windows hold beyond those of the depths."""
        return max(self.places_ahead - self.depth - 1, 0)

    def check_window(self, seq_len: int) -> None:
        """Raise a ``UserError`` if windows of ``seq_len`` positions are too short for the
        targets."""

    def check_objective(self, draft_rules: Sequence[str], separate_training: Sequence[str]) -> None:
        """Refuse settings of the objective that have no meaning for the stack.

        Args:
            draft_rules: settings of rules about drafts, such as ``objective.mask=entropy``.
            separate_training: settings that train a depth's state or head apart from the main
                prediction's.

        Raises:
            UserError: naming the setting, the switch of the stack and the remedy.
        """

    def export_obstacle(self) -> str:
        """Why no other program computes the next token of a model of this stack, after "a model of
        mtp=NAME "; empty if one can."""
        return ""

    @abstractmethod
    def build(self, trunk: TrunkConfig) -> MTPStack:
        """The stack, with its weights not yet initialized."""


@dataclass(frozen=True, kw_only=True)
class ModulesConfig(MTPConfig):
    """Switches of stacks whose modules can be trained alone.

    Attributes:
        detach: ``trunk`` stops the depths' gradients at the branch point, once, before the first
            depth; ``all`` also at the shared embedding and head, where depths use them.
        freeze_trunk: embedding, trunk and head keep their weights; only the modules are trained.
    """

    detach: Detach = "none"
    freeze_trunk: bool = False


@dataclass(frozen=True, kw_only=True)
class BranchConfig(ModulesConfig):
    """Switches of stacks that start from a state of the trunk's end. Those without a norm before
    the shared head read it after the trunk's final norm.

    Attributes:
        branch: ``final`` reads the whole trunk; ``before_last`` all blocks except the last, which
            then serves the main prediction alone.
    """

    meaning: ClassVar[tuple[str, ...]] = ("branch",)

    branch: Branch = "final"
