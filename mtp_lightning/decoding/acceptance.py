"""Acceptance of drafts by their position in the text and by the main prediction's entropy.

Shapes: P positions of one text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mtp_lightning.decoding.measure import read_text
from mtp_lightning.decoding.options import Prompt
from mtp_lightning.decoding.sequence import Generation
from mtp_lightning.model import MTPModel
from mtp_lightning.objective.through_head import log_probs_by_chunk

# Edges of the entropy bins, in nats.
_ENTROPIES = (0.0, 0.5, 1.0, 2.0, 4.0, math.inf)


def first_drafts(generation: Generation, max_new_tokens: int) -> list[tuple[int, bool]]:
    """The first draft of every verify pass: its index in ``token_ids``, and whether the loop
    accepted it.

    The prompt's pass gives token 0; every later pass gives the accepted drafts and then the trunk's
    own token. A pass with room for a single token verifies no draft.
    """
    accepted = generation.accepted_mask
    places = range(1, min(len(accepted), max_new_tokens - 1))
    return [(place, accepted[place]) for place in places if not accepted[place - 1]]


@torch.inference_mode()
def acceptance_by(
    model: MTPModel,
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    *,
    max_new_tokens: int,
) -> dict[str, float]:
    """How often the loop accepts the first draft of a pass, by its position in the text and by the
    main prediction's entropy at that position. The generations are greedy continuations of the
    prompts with drafts, decoded with the limit ``max_new_tokens``.

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
    drafts: list[tuple[int, int, float, bool]] = []
    for text, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        entropy_P = _entropies(model, [*map(int, prompt), *generation.token_ids])
        for place, was_accepted in first_drafts(generation, max_new_tokens):
            index = len(prompt) + place
            # The distribution at index - 1 is that of the token at `index`.
            drafts.append((text, index + 1, float(entropy_P[index - 1]), was_accepted))
    if not drafts:
        return {}
    text_N, position_N, entropy_N, accepted_N = torch.tensor(drafts, dtype=torch.float64).unbind(1)
    powers = [2**i for i in range(int(position_N.max()).bit_length())]
    bins = [(f"at_{low}-{2 * low - 1}", position_N, low, 2 * low) for low in powers]
    for start, end in pairwise(_ENTROPIES):
        last = f"{end:g}" if end < math.inf else "up"
        bins.append((f"entropy_{start:g}-{last}", entropy_N, start, end))
    values: dict[str, float] = {}
    for name, x, low, high in bins:
        inside = (x >= low) & (x < high)
        if inside.any():
            values[f"acceptance_{name}"] = float(accepted_N[inside].mean())
    for name, x in (("position", position_N.log2()), ("entropy", entropy_N)):
        _add_slope(values, f"acceptance_slope_{name}", accepted_N, x, text_N.long())
    return values


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
    h_PC, weight_VC = read_text(model, text)[0], model.head.weight
    chunks = log_probs_by_chunk(h_PC.to(weight_VC.dtype), weight_VC)
    # Clamped: a probability of 0 would give 0 * -inf = NaN.
    return torch.cat([-(c.exp() * c.clamp(min=-1e4)).sum(-1) for _, c in chunks]).cpu()
