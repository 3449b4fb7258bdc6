"""Acceptance of drafts by their position in the text and by the main prediction's entropy.

Shapes: P positions of one text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.decoding.options import Prompt
from mtp_lightning.decoding.sequence import Generation
from mtp_lightning.model import MTPModel
from mtp_lightning.objective.through_head import log_probs_by_chunk

# Upper ends of the entropy bins, in nats.
_ENTROPIES = (0.5, 1.0, 2.0, 4.0, math.inf)


def first_drafts(generation: Generation, max_new_tokens: int) -> list[tuple[int, bool]]:
    """The first draft of every verify pass: its index in ``token_ids``, and whether the loop
    accepted it.

    The prompt's pass gives token 0; every later pass gives the accepted drafts and then the trunk's
    own token. A pass with room for a single token verifies no draft.
    """
    drafts, at_start = [], True
    for place in range(1, generation.new_tokens):
        accepted = generation.accepted_mask[place]
        if at_start and place < max_new_tokens - 1:
            drafts.append((place, accepted))
        at_start = not accepted
    return drafts


@torch.inference_mode()
def acceptance_by(
    model: MTPModel,
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    *,
    max_new_tokens: int,
) -> dict[str, float]:
    """How often the loop accepts the first draft of a pass, by its position in the text and by the
    main prediction's entropy at that position.

    Args:
        model: in evaluation mode.
        prompts: token ids.
        generations: their greedy continuations, decoded with drafts.
        max_new_tokens: the limit that they were decoded with.

    Returns:
        An empty dict without drafts; else

        - ``acceptance_at_A-B``: by the token's position in the text, from 1, in bins that double;
        - ``acceptance_entropy_A-B``: by the entropy, in nats, of the main distribution that
          verifies the draft;
        - ``acceptance_slope_position`` per doubling of the position, and
          ``acceptance_slope_entropy`` per nat: least squares over single drafts;
        - the slopes' standard errors ``.._se``, clustered by text (Liang & Zeger 1986), if there
          are at least two texts.
    """
    positions, entropies, accepted, texts = [], [], [], []
    for text, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        drafts = first_drafts(generation, max_new_tokens)
        entropy_P = _entropies(model, [*map(int, prompt), *generation.token_ids])
        for place, was_accepted in drafts:
            index = len(prompt) + place
            positions.append(index + 1)
            entropies.append(float(entropy_P[index - 1]))  # index - 1 predicts the token at `index`
            accepted.append(float(was_accepted))
            texts.append(text)
    if not accepted:
        return {}
    position_N, entropy_N, accepted_N = (
        torch.tensor(values, dtype=torch.float64) for values in (positions, entropies, accepted)
    )
    values: dict[str, float] = {}
    low = 1
    while low <= max(positions):
        _add(values, f"acceptance_at_{low}-{2 * low - 1}", accepted_N, position_N, low, 2 * low)
        low *= 2
    start = 0.0
    for end in _ENTROPIES:
        name = f"{start:g}-{end:g}" if end < math.inf else f"{start:g}-up"
        _add(values, f"acceptance_entropy_{name}", accepted_N, entropy_N, start, end)
        start = end
    for name, x in (("position", position_N.log2()), ("entropy", entropy_N)):
        _add_slope(values, f"acceptance_slope_{name}", accepted_N, x, torch.tensor(texts))
    return values


def _add(
    values: dict[str, float], name: str, accepted: Tensor, x: Tensor, low: float, high: float
) -> None:
    inside = (x >= low) & (x < high)
    if inside.any():
        values[name] = float(accepted[inside].mean())


def _add_slope(values: dict[str, float], name: str, y: Tensor, x: Tensor, text: Tensor) -> None:
    x = x - x.mean()
    spread = x.square().sum()
    if spread == 0:
        return
    slope = (x * y).sum() / spread
    values[name] = float(slope)
    residual = y - y.mean() - slope * x
    pull_G = torch.zeros(int(text.max()) + 1, dtype=x.dtype).index_add_(0, text, x * residual)
    n_texts = len(text.unique())
    if n_texts > 1:
        variance = pull_G.square().sum() * n_texts / (n_texts - 1)
        values[f"{name}_se"] = float(variance.sqrt() / spread)


def _entropies(model: MTPModel, text: list[int]) -> Tensor:
    """Entropy of the main prediction after every token of a text, [P], in nats."""
    tokens = torch.tensor([text + [0] * (model.depth + 1)], device=model.head.weight.device)
    h_PC = model(WindowBatch(tokens, model.depth), ())[0][0]
    chunks = log_probs_by_chunk(h_PC.to(model.head.weight.dtype), model.head.weight)
    # Clamped: a probability of 0 would give 0 * -inf = NaN.
    return torch.cat([-(c.exp() * c.clamp(min=-1e4)).sum(-1) for _, c in chunks]).cpu()
