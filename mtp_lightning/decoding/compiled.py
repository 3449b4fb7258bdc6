"""The passes of decoding as compiled programs (``torch.compile``), for one prompt at a time.

A pass of a small model is hundreds of small operators, and calling them takes most of its time.
Compiled, it is one call. The programs have static shapes: a pass of the trunk is as wide as the
drafts asked for, one of a module as wide as a round can leave behind, and attention reads the whole
capacity; a program is made at the first pass that needs it, which takes about ten seconds.

A verify pass and a single pass are different programs, which may round differently: texts can part
from plain decoding where two tokens' logits agree to about 1e-5.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.decoding.session import Session
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import BranchPoint
from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.kernels.matmul import packed_weights
from mtp_lightning.nn.kv_cache import KVCache
from mtp_lightning.nn.static_cache import StaticCache

# Prompts and texts of many lengths share a program: capacities are multiples of this.
_CAPACITY = 256
# Programs are kept for every model, width and capacity of the process.
_PROGRAMS = 256
_COMPILERS = ("c++", "g++", "clang++", "cl")


def require_compiler(model: MTPModel) -> None:
    """Make sure that programs can be built.

    Raises:
        UserError: there is no C++ compiler, which a CPU's programs need.
    """
    if model.head.weight.device.type != "cpu":
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS)):
        raise UserError(
            "compile=true needs a C++ compiler, and none is on the PATH: install g++ or clang++, "
            "or decode with compile=false."
        )


@contextmanager
def compiled_decoding(model: MTPModel) -> Iterator[None]:
    """How passes of a :class:`CompiledSession` run."""
    limits = {"recompile_limit": _PROGRAMS, "accumulated_recompile_limit": _PROGRAMS}
    # The prompt's pass, and the modules' first, are not compiled: they are wide.
    with torch.inference_mode(), packed_weights(model), torch._dynamo.config.patch(limits):
        yield


def _positions(
    model: MTPModel, start_B: Tensor, width: int, tables: Sequence[Tensor], entries: list[Tensor]
) -> Positions:
    positions_BT = start_B.unsqueeze(1) + torch.arange(width, device=start_B.device)
    trunk = model.config.trunk
    cache = StaticCache(entries, positions_BT, trunk.attention.cache_entry(trunk))
    cos, sin = tables
    return Positions(cos[positions_BT], sin[positions_BT], cache=cache)


def _trunk_pass(
    model: MTPModel,
    tokens_BT: Tensor,
    start_B: Tensor,
    tables: Sequence[Tensor],
    entries: list[Tensor],
    *,
    drafts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, T, V], and what the stack starts from [B, T, C] if it drafts."""
    positions = _positions(model, start_B, tokens_BT.shape[1], tables, entries)
    output = model.trunk(model.trunk.embedding(tokens_BT), positions)
    branch = model.mtp.branch(model.trunk, output) if drafts else None
    return model.head(model.mtp.main_state(output.final)), branch


def _depth_pass(
    model: MTPModel,
    k: int,
    tokens_BS: Tensor,
    branch_BTC: Tensor,
    previous_BTC: Tensor,
    start_B: Tensor,
    last_B: Tensor,
    tables: Sequence[Tensor],
    entries: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [B, V] of the position ``last_B`` of the pass, the hidden states [B, T, C], and how
    sure the depth is [B]; ``tokens_BS`` are those that it reads."""
    at = BranchPoint(
        hidden=branch_BTC,
        tokens=tokens_BS,
        embedded=model.trunk.embedding(tokens_BS),
        positions=_positions(model, start_B, branch_BTC.shape[1], tables, entries),
        first=model.mtp.first_token(k),
        head=model.head,
    )
    hidden = model.mtp.depth_state(k, at, previous_BTC)
    last_B1C = hidden.index_select(1, last_B)
    sure_B = None
    if model.mtp.confidence is not None:
        sure_B = model.mtp.confidence(k, last_B1C[:, 0]).sigmoid()
    return model.head(last_B1C)[:, 0], hidden, sure_B


# The wrapper around the kernels in C++, too: it is half of the time.
_OPTIONS: dict[str, Any] = {"cpp_wrapper": True}
_trunk_program = torch.compile(_trunk_pass, fullgraph=True, dynamic=False, options=_OPTIONS)
_depth_program = torch.compile(_depth_pass, fullgraph=True, dynamic=False, options=_OPTIONS)


class CompiledSession(Session):
    """A :class:`Session` of one row whose narrow passes are compiled."""

    def __init__(
        self, model: MTPModel, prompts: Sequence[Sequence[int]], *, capacity: int, max_draft: int
    ) -> None:
        assert len(prompts) == 1
        slack = max_draft + 1
        capacity = -(-(capacity + slack) // _CAPACITY) * _CAPACITY - slack
        super().__init__(model, prompts, capacity=capacity, max_draft=max_draft)
        tables = self.trunk_cache.tables
        # Tensors of their own: views of one another would be programs of their own.
        self._tables = (tables.cos_S1H.clone(), tables.sin_S1H.clone())
        self._width = max_draft + 1

    def verify(self, n_drafts: int) -> Tensor:
        n, width = self.n[0], n_drafts + 1
        cache = self.trunk_cache
        logits, branch = _trunk_program(
            self.model,
            self.tokens_BS.narrow(1, n, width).clone(),
            self._at(n),
            self._tables,
            cache.entries_L_BSMH,
            drafts=self.max_draft > 0,
        )
        cache.lengths = [n + width]
        if branch is not None:
            self._write(self.states[0], [n], branch)
        return logits

    def draft(self, k: int) -> Tensor:
        end = max(self.n[0], 1)
        held = min(self.filled[k][0], end - 1)
        if end - held > self._width:
            return super().draft(k)  # catching up with the prompt
        start = max(end - self._width, 0)
        cache: KVCache = self.depth_caches[k - 1]
        branch = self.states[0].narrow(1, start, self._width).clone()
        first = self.model.mtp.first_token(k)
        logits, hidden, self.confidence_B = _depth_program(
            self.model,
            k,
            self.tokens_BS.narrow(1, start + first, self._width + k - first).clone(),
            branch,
            branch if k == 1 else self.states[k - 1].narrow(1, start, self._width).clone(),
            self._at(start),
            self._at(end - 1 - start),
            self._tables,
            cache.entries_L_BSMH,
        )
        cache.lengths = [start + self._width]
        if k < self.max_draft:
            self._write(self.states[k], [start], hidden)
        self.filled[k] = [max(0, self.n[0] - k + 1)]
        return logits

    def _at(self, position: int) -> Tensor:
        return torch.tensor([position], device=self.tokens_BS.device)
