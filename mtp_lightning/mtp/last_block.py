"""Initialize a new module from a trained trunk: ``mtp.init=last_block``.

The trunk's last block and final norm turn the state before that block, at the token that the module
has read last, into the wanted prediction. So the module copies both, and its projection is the best
linear estimate of that state. (A module of ``mtp.blocks`` copies as many of the trunk's.)

    argmin_A  mean_t |A x_t - y_t|^2 / mean(y_t^2)  +  s |A - A_0|^2

over some windows of text. x is the input of ``eh_proj``; y is the trunk's state before the copied
blocks, k tokens further for depth k. A_0 is the best-fitting multiple of the identity on the hidden
half and 0 on the embedding half, so that in directions absent from the text the module keeps the
trunk's own state. s is a thousandth of the mean of x^2 under the same weights. Each token is
weighted by the inverse of its state's size, since first tokens can be a thousand times larger.

Shapes: B batch, T positions, D depths of the stack, N tokens, C d_model, X width of the
projection's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.inputs import StackInputs, TrunkText
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.trunk import Trunk

if TYPE_CHECKING:
    from mtp_lightning.mtp.base import MTPStack

RIDGE = 1e-3


@torch.no_grad()
def read_text(trunk: Trunk, stack: MTPStack, batch: WindowBatch) -> TrunkText:
    """The states of ``trunk`` over whole windows, which modules of ``stack`` are fitted to."""
    weight: Tensor = trunk.embedding.weight  # type: ignore[assignment]
    seq_len, end = batch.seq_len, batch.seq_len + stack.depth
    documents = None if batch.documents is None else batch.documents[:, :end].to(weight.device)

    def context(n: int) -> ForwardContext:
        return ForwardContext.of_window(
            trunk.config,
            n,
            device=weight.device,
            dtype=weight.dtype,
            documents=None if documents is None else documents[:, :n],
        )

    tokens = batch.tokens[:, :end].to(weight.device)
    embedded = trunk.embedding(tokens)
    keep_after, before = trunk.keep_after, max(len(trunk.blocks) - stack.config.blocks, 0)
    trunk.keep_after = {*keep_after, before}
    try:
        output = trunk(embedded, context(end))
    finally:
        trunk.keep_after = keep_after
    hidden = stack.branch(trunk, output)[:, :seq_len]
    inputs = StackInputs(hidden, tokens, embedded, context(seq_len))
    return TrunkText(inputs, output.after[before], documents)


def copy_last_blocks(blocks: Sequence[nn.Module], trunk: Trunk) -> None:
    """Copy the weights of as many last blocks of the trunk, the experts' biases included.

    Raises:
        UserError: the blocks differ from the trunk's, or are more than the trunk has.
    """
    if len(blocks) > len(trunk.blocks):
        raise UserError(
            f"mtp.init=last_block has {len(trunk.blocks)} blocks of the trunk to copy, and a "
            f"module has mtp.blocks={len(blocks)}: set mtp.init=random, or fewer blocks."
        )
    for block, trunk_block in zip(blocks, trunk.blocks[-len(blocks) :], strict=True):
        try:
            block.load_state_dict(trunk_block.state_dict())
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise UserError(
                f"mtp.init=last_block does not fit, since a module's block differs from the "
                f"trunk's last one ({reasons}): set mtp.init=random."
            ) from error


def fit_projection(x_NX: Tensor, y_NC: Tensor, hidden_half: slice) -> Tensor:
    """A of the formula above, [C, X = 2 C], computed in float64; ``hidden_half`` are the columns of
    x that hold the hidden state.

    Raises:
        UserError: there are no tokens.
    """
    if not len(x_NX):
        raise UserError(
            "mtp.init=last_block has no text to fit: with data.document_mask=true every document "
            "that it read is shorter than the depth; lower mtp.depth, or set mtp.init=random."
        )
    x, y = x_NX.double(), y_NC.double()
    weight_N1 = 1 / y.square().mean(dim=1, keepdim=True).clamp_min(1e-30)
    weighted = x * weight_N1 / len(x)
    gram, target = weighted.T @ x, weighted.T @ y
    h, g = target[hidden_half], gram[hidden_half, hidden_half]
    prior = torch.zeros_like(target)
    prior[hidden_half] = torch.eye(len(h), dtype=x.dtype, device=x.device) * (h.trace() / g.trace())
    s = RIDGE * gram.trace() / len(gram)
    gram.diagonal().add_(s)
    return torch.linalg.solve(gram, target + s * prior).T.to(x_NX.dtype)
