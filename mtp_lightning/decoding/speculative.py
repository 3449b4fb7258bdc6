"""One round of the draft-verify loop, for every variant; without drafts it is plain decoding.

Greedy decoding accepts the longest prefix of the drafts that the trunk would have chosen itself.
Sampling accepts a draft with probability min(1, p/q) and, at the first rejection, draws from
max(p - q, 0), renormalized (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2). Its
output has the trunk's distribution p for any distribution q of the drafts.

Shapes: B rows, M drafts, T = M + 1 verified tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.sampling import Noise, RoundNoise, RowSampling, Sampling, certain, draw
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.verification import Verification, accept_or_resample


class RowResult(NamedTuple):
    """The result of one round for one row."""

    # The accepted drafts and the trunk's own token after them: the bonus token if all drafts were
    # accepted, else the recovered token (vLLM's terms).
    tokens: list[int]
    accepted: int  # number of accepted drafts
    reached: int  # number of drafts verified in sequence, the first rejected one included
    # Every draft that could have been accepted and was not: its depth, its token, and the index in
    # this list of the draft that it follows (None: the accepted drafts).
    rejected: list[tuple[int, int, int | None]]
    # Whether the drafts were looked up in the text, and not made by the modules.
    looked_up: bool = False

    @classmethod
    def of_chain(cls, tokens: list[int], accepted: int, drafts: list[int]) -> RowResult:
        """The result of a chain of drafts; ``drafts`` are those that could be accepted."""
        rejected = [
            (depth, token, depth - accepted - 2 if depth > accepted + 1 else None)
            for depth, token in enumerate(drafts[accepted:], start=accepted + 1)
        ]
        return cls(tokens, accepted, min(accepted + 1, len(drafts)), rejected)


class Draft(NamedTuple):
    """The drafts of one depth."""

    tokens_B: Tensor  # the drafts
    # The distributions over the first N tokens that they were drawn from; None if each had
    # probability 1.
    q_BN: Tensor | None = None
    # The rows that are confident enough to draft at this depth; None for all.
    confident_B: Tensor | None = None


class Round(NamedTuple):
    """The result of one round, by row, and the trunk's logits at the pending token and at every
    draft."""

    rows: list[RowResult]
    logits_BTV: Tensor


class Decoder:
    """Chooses the tokens of a session; holds the random numbers and sampling settings of its rows.

    Args:
        session: the decoding state, still without rows.
        most_drafts: the most drafts of a round.
        min_confidence: a round stops drafting once the product of confidences is below this in
            every row; a sampled row accepts no draft from its own such depth on. The confidence is
            the session's estimate, or without one the probability of the likeliest draft (EAGLE-2,
            arXiv 2406.16858, section 3). It is known before a token is drawn, so the decision does
            not depend on the token and the text keeps the trunk's distribution.
        verify: the rule that decides which sampled drafts are kept (``verification.py``).
    """

    def __init__(
        self,
        session: Session,
        *,
        most_drafts: int,
        min_confidence: float = 0.0,
        verify: Verification = accept_or_resample,
    ) -> None:
        self.session = session
        self.min_confidence = min_confidence
        self._rule = verify
        self._vocab = session.model.config.trunk.vocab_size
        self._most_drafts = most_drafts
        # Every round consumes the same number of random numbers, so a row's stream depends only on
        # its round count.
        self._noise = Noise(most_drafts, session.tokens_BS.device)
        self._samplings: list[Sampling] = []
        self._row_sampling: RowSampling | None = None

    def join(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        streams: Sequence[tuple[int, int, int]],
    ) -> tuple[list[int], Tensor]:
        """Append rows and read their prompts.

        ``streams`` are the seed and index of the rows' random numbers, and the most drafts of each
        per round, which decide how many numbers it takes. Returns the first token of every new row,
        and the logits [new rows, V] that it was chosen by.
        """
        logits_BV = self.session.join(prompts)
        noise = self._noise.join(streams)
        self._samplings += samplings
        self._row_sampling = None
        chosen = RowSampling(samplings)
        if chosen.greedy:
            token_B = logits_BV.argmax(dim=-1)
        else:
            token_B = draw(chosen.probabilities(logits_BV), noise.final_B)
        self.session.put_pending(token_B)
        return token_B.tolist(), logits_BV

    def drop_row(self, row: int) -> None:
        """Drop a row; the last row moves to its slot."""
        self.session.drop_row(row)
        self._noise.rows[row], self._samplings[row] = self._noise.rows[-1], self._samplings[-1]
        self.keep_rows(len(self.session.n_read))

    def keep_rows(self, rows: int) -> None:
        """Drop all rows but the first ``rows``, whatever a failed :meth:`join` has left."""
        self.session.resize(rows)
        del self._noise.rows[rows:], self._samplings[rows:]
        self._row_sampling = None

    @property
    def _sampling(self) -> RowSampling:
        """The sampling settings of all rows, rebuilt after rows have come or gone."""
        if self._row_sampling is None:
            self._row_sampling = RowSampling(self._samplings)
        return self._row_sampling

    def round(
        self, n_drafts: int, caps: Sequence[int], looked_up: Sequence[Sequence[int]] = ()
    ) -> Round:
        """Draft, verify, accept.

        Args:
            n_drafts: M, the number of drafts that the modules make for every row.
            caps: for each row, the most drafts that it may accept; fewer than M near its end.
            looked_up: for each row, the drafts that were looked up for it in place of the
                modules'; empty for none in any row.
        """
        noise = None if self._sampling.greedy else self._noise.next()
        drafts, caps = self._drafts(n_drafts, noise), list(caps)
        if any(looked_up):
            drafts = self._with_looked_up(drafts, looked_up, caps)
        result = self._greedy(drafts, caps) if noise is None else self._sample(drafts, caps, noise)
        self.session.accept([row.accepted for row in result.rows])
        if any(looked_up):
            rows = zip(result.rows, looked_up, strict=True)
            result = result._replace(rows=[row._replace(looked_up=bool(ids)) for row, ids in rows])
        return result

    def _drafts(self, n_drafts: int, noise: RoundNoise | None) -> Iterator[Draft]:
        """The modules' drafts, greedy without random numbers; they end when no row is confident
        enough."""
        product_B: Tensor | None = None
        for k in range(1, n_drafts + 1):
            logits_BV, confidence_B = self.session.draft(k)
            confident_B = None
            if self.min_confidence:
                if confidence_B is None:
                    confidence_B = top_probability(logits_BV)
                product_B = confidence_B if product_B is None else product_B * confidence_B
                confident_B = product_B >= self.min_confidence
                if not bool(confident_B.any()):
                    return
            if noise is None:
                yield Draft(logits_BV.argmax(dim=-1), None, confident_B)
            else:
                q_BN = self._sampling.probabilities(logits_BV)
                token_B = draw(q_BN, noise.draft_BM[:, k - 1])
                yield Draft(token_B, q_BN, confident_B)

    def _with_looked_up(
        self, drafts: Iterator[Draft], looked_up: Sequence[Sequence[int]], caps: list[int]
    ) -> Iterator[Draft]:
        """The modules' drafts, in which looked-up drafts replace those of the rows that have some;
        then the rest of the looked-up drafts. Lowers the caps of the other rows to the number of
        drafts that the modules made.

        The modules read looked-up drafts like their own, so their caches stay true.
        """
        most = max(map(len, looked_up))
        # After a row's own drafts any token will do: it is not accepted.
        padded = [[*ids, *[0] * (most - len(ids))] if ids else [-1] * most for ids in looked_up]
        ids_BM = torch.tensor(padded, device=self.session.tokens_BS.device)
        k = 0
        for k, (token_B, q_BN, confident_B) in enumerate(drafts, start=1):
            ids_B = ids_BM[:, min(k, most) - 1]
            token_B = torch.where(ids_B < 0, token_B, ids_B)
            if q_BN is not None:
                q_BV = F.pad(q_BN, (0, self._vocab - q_BN.shape[1]))
                q_BN = torch.where(ids_B.unsqueeze(1) < 0, q_BV, certain(token_B, self._vocab))
            yield Draft(token_B, q_BN, None if confident_B is None else confident_B | (ids_B >= 0))
        caps[:] = [cap if ids else min(cap, k) for cap, ids in zip(caps, looked_up, strict=True)]
        for ids_B in ids_BM.unbind(1)[k:]:
            yield Draft(ids_B.clamp(min=0))

    def _greedy(self, drafts: Iterator[Draft], caps: Sequence[int]) -> Round:
        session, columns = self.session, []
        for k, (token_B, *_) in enumerate(drafts, start=1):
            columns.append(token_B.unsqueeze(1))
            session.put(columns[-1], k)
        n_drafts = len(columns)
        logits_BTV = session.verify(n_drafts)
        choice_BT = logits_BTV.argmax(dim=-1)
        # Up to the first mismatch the choices equal the drafts, and the next choice is the new
        # pending token: write them all before counting how many are accepted.
        session.put(choice_BT, 1)
        # The round's only device-to-host synchronization.
        host = torch.cat((*columns, choice_BT), dim=1).tolist()
        rows = []
        for row, cap in zip(host, caps, strict=True):
            draft, choice = row[: min(n_drafts, cap)], row[n_drafts:]
            a = 0
            while a < len(draft) and draft[a] == choice[a]:
                a += 1
            rows.append(RowResult.of_chain(choice[: a + 1], a, draft))
        return Round(rows, logits_BTV)

    def _sample(self, drafts: Iterator[Draft], caps: Sequence[int], noise: RoundNoise) -> Round:
        session = self.session
        columns, proposals, limits = [], [], []
        for k, (token_B, q_BN, confident_B) in enumerate(drafts, start=1):
            columns.append(token_B.unsqueeze(1))
            proposals.append(certain(token_B, self._vocab) if q_BN is None else q_BN)
            session.put(columns[-1], k)
            if confident_B is not None:
                limits.append(torch.where(confident_B, self._most_drafts, k - 1))
        n_drafts = len(columns)
        # Only now: looked-up drafts lower the caps while they are made.
        limit_B = torch.tensor(caps, device=noise.final_B.device).clamp(max=n_drafts)
        for confident_limit_B in limits:
            limit_B = limit_B.minimum(confident_limit_B)
        logits_BTV = session.verify(n_drafts)
        p_BTV = self._sampling.probabilities(logits_BTV)
        if not n_drafts:
            tokens_B1 = draw(p_BTV, noise.final_B.unsqueeze(1))
            session.put(tokens_B1, 1)
            return Round([RowResult.of_chain(row, 0, []) for row in tokens_B1.tolist()], logits_BTV)
        draft_BM = torch.cat(columns, dim=1)
        q_BMN = torch.stack(proposals, dim=1)
        accept_BM = noise.accept_BM[:, :n_drafts]
        tokens_BT, accepted_B = self._rule(
            p_BTV, q_BMN, draft_BM, accept_BM, noise.final_B, limit_B
        )
        session.put(tokens_BT, 1)
        counts_B2 = torch.stack((accepted_B, limit_B), dim=1)
        host = torch.cat((counts_B2, draft_BM, tokens_BT), dim=1).tolist()
        rows = []
        for accepted, limit, *row in host:
            draft, tokens = row[:limit], row[n_drafts:]
            rows.append(RowResult.of_chain(tokens[: accepted + 1], accepted, draft))
        return Round(rows, logits_BTV)


def top_probability(logits_BV: Tensor) -> Tensor:
    """The probability [B] of the likeliest token of each row."""
    logits_BV = logits_BV.float()
    return (logits_BV.amax(dim=-1) - logits_BV.logsumexp(dim=-1)).exp()
