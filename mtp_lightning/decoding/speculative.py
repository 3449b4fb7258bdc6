"""The draft-verify loop's one round, for every variant; without drafts it is plain decoding.

Greedy accepts the longest prefix of the drafts that the trunk would have chosen itself. Sampling
accepts a draft with probability min(1, p/q), and at the first rejection draws from max(p - q, 0)
renormalised (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2): what comes out
has the trunk's distribution p whatever the drafts' distribution q.

Shapes: B rows, M drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.decoding.sampling import Noise, Sampling, draw
from mtp_lightning.decoding.session import Session


@dataclass(frozen=True)
class Round:
    """What one round brought, row by row.

    Attributes:
        tokens: the accepted drafts and the trunk's own token behind them.
        accepted: how many of them were drafts.
        reached: how many drafts were judged, the first rejected one included.
    """

    tokens: list[list[int]]
    accepted: list[int]
    reached: list[int]


class Decoder:
    """Chooses tokens for a session.

    Args:
        session: the state it moves on.
        sampling: how tokens are chosen, by the trunk and by the drafts alike.
        noise: uniform numbers; not used if greedy.
        max_draft: most drafts that any round will have.
        min_confidence: a round ends its drafts where every row's product of confidences is below
            it. The draft that the last one is of is not made, so what is judged does not depend on
            what was drawn for it: the text's distribution stays the trunk's.
    """

    def __init__(
        self,
        session: Session,
        sampling: Sampling,
        noise: Noise,
        *,
        max_draft: int,
        min_confidence: float = 0.0,
    ) -> None:
        self.session = session
        self.sampling = sampling
        self.noise = noise
        self.min_confidence = min_confidence
        # Every round takes the same amount, so that a row's numbers depend on its rounds alone.
        self._n_noise = 2 * max_draft + 1

    def first(self, logits_BV: Tensor) -> list[int]:
        """Choose every row's first token from the prompt's logits."""
        if self.sampling.greedy:
            token_B = logits_BV.argmax(dim=-1)
        else:
            noise = self.noise.next(self._n_noise)
            token_B = draw(self.sampling.probabilities(logits_BV), noise[:, -1])
        self.session.put(token_B.unsqueeze(1), 0)
        return token_B.tolist()

    def round(self, n_drafts: int, caps: Sequence[int]) -> Round:
        """Draft, verify, accept.

        Args:
            n_drafts: M, drafts of every row.
            caps: the most drafts a row may accept: fewer than M near its end.
        """
        choose = self._greedy if self.sampling.greedy else self._sample
        tokens, accepted, n_drafts = choose(n_drafts, caps)
        limits = [min(n_drafts, cap) for cap in caps]
        reached = [min(a + 1, limit) for a, limit in zip(accepted, limits, strict=True)]
        self.session.accept(accepted, n_drafts)
        return Round(tokens, accepted, reached)

    def _drafts(self, n_drafts: int) -> Iterator[tuple[int, Tensor]]:
        """Every depth and its logits [B, V], until none is believed any more."""
        product_B: Tensor | None = None
        for k in range(1, n_drafts + 1):
            logits_BV = self.session.draft(k)
            if self.min_confidence:
                sure_B = self.session.confidence_B
                assert sure_B is not None
                product_B = sure_B if product_B is None else product_B * sure_B
                if bool((product_B < self.min_confidence).all()):
                    return
            yield k, logits_BV

    def _greedy(self, n_drafts: int, caps: Sequence[int]) -> tuple[list[list[int]], list[int], int]:
        session = self.session
        drafts = []
        for k, logits_BV in self._drafts(n_drafts):
            draft_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            session.put(draft_B1, k)
            drafts.append(draft_B1)
        n_drafts = len(drafts)
        choice_BT = session.verify(n_drafts).argmax(dim=-1)
        # Up to the first mismatch the choices are the drafts, and the next one is the new pending
        # token: they can be written before anybody has counted.
        session.put(choice_BT, 1)
        # The round's only synchronisation.
        host = torch.cat((*drafts, choice_BT), dim=1).tolist()
        tokens, accepted = [], []
        for row, cap in zip(host, caps, strict=True):
            draft, choice = row[:n_drafts], row[n_drafts:]
            a, most = 0, min(n_drafts, cap)
            while a < most and draft[a] == choice[a]:
                a += 1
            tokens.append(choice[: a + 1])
            accepted.append(a)
        return tokens, accepted, n_drafts

    def _sample(self, n_drafts: int, caps: Sequence[int]) -> tuple[list[list[int]], list[int], int]:
        session = self.session
        noise_BR = self.noise.next(self._n_noise)
        drafts, proposals = [], []
        for k, logits_BV in self._drafts(n_drafts):
            q_BV = self.sampling.probabilities(logits_BV)
            draft_B1 = draw(q_BV, noise_BR[:, k - 1]).unsqueeze(1)
            session.put(draft_B1, k)
            drafts.append(draft_B1)
            proposals.append(q_BV)
        n_drafts = len(drafts)
        p_BTV = self.sampling.probabilities(session.verify(n_drafts))
        if not n_drafts:
            tokens_B1 = draw(p_BTV, noise_BR[:, -1:])
            session.put(tokens_B1, 1)
            return tokens_B1.tolist(), [0] * len(caps), 0
        draft_BM, q_BMV = torch.cat(drafts, dim=1), torch.stack(proposals, dim=1)
        half = self._n_noise // 2
        limit_B = torch.tensor([min(n_drafts, c) for c in caps], device=p_BTV.device)
        tokens_BT, accepted_B = accept_or_resample(
            p_BTV, q_BMV, draft_BM, noise_BR[:, half : half + n_drafts], noise_BR[:, -1], limit_B
        )
        session.put(tokens_BT, 1)
        host = torch.cat((tokens_BT, accepted_B.unsqueeze(1)), dim=1).tolist()
        accepted = [row[-1] for row in host]
        tokens = [row[: a + 1] for row, a in zip(host, accepted, strict=True)]
        return tokens, accepted, n_drafts


def accept_or_resample(
    p_BTV: Tensor,
    q_BMV: Tensor,
    draft_BM: Tensor,
    accept_noise_BM: Tensor,
    final_noise_B: Tensor,
    limit_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rejection rule of speculative sampling.

    Args:
        p_BTV: the trunk's distributions, T = M + 1.
        q_BMV: those that the drafts were drawn from.
        draft_BM: the drafts.
        accept_noise_BM, final_noise_B: uniform numbers of [0, 1).
        limit_B: only the first so many drafts are judged, the others do not exist.

    Returns:
        Tokens [B, T], of which the first ``accepted + 1`` count, and ``accepted`` [B].
    """
    n_drafts = draft_BM.shape[1]
    index = draft_BM.unsqueeze(-1)
    p_draft_BM = p_BTV[:, :n_drafts].gather(-1, index).squeeze(-1)
    q_draft_BM = q_BMV.gather(-1, index).squeeze(-1)
    # u < p / q without the division; p = 0 never accepts, p >= q always does.
    ok_BM = accept_noise_BM * q_draft_BM < p_draft_BM
    ok_BM &= torch.arange(n_drafts, device=ok_BM.device) < limit_B.unsqueeze(1)
    accepted_B = ok_BM.long().cumprod(dim=1).sum(dim=1)
    rejected_B1 = (accepted_B < limit_B).unsqueeze(1)
    rows = torch.arange(p_BTV.shape[0], device=p_BTV.device)
    p_BV = p_BTV[rows, accepted_B]
    q_BV = q_BMV[rows, accepted_B.clamp(max=n_drafts - 1)]
    rest_BV = (p_BV - q_BV).clamp_(min=0)
    # p = q up to rounding leaves nothing to draw from; then p itself is right.
    rejected_B1 &= rest_BV.sum(dim=1, keepdim=True) > 0
    final_B = draw(torch.where(rejected_B1, rest_BV, p_BV), final_noise_B)
    tokens_BT = torch.cat((draft_BM, final_B.unsqueeze(1)), dim=1)
    return tokens_BT.scatter(1, accepted_B.unsqueeze(1), final_B.unsqueeze(1)), accepted_B
