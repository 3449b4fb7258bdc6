"""Auxiliary outputs of layers in a training pass: router loads and auxiliary losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def loads(chosen_MK: Tensor, n_experts: int) -> Tensor:
    """int64 [E], the number of tokens that chose each expert."""
    # bincount would read the numbers on the host first, which waits for a GPU.
    load_E = torch.zeros(n_experts, dtype=torch.int64, device=chosen_MK.device)
    chosen = chosen_MK.flatten()
    return load_E.scatter_add_(0, chosen, torch.ones_like(chosen))


class AuxiliaryOutputs:
    """Collects auxiliary outputs, as part of the context that every block receives.

    Args:
        keep: whether reports are kept; False for the repetition of a pass that has reported.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        # Name in the log -> differentiable scalars, each summed over the pass's sequences, in the
        # order of the layers.
        self.by_tag: dict[str, list[Tensor]] = {}
        # Router -> int64 [E], the tokens sent to each of its experts.
        self.loads: dict[nn.Module, Tensor] = {}

    @property
    def losses(self) -> list[Tensor]:
        """The losses of all names."""
        return [loss for losses in self.by_tag.values() for loss in losses]

    def add_loss(self, loss: Tensor, tag: str = "moe/sequence_loss") -> None:
        """Add an auxiliary loss, a scalar summed over the pass's windows, which is logged as
        ``tag``. The step's loss has its mean over all windows."""
        if self.keep:
            self.by_tag.setdefault(tag, []).append(loss)

    @torch.no_grad()
    def count(self, router: nn.Module, chosen_MK: Tensor, n_experts: int) -> None:
        """Add the loads of the experts [M, K] that a router chose."""
        if self.keep:
            self._add(router, loads(chosen_MK, n_experts))

    def add(self, other: AuxiliaryOutputs) -> None:
        """Add the loads and the losses, detached, of another pass of the same step."""
        for tag, losses in other.by_tag.items():
            for loss in losses:
                self.add_loss(loss.detach(), tag)
        for router, load_E in other.loads.items():
            self._add(router, load_E)

    def _add(self, router: nn.Module, load_E: Tensor) -> None:
        self.loads[router] = self.loads[router] + load_E if router in self.loads else load_E

    @classmethod
    def leave_uncompiled(cls) -> None:
        """Let compiled layers call Python to report. The compiler would make a program of its own
        for each number of earlier reports, and so for each layer."""
        for name in ("add_loss", "count"):
            setattr(cls, name, torch.compiler.disable(getattr(cls, name)))
