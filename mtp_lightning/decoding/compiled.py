"""The passes of decoding as compiled programs, for one prompt at a time.

A pass of a small model is hundreds of small operators, and launching them takes most of its time.
Compiled, it is one call. The programs have static shapes: a trunk pass is as wide as the number of
drafts plus one, a module's pass covers the most positions that a round can leave it to catch up
with, and attention reads the whole capacity. A program is built by the first pass that needs it,
which takes about ten seconds. On a CPU it is stored for later processes (``programs.py``); on a GPU
every session records it as a CUDA graph (:class:`Recording`).

A verify pass and a pass over one token are different programs, which may round differently: texts
can differ from plain decoding where two tokens' logits agree to about 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.programs import program, require_compiler
from mtp_lightning.decoding.session import DepthDraft, Session
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.components import CacheEntry
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.position_tables import PositionTables

# Prompts and texts of many lengths share a program: capacities are multiples of this.
_CAPACITY = 256
# Devices whose passes are recorded.
_RECORDED = ("cuda",)


class StaticCache:
    """The storage of a :class:`KVCache` as a compiled pass reads it: the positions of the new
    tokens are inputs, not part of the program. Every pass reads the whole capacity with a mask, so
    that one program serves all positions."""

    def __init__(
        self, entries_L_BSMH: Sequence[Tensor], positions_BT: Tensor, entry: CacheEntry
    ) -> None:
        self.entries_L_BSMH = entries_L_BSMH
        self.positions_BT = positions_BT
        self.entry = entry
        batch, capacity = entries_L_BSMH[0].shape[:2]
        device = positions_BT.device
        self._rows_B1 = torch.arange(batch, device=device).unsqueeze(1)
        self._columns_S = torch.arange(capacity, device=device)

    def append(self, layer: int, entry_BTMH: Tensor) -> None:
        """Store one layer's keys and values, with rotary positions applied."""
        entries = self.entries_L_BSMH[layer]
        entries.index_put_((self._rows_B1, self.positions_BT), entry_BTMH.to(entries.dtype))

    def distances(self) -> Tensor:
        """Distance from every stored position to every new token, [B, T, S]; negative if the stored
        position comes later."""
        return self.positions_BT.unsqueeze(-1) - self._columns_S

    def attend(self, layer: int, query_BTNH: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the new queries over all stored positions: [B, T, N, H]. The mask is
        additive, [B, T, S]; None is causal. The formula is written out so that the compiler can
        fuse it."""
        keys, values = self.entry.split(self.entries_L_BSMH[layer].transpose(1, 2))
        batch, seq_len, n_heads, d_head = query_BTNH.shape
        n_kv = keys.shape[1]
        # Queries that share a key head become the rows of one matrix product.
        grouped = query_BTNH.view(batch, seq_len, n_kv, -1, d_head).permute(0, 2, 3, 1, 4)
        rows = grouped.reshape(batch, n_kv, -1, d_head)
        scores = (rows @ keys.transpose(-1, -2)) * d_head**-0.5
        scores = scores.view(*grouped.shape[:-1], -1)
        if mask is None:
            scores = scores.masked_fill((self.distances() < 0)[:, None, None], -torch.inf)
        else:
            scores = scores + mask[:, None, None]
        mixed = scores.softmax(-1).flatten(2, 3) @ values
        mixed = mixed.view(batch, n_kv, -1, seq_len, d_head).permute(0, 3, 1, 2, 4)
        return mixed.reshape(batch, seq_len, n_heads, d_head)


class _Pass(nn.Module):
    """The function that is compiled: a pass of a model over the tensors that it reads."""

    def __init__(self, model: MTPModel) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def _context(
        self, start_B: Tensor, width: int, cos: Tensor, sin: Tensor, entries: Sequence[Tensor]
    ) -> ForwardContext:
        positions_BT = start_B.unsqueeze(1) + torch.arange(width, device=start_B.device)
        trunk = self.model.config.trunk
        entry = trunk.attention.cache_entry(trunk)
        cache = StaticCache(entries, positions_BT, entry) if entries else None
        return ForwardContext(cos[positions_BT], sin[positions_BT], cache=cache)


class _TrunkPass(_Pass):
    """Returns the logits [B, T, V] and, if ``drafts``, the branch state [B, T, C]."""

    def __init__(self, model: MTPModel, *, drafts: bool) -> None:
        super().__init__(model)
        self.drafts = drafts

    def extra_repr(self) -> str:
        return f"drafts={self.drafts}"

    def forward(
        self, tokens_BT: Tensor, start_B: Tensor, cos: Tensor, sin: Tensor, *entries: Tensor
    ) -> tuple[Tensor, ...]:
        model = self.model
        ctx = self._context(start_B, tokens_BT.shape[1], cos, sin, entries)
        output = model.trunk(model.trunk.embedding(tokens_BT), ctx)
        logits = model.head(model.mtp.main_state(output.final))
        return (logits, model.mtp.branch(model.trunk, output)) if self.drafts else (logits,)


class _DepthPass(_Pass):
    """Returns the logits [B, V] at index ``last_B`` of the pass, the hidden states [B, T, C] and,
    for a stack with ``confidence``, the estimated probability of acceptance [B]."""

    def __init__(self, model: MTPModel, k: int) -> None:
        super().__init__(model)
        self.k = k

    def extra_repr(self) -> str:
        return f"depth {self.k}"

    def forward(
        self,
        tokens_BS: Tensor,
        branch_BTC: Tensor,
        previous_BTC: Tensor,
        start_B: Tensor,
        last_B: Tensor,
        cos: Tensor,
        sin: Tensor,
        *entries: Tensor,
    ) -> tuple[Tensor, ...]:
        model, k = self.model, self.k
        ctx = self._context(start_B, branch_BTC.shape[1], cos, sin, entries)
        hidden = model.depth_state(k, branch_BTC, previous_BTC, tokens_BS, ctx)
        last_B1C = model.mtp.head_input(hidden.index_select(1, last_B))
        # The first of the tokens stands ``reads(k).start`` positions ahead.
        before_B1 = tokens_BS.index_select(1, last_B + (k - model.mtp.reads(k).start))
        outputs = model.draft_logits(k, last_B1C, before_B1)[:, 0], hidden
        if model.mtp.confidence is None:
            return outputs
        return *outputs, model.mtp.confidence(k, last_B1C[:, 0]).sigmoid()


def _compiled(
    function: _Pass, arguments: Sequence[Tensor], buffers: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """Compile ``function(*arguments, *buffers)`` into a function of tensors like ``arguments``; it
    reads and writes the buffers (tables, caches) in place."""
    if buffers[0].device.type in _RECORDED:
        require_compiler()
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        with torch.compiler.set_stance("default"):  # see decoding_passes
            return Recording(compiled, arguments, buffers)
    loaded = program(function, (*arguments, *buffers))
    return lambda *arguments: loaded(*arguments, *buffers)


class Recording:
    """A function recorded once as a CUDA graph; a call replays its kernels.

    The kernels of a small model finish before the host has launched the next one. A graph reads and
    writes the memory addresses of its recording: caches and tables stay there, and each call copies
    its other inputs, a few tokens and states, to where the graph reads them.

    Args:
        function: of tensors of these shapes; it must not read a value on the host.
        arguments: the first inputs, which every call copies to the graph's memory.
        buffers: the other inputs, which the graph reads and writes in place.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        arguments: Sequence[Tensor],
        buffers: Sequence[Tensor],
    ) -> None:
        self._arguments = [x.clone() for x in arguments]
        # Kept alive for as long as the graph, which points to their memory.
        inputs = self._inputs = (*self._arguments, *buffers)
        function(*inputs)  # compiles and loads the kernels, which a recording cannot do
        self._replay, self._outputs = record(lambda: function(*inputs))

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        for target, value in zip(self._arguments, arguments, strict=True):
            target.copy_(value)
        self._replay()
        # The next call overwrites the outputs.
        return [x.clone() for x in self._outputs]


