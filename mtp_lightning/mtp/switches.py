"""Switches that several stacks share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from mtp_lightning.errors import UserError
from mtp_lightning.nn.trunk import TrunkState
from mtp_lightning.settings import require_choice

Branch = Literal["final", "before_last"]
InputNorm = Literal["post", "pre"]
Concat = Literal["embedding_first", "hidden_first"]
Detach = Literal["none", "trunk", "all"]
Init = Literal["random", "last_block"]


class Switches:
    """Default values of the switches; a variant that has a switch overrides it with a field."""

    depth: int
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

    @property
    def start_state(self) -> TrunkState:
        """The trunk's hidden state that the stack starts from."""
        return _STATES[self.branch, self.input_norm]

    @property
    def read_states(self) -> tuple[Any, ...]:
        """Which states of the trunk the stack starts from, for the key of a cache of them."""
        return self.branch, self.input_norm

    def shared_blocks(self, n_layers: int) -> int:
        """How many of the trunk's blocks the depths read, from the first on."""
        return n_layers - (self.branch == "before_last")


_STATES = {
    ("before_last", "pre"): TrunkState.BEFORE_LAST,
    ("before_last", "post"): TrunkState.NORMED_BEFORE_LAST,
    ("final", "pre"): TrunkState.LAST_BLOCK,
    ("final", "post"): TrunkState.FINAL,
}

_CHOICES = {
    "branch": Branch,
    "input_norm": InputNorm,
    "concat": Concat,
    "detach": Detach,
    "init": Init,
}


def check_switches(config: Switches) -> None:
    """Refuse unknown values of the switches of ``config``, and a stack with nothing to train.

    Raises:
        UserError: naming the switch, its value and the choices.
    """
    for name, choices in _CHOICES.items():
        if hasattr(config, name):  # not every stack concatenates
            require_choice(f"mtp.{name}", getattr(config, name), get_args(choices))
    if config.freeze_trunk and config.depth == 0:
        raise UserError(
            "mtp.freeze_trunk=true with mtp.depth=0 leaves nothing to train: "
            "set mtp.depth to 1 or more, or mtp.freeze_trunk=false."
        )
