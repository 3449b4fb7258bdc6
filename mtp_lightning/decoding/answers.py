"""What a model says where a batch leaves it the word: answers of whole batches, greedily.

Shapes: B rows, W tokens of a window, P its positions, C d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.decoding.generate import eager_decoding
from mtp_lightning.decoding.session import Session
from mtp_lightning.model import MTPModel


def say(model: MTPModel, batch: WindowBatch) -> Tensor:
    """Plain greedy decoding of a batch's scored tokens; it reads all others as they are.

    Where the scored tokens of a row are one run, that is what :func:`generate` says.

    Args:
        model: any variant, in evaluation mode.
        batch: windows with ``scored``, the first token of each not among them.

    Returns:
        ``[B, W]`` the tokens, with the model's own in the scored places.
    """
    assert batch.scored is not None and not bool(batch.scored[:, 0].any())
    if model.config.mtp.answers_at_once:
        return choose(model, batch)  # which is not shown what is scored
    places = torch.arange(batch.tokens.shape[1], device=batch.device)
    first_B = batch.scored.int().argmax(1)
    last_B = torch.where(batch.scored, places, first_B.unsqueeze(1)).amax(1)
    first, last = first_B.tolist(), last_B.tolist()
    rounds = max(b - a for a, b in zip(first, last, strict=True)) + 1
    # Rows that are done early go on beyond their ends, where nobody looks.
    beyond = (batch.batch_size, rounds)
    said_BW = torch.cat((batch.tokens, batch.tokens.new_zeros(beyond)), dim=1)
    scored_BW = torch.cat((batch.scored, batch.scored.new_zeros(beyond)), dim=1)
    with eager_decoding(model):
        session = Session(
            model,
            [row[:n] for row, n in zip(batch.tokens.tolist(), first, strict=True)],
            capacity=max(first) + rounds,
            max_draft=0,
        )
        logits_BV = session.prefill(first)
        for i in range(rounds):
            at_B1 = (first_B + i).unsqueeze(1)
            choice_B1 = logits_BV.argmax(-1, keepdim=True)
            given_B1 = said_BW.gather(1, at_B1)
            token_B1 = torch.where(scored_BW.gather(1, at_B1), choice_B1, given_B1)
            said_BW.scatter_(1, at_B1, token_B1)
            if i + 1 == rounds:
                break
            session.put(token_B1, 0)
            logits_BV = session.verify(0)[:, 0]
            session.accept([0] * batch.batch_size, 0)
    return said_BW[:, : batch.tokens.shape[1]]


@torch.no_grad()
def choose(model: MTPModel, batch: WindowBatch) -> Tensor:
    """Teacher-forced: ``[B, W]`` the tokens, with the model's greedy choice, all tokens before
    being the true ones, in the scored places."""
    valid_BP = batch.valid(0)
    assert valid_BP is not None
    hidden_BPC = model(batch, ())[0]
    chosen = batch.tokens.clone()
    # A view: what is written there is written into the tokens.
    batch.shifted(chosen, 0)[valid_BP] = model.head(hidden_BPC[valid_BP]).argmax(-1)
    return chosen