def record(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Record the kernels that ``function`` launches. Other threads may use the device meanwhile.
    Returns a function that replays the kernels, and their outputs, which are filled by a replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


class CompiledSession(Session):
    """A :class:`Session` of one row whose narrow passes are compiled."""

    _passes: dict[tuple[str, int], Callable[..., Sequence[Tensor]]]
    _built_for: PositionTables | None = None

    def _run(
        self, key: tuple[str, int], build: Callable[[], _Pass], cache: KVCache, *arguments: Tensor
    ) -> Sequence[Tensor]:
        """Run the pass of a key; the first call compiles the result of ``build``."""
        tables = self._tables
        if self._built_for is not tables:  # every pass is built for one storage
            self._passes, self._built_for = {}, tables
        if key not in self._passes:
            buffers = (tables.cos_S1H, tables.sin_S1H, *cache.entries_L_BSMH)
            self._passes[key] = _compiled(build(), arguments, buffers)
        return self._passes[key](*arguments)

    def _tables_for(self, capacity: int) -> PositionTables:
        capacity = -(-(capacity + self._slack) // _CAPACITY) * _CAPACITY - self._slack
        return super()._tables_for(capacity)

    def verify(self, n_drafts: int) -> Tensor:
        n, width = self.n_read[0], n_drafts + 1
        cache = self.trunk_cache
        logits, *branch = self._run(
            ("trunk", width),
            lambda: _TrunkPass(self.model, drafts=self._keeps_branch),
            cache,
            self.tokens_BS.narrow(1, n, width),
            self._scalar(n),
        )
        cache.lengths = [n + width]
        if branch:
            self.states[0].narrow(1, n, width).copy_(branch[0])
        return logits

    def draft(self, k: int) -> DepthDraft:
        self._append_positions(k)
        width = self._widest
        end = max(self.n_read[0], 1)
        filled = min(self.filled[k][0], end - 1)
        if end - filled > width:
            return super().draft(k)  # catching up with the prompt
        start = max(end - width, 0)
        cache = self.depth_caches[k - 1]
        branch = self.states[0].narrow(1, start, width)
        first = self._stack.reads(k).start
        logits, hidden, *confidence = self._run(
            ("depth", k),
            lambda: _DepthPass(self.model, k),
            cache,
            self.tokens_BS.narrow(1, start + first, width + k - first),
            branch,
            branch if k == 1 else self.states[k - 1].narrow(1, start, width),
            self._scalar(start),
            self._scalar(end - 1 - start),
        )
        self._n_drafted = k
        cache.lengths = [start + width]
        if k < self.max_draft:
            self.states[k].narrow(1, start, width).copy_(hidden)
        return DepthDraft(logits, *confidence)

    def _scalar(self, position: int) -> Tensor:
        # torch.tensor would copy from the host, which waits for a GPU.
        return torch.full((1,), position, device=self.tokens_BS.device)
