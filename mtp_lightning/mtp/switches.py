"""Switches that several stacks have in common, and the branch point that they describe."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from mtp_lightning.nn.trunk import Trunk, TrunkOutput

Branch = Literal["final", "before_last"]
InputNorm = Literal["post", "pre"]
Concat = Literal["embedding_first", "hidden_first"]
Detach = Literal["none", "trunk", "all"]

_CHOICES = {"branch": Branch, "input_norm": InputNorm, "concat": Concat, "detach": Detach}


def check_switches(config: object) -> None:
    """Refuse a value that a switch of ``config`` does not know, and a stack that cannot train.

    Raises:
        ValueError: naming the switch, its value and the choices.
    """
    for name, choices in _CHOICES.items():
        value: Any = getattr(config, name, None)
        if value is not None and value not in get_args(choices):
            known = ", ".join(get_args(choices))
            raise ValueError(f"mtp.{name}={value} is unknown: choose one of {known}.")
    if getattr(config, "freeze_trunk", False) and getattr(config, "depth", 0) == 0:
        raise ValueError(
            "mtp.freeze_trunk=true with mtp.depth=0 leaves nothing to train: "
            "set mtp.depth to 1 or more, or mtp.freeze_trunk=false."
        )


def branch_state(
    trunk: Trunk, output: TrunkOutput, *, branch: Branch, input_norm: InputNorm, detach: Detach
) -> Tensor:
    """The trunk's hidden state [B, T, C] that a stack starts from.

    Args:
        trunk: for its final norm.
        output: its hidden states.
        branch: after all blocks, or after all but the last.
        input_norm: after the trunk's final norm, or before it.
        detach: where the depths' gradients stop.
    """
    if branch == "before_last":
        hidden = output.before_last
        hidden = trunk.norm(hidden) if input_norm == "post" else hidden
    else:
        hidden = output.final if input_norm == "post" else output.last_block
    # Once, before the loop over depths: cut at every depth, the earlier modules would learn from
    # their own loss alone.
    return hidden if detach == "none" else hidden.detach()
