"""The rows of decoding (token buffer, the trunk's cache and states), and the trunk's passes over
them.

A row that has read ``n`` tokens has trunk states at positions 0 .. n - 1 and one pending token at
position n, chosen but not yet read. Its drafts follow in the same buffer.

Shapes: B rows, T new positions, S capacity, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.fused import fused
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.batch_invariant import MAX_VERIFY_WIDTH, batch_invariant_pass, passes_over
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.position_tables import PositionTables, Spans


class TrunkSession:
    """Decoding state of a batch whose rows come and go. It does not choose tokens.

    Args:
        model: in eval mode.
        slots: most rows at a time.
        capacity: most tokens per row, drafts included; :meth:`reserve` can raise it.
    """

    _kind_of_cache: type[KVCache] = KVCache
    # Whether the trunk's passes store the states that drafts start from, as the first of `states`.
    _keeps_branch = False

    def __init__(self, model: MTPModel, *, slots: int, capacity: int) -> None:
        self.model = model
        # For each depth and row, the number of entries that are known to be those of the text.
        self.filled: list[list[int]] = [[]]
        self._tables = self._tables_for(capacity)
        device = model.head.weight.device
        self._tokens = torch.zeros(slots, self._tables.capacity, dtype=torch.int64, device=device)
        self.trunk_cache = self._new_cache(model.config.trunk.n_layers, slots)
        self.depth_caches: Sequence[KVCache] = ()
        # Hidden states of depth k, which depth k + 1 reads; those of depth 0 are the branch states.
        self._states: list[Tensor] = []
        self._fused = fused(model)
        self._fused_trunk = None if self._fused is None else self._fused.trunk
        self.resize(0)

    @property
    def n_read(self) -> list[int]:
        """For each row, the number of tokens that the trunk has read."""
        return self.filled[0]

    @property
    def _caches(self) -> list[KVCache]:
        return [self.trunk_cache, *self.depth_caches]

    def _new_cache(self, n_layers: int, slots: int) -> KVCache:
        config = self.model.config.trunk
        return self._kind_of_cache(config, self._tables, batch_size=slots, n_layers=n_layers)

    def _tables_for(self, capacity: int) -> PositionTables:
        weight = self.model.trunk.embedding.weight
        config, size = self.model.config.trunk, capacity + self._slack
        return PositionTables(config, size, device=weight.device, dtype=weight.dtype)

    @property
    def _widest(self) -> int:
        """The number of tokens in a round's widest pass."""
        return 1

    @property
    def _slack(self) -> int:
        """Positions beyond a row's capacity: a pass over rows of different lengths is as wide as
        its widest row, so that shorter rows overshoot; so do the tokens that it reads."""
        return 2 * self._widest

    def resize(self, batch_size: int) -> None:
        """Use the first ``batch_size`` rows of the storage; added rows have read nothing."""
        for column in self.filled:
            column[:] = (column + [0] * batch_size)[:batch_size]
        for cache in self._caches:
            cache.resize(batch_size)
        self.tokens_BS = self._tokens[:batch_size]  # int64 ids: read, pending and drafted
        self.states = [states[:batch_size] for states in self._states]

    def reserve(self, capacity: int) -> None:
        """Grow the storage to ``capacity`` tokens per row, drafts included."""
        if capacity <= self._tables.capacity - self._slack:
            return
        tables = self._tables_for(capacity)
        more = tables.capacity - self._tables.capacity
        caches = [cache.grown(tables) for cache in self._caches]
        tokens = F.pad(self._tokens, (0, more))
        states = [F.pad(states, (0, 0, 0, more)) for states in self._states]
        # Only now: an allocation that fails leaves all as it was.
        self._tables, self._tokens, self._states = tables, tokens, states
        self.trunk_cache, *self.depth_caches = caches
        self.resize(len(self.n_read))

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append rows and read their prompts (prefill), at least one token each. Returns the logits
        of the next token of every new row, [new rows, V]."""
        lengths = [len(prompt) for prompt in prompts]
        rows = slice(len(self.n_read), len(self.n_read) + len(prompts))
        self.resize(rows.stop)
        for row, prompt in enumerate(prompts, start=rows.start):
            self._tokens[row, len(prompt) :] = 0  # clear the slot's former tokens
            self._tokens[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64)
        newest = []
        wide_alone = not self.model.config.trunk.same_bits_in_wide_passes
        for part in passes_over(lengths, self.tokens_BS.device, wide_alone=wide_alone):
            slots = slice(rows.start + part.start, rows.start + part.stop)
            hidden = self._read_from_start(slots, lengths[part])
            newest.append(at(hidden, [length - 1 for length in lengths[part]]))
        return self._logits(torch.cat(newest))[:, 0]

    def _read_from_start(self, rows: slice, lengths: list[int]) -> Tensor:
        """Let the trunk read the first ``lengths`` tokens of some rows from position 0; the depths
        catch up when they draft. Returns the trunk's states, [rows, T, C]."""
        starts, width = [0] * len(lengths), max(lengths)
        ctx = ForwardContext.of_cache(self.trunk_cache.rows(rows), starts, width)
        hidden = self._run_trunk(ctx, rows)
        self.n_read[rows] = lengths
        self.trunk_cache.lengths[rows] = lengths
        return hidden

    def verify(self, n_drafts: int) -> Tensor:
        """Read every row's pending token and its drafts, of which :meth:`accept` decides how many
        are kept. Returns logits [B, n_drafts + 1, V]."""
        cache, width = self.trunk_cache, n_drafts + 1
        if self._fused_trunk is not None and width <= MAX_VERIFY_WIDTH:
            cache.open(self.n_read, width)
            branch_states = self.states[0] if self._keeps_branch else None
            return self._fused_trunk(cache, self.tokens_BS, branch_states)
        return self._logits(self._run_trunk(ForwardContext.of_cache(cache, self.n_read, width)))

    def _logits(self, final_BTC: Tensor) -> Tensor:
        """The main prediction's logits [B, T, V] of the trunk's states [B, T, C]."""
        with batch_invariant_pass(final_BTC.shape[1], self.tokens_BS.device):
            return self.model.head(self.model.mtp.main_state(final_BTC))

    def _run_trunk(self, ctx: ForwardContext, rows: slice = slice(None)) -> Tensor:
        """Let the trunk read the tokens of an open pass of some rows. Returns its final states,
        [rows, T, C]."""
        model, spans = self.model, ctx.cache.spans
        # Only the trunk must be batch-invariant: it decides the text, drafts do not.
        with batch_invariant_pass(spans.width, self.tokens_BS.device):
            tokens = spans.read(self.tokens_BS[rows])
            output = model.trunk(model.trunk.embedding(tokens), ctx)
        if self._keeps_branch:
            spans.write(self.states[0][rows], model.mtp.branch(model.trunk, output))
        return output.final

    def accept(self, accepted: Sequence[int]) -> None:
        """Keep the pending token and the first ``accepted`` drafts of every row, one number per
        row."""
        self.filled[0] = [n + a + 1 for n, a in zip(self.n_read, accepted, strict=True)]

    def put_pending(self, token_B: Tensor) -> None:
        """Write the pending tokens of the rows that have just joined."""
        rows = slice(len(self.n_read) - len(token_B), None)
        Spans(self._tables, self.n_read[rows], 1).write(self.tokens_BS[rows], token_B.unsqueeze(1))

    def put(self, tokens_BT: Tensor, offset: int) -> None:
        """Write tokens from ``offset`` positions after every row's pending token on."""
        width, spans = tokens_BT.shape[1], self.trunk_cache.spans
        if spans.width != width or spans.starts != self.n_read:
            spans = Spans(self._tables, self.n_read, width)
        spans.write(self.tokens_BS, tokens_BT, ahead=offset)

    def slide(self, row: int, keep: int) -> None:
        """Restart a row's context from its last ``keep`` tokens, the pending one included.

        The kept tokens are read again from position 0, so the continuation depends only on them.
        """
        n = self.n_read[row]
        assert 1 <= keep <= n
        tokens = self.tokens_BS[row, n + 1 - keep : n + 1].clone()
        self.tokens_BS[row, :keep] = tokens
        for column in self.filled:
            column[row] = 0
        for cache in self._caches:
            cache.lengths[row] = 0
        if keep > 1:
            self._read_from_start(slice(row, row + 1), [keep - 1])

    def drop_row(self, row: int) -> None:
        """Drop a row; the last row moves to its slot."""
        last = len(self.n_read) - 1
        for cache in self._caches:
            cache.drop_row(row)
        if row != last:
            self._tokens[row] = self._tokens[last]
            # Copy as many states as the trunk or the depth has read.
            for states, filled in zip(self._states, self.filled, strict=False):
                states[row, : filled[last]] = states[last, : filled[last]]
        for column in self.filled:
            column[row] = column[last]
        self.resize(last)


def at(states_BTC: Tensor, index: Sequence[int]) -> Tensor:
    """The states [B, 1, C] at one index of each row."""
    index_B11 = torch.tensor(index, device=states_BTC.device).view(-1, 1, 1)
    return states_BTC.gather(1, index_B11.expand(-1, 1, states_BTC.shape[-1]))
