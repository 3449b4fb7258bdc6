"""How a new module begins on a finished trunk: ``mtp.init``.

The trunk's last block, in its place, would turn the state before it, of the token that the module
has read last, into the prediction that is wanted. So a module takes over that block and the final
norm, and the projection before them is the best linear guess of that state:

    argmin_A  mean_t |A x_t - y_t|^2 / mean(y_t^2)  +  s |A - A_0|^2

over some windows of text, with x what ``eh_proj`` reads, y the trunk's state before its last block
as many tokens further on as the depth says, and A_0 the multiple of the identity on the hidden half
that fits best (and 0 on the embedding half): where the text does not say, the module's state is the
trunk's own. s is a thousandth of the mean of x^2 under the same weights. Every token weighs the
same, whatever its state's size: those of first tokens can be a thousand times that of others.

Shapes: N tokens, C d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UserError
from mtp_lightning.nn.trunk import Trunk

RIDGE = 1e-3


def check_last_block(name: str, block: nn.Module, trunk: Trunk) -> None:
    """Refuse to start a block from a last one of another kind.

    Raises:
        UserError: they differ in a weight's name or shape.
    """
    own, last = (_shapes(b) for b in (block, trunk.blocks[-1]))
    if own != last:
        key = min(name for name in own | last if own.get(name) != last.get(name))
        raise UserError(
            f"mtp.init=last_block does not fit: {name}.block has {_told(own, key)} and the "
            f"trunk's last block {_told(last, key)}; set mtp.init=random."
        )


def copy_last_block(block: nn.Module, trunk: Trunk) -> None:
    """Weights, and experts' biases, of the trunk's last block."""
    block.load_state_dict(trunk.blocks[-1].state_dict())


def fit_projection(x_NX: Tensor, y_NC: Tensor, hidden_half: slice) -> Tensor:
    """A of the formula above, [C, X], in float64 on the way.

    Args:
        x_NX: what is read, X = 2 C.
        y_NC: what is to come out.
        hidden_half: where the hidden state lies in x.

    Raises:
        UserError: there is no token.
    """
    if not len(x_NX):
        raise UserError(
            "mtp.init=last_block has no text to look at: with data.document_mask=true no document "
            "of those it read is as long as the depth; lower mtp.depth, or set mtp.init=random."
        )
    x, y = x_NX.double(), y_NC.double()
    weight_N1 = 1 / y.square().mean(dim=1, keepdim=True).clamp_min(1e-30)
    weighted = x * weight_N1 / len(x)
    gram, target = weighted.T @ x, weighted.T @ y
    h, g = target[hidden_half], gram[hidden_half, hidden_half]
    prior = torch.zeros_like(target)
    prior[hidden_half] = torch.eye(len(h), dtype=x.dtype) * (h.trace() / g.trace())
    s = RIDGE * gram.trace() / len(gram)
    gram.diagonal().add_(s)
    return torch.linalg.solve(gram, target + s * prior).T.to(x_NX.dtype)


def _shapes(block: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in block.state_dict().items()}


def _told(shapes: dict[str, list[int]], name: str) -> str:
    return f"{name} of the shape {shapes[name]}" if name in shapes else f"no {name}"
