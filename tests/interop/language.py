"""A language that small models learn in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from data_modules.windows import WindowBatch
from mtp_lightning.model import MTPModel

LETTERS = 64


def learn(model: MTPModel, noisy: str, *, steps: int = 90) -> MTPModel:
    """Train a model on texts of which two letters decide the next one, and add noise to one of its
    stack's weights, so that many of its drafts are wrong."""
    torch.manual_seed(0)
    model.initialize(0)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, LETTERS, (LETTERS, 4), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        text = [torch.randint(0, LETTERS, (16,), generator=generator) for _ in range(2)]
        while len(text) < 32:
            text.append(table[text[-1], text[-2] % 4])
        tokens = torch.stack(text, dim=1)
        losses = [
            F.cross_entropy(
                model.head_of(k)(hidden).flatten(0, 1),
                tokens[:, k + 1 : k + 1 + hidden.shape[1]].flatten(),
            )
            for k, hidden in model(WindowBatch(tokens, model.depth)).items()
        ]
        optimizer.zero_grad()
        (losses[0] + 0.3 * sum(losses[1:])).backward()
        optimizer.step()
    with torch.no_grad():
        weight = model.mtp.state_dict()[noisy]
        weight += 2.0 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model.eval()
