"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), in fp32 on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Factor of the learning rate of a matrix with some rows and columns, by `adjust_lr_fn`.
_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Muon(torch.optim.Muon):
    """``torch.optim.Muon``, which orthogonalizes in bf16, except on CPUs: without instructions for
    bf16, a product of two matrices takes 6 to 32 times as long as in fp32 there.

    Its arguments, defaults and state are those of ``torch.optim.Muon``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step, and return the closure's loss."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)  # type: ignore[no-any-return]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean
                update = orthogonalized(
                    update, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
                )
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = _SCALES[group["adjust_lr_fn"] or "original"](*parameter.shape)
                parameter.add_(update, alpha=-group["lr"] * scale)
        return loss


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], *, steps: int, eps: float
) -> Tensor:
    """A matrix with about the same singular vectors and singular values near 1, by Newton-Schulz
    iterations of fifth order in the matrix's own precision.

    Args:
        coefficients: a, b and c of ``a X + (b X X^T + c (X X^T)^2) X``.
        eps: least norm that the matrix is divided by.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.size(0) > matrix.size(1) else wide
