"""Hidden states and predictions of every head, computed from the definitions in float64.

Shapes: B windows, T positions, C d_model, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.inner_states import default_layers
from mtp_lightning.mtp.sequential import draw_dropped, draw_states_back
from tests.reference import rms_norm


def log_prob_of(log_probs: Tensor, token: Tensor) -> Tensor:
    """The log-probability of a token [..]."""
    return log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def rotated(x: Tensor, places: Tensor, theta: float) -> Tensor:
    """The rotary embedding of [.., T, N, H] at the positions [T], which pairs j with j + H/2."""
    half = x.shape[-1] // 2
    angle = places.double().view(-1, 1, 1) * theta ** (-torch.arange(half).double() / half)
    a, b = x.split(half, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Forward:
    """The model's hidden states.

    Attributes:
        final: h [B, T, C].
        states: depth -> [B, T, C], of depths that predict a token.
        consistency: the consistency loss of ``masked``; None for other heads.
        embedding, head: [V, C].
    """

    def __init__(self, model: MTPModel, batch: WindowBatch, key: RandomKey) -> None:
        self.w, self.c, self.mtp = dict(model.named_parameters()), model.config.trunk, model.mtp
        self.config: Any = model.config.mtp
        self.batch, self.key, self.seq_len = batch, key, batch.seq_len
        self.consistency: Tensor | None = None
        # [T, 1]: the positions of a pass that use the updates of linear layers; None if none do.
        self.gate: Tensor | None = None
        self.embedding = self.w["trunk.embedding.weight"]
        self.head = self.w.get("head.weight", self.embedding)
        tokens = batch.tokens[:, : self.seq_len]
        if self.config.variant == "teacherless":
            assert batch.scored is not None
            tokens = tokens.masked_fill(batch.scored[:, : self.seq_len], 0)
        self.places = torch.arange(self.seq_len)
        self.sees = (self.places <= self.places.unsqueeze(1)).expand(len(batch), -1, -1)
        if batch.documents is not None:
            ids = batch.documents[:, : self.seq_len]
            self.sees = self.sees & (ids.unsqueeze(1) == ids.unsqueeze(2))
        before_last, last = self.trunk(self.embedding[tokens], self.places, self.sees)
        self.final = self.norm(last, "trunk.norm")
        self.branch = last if self.config.branch == "final" else before_last
        if self.config.input_norm == "post":
            self.branch = self.norm(self.branch, "trunk.norm")
        if self.config.detach != "none":
            self.branch = self.branch.detach()
        self.states = HEADS[self.config.variant](self)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.w[f"{name}.weight"], self.c.norm_eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        if self.gate is None:
            return y
        *_, layer, _, last = name.split(".")
        down, up = (self.w[f"mtp.updates.{layer}.{last}.{part}.weight"] for part in ("down", "up"))
        return torch.where(self.gate, y + x @ down.T @ up.T, y)

    def read(self, k: int) -> Tensor:
        """The embeddings of the tokens k positions ahead."""
        embedded = self.embedding[self.batch.tokens[:, k : self.seq_len + k]]
        return embedded.detach() if self.config.detach == "all" else embedded

    def trunk(self, x: Tensor, places: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the last block and after it."""
        before_last, self.after = x, [x]
        for layer in range(self.c.n_layers):
            before_last, x = x, self.block(x, f"trunk.blocks.{layer}", places, sees)
            self.after.append(x)
        return before_last, x

    def block(self, x: Tensor, name: str, places: Tensor, sees: Tensor) -> Tensor:
        normed = self.norm(x, f"{name}.attention_norm")
        x = x + self.attention(normed, f"{name}.attention", places, sees)
        normed = self.norm(x, f"{name}.feed_forward_norm")
        gate, up = self.linear(normed, f"{name}.feed_forward.gate_up").split(self.c.d_ff, dim=-1)
        return x + self.linear(F.silu(gate) * up, f"{name}.feed_forward.down")

    def attention(self, x: Tensor, name: str, places: Tensor, sees: Tensor) -> Tensor:
        """Attention over [.., T, C]; ``sees`` [.., T, T] is True where a query attends to a key."""
        n, m, size = self.c.n_heads, self.c.n_kv_heads, self.c.d_head
        assert size is not None
        qkv = self.linear(x, f"{name}.qkv").unflatten(-1, (-1, size))
        q, k, v = qkv.split([n, m, m], dim=-2)
        q, k = (rotated(part, places, self.c.rope_theta) for part in (q, k))
        k, v = (part.repeat_interleave(n // m, dim=-2) for part in (k, v))
        scores = torch.einsum("...qnh,...knh->...nqk", q, k) / math.sqrt(size)
        shares = scores.masked_fill(~sees.unsqueeze(-3), -math.inf).softmax(-1)
        mixed = torch.einsum("...nqk,...knh->...qnh", shares, v)
        return self.linear(mixed.flatten(-2), f"{name}.out")

    def sequential(self) -> dict[int, Tensor]:
        config, history = self.config, [self.branch]
        for k in range(1, config.depth + 1):
            p, tokens, previous = (
                f"mtp.depths.{0 if config.share_layers else k - 1}",
                *self.drawn(k, history),
            )
            halves = [self.norm(tokens, f"{p}.enorm"), self.norm(previous, f"{p}.hnorm")]
            if config.concat == "hidden_first":
                halves.reverse()
            x = self.linear(torch.cat(halves, -1), f"{p}.eh_proj")
            for block in [*(f"before.{n}" for n in range(config.blocks - 1)), "block"]:
                x = self.block(x, f"{p}.{block}", self.places, self.sees)
            history.append(self.norm(x, f"{p}.norm"))
        return dict(enumerate(history[1:], start=1))

    def drawn(self, k: int, history: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The token inputs and the hidden states that a module reads in training."""
        tokens, previous, size = self.read(k), history[-1], (len(self.batch), self.seq_len)
        if self.config.token_dropout:
            dropped = draw_dropped(k, self.config.token_dropout, *size, self.key)
            tokens = torch.where(dropped.unsqueeze(-1), self.w["mtp.blank"], tokens)
        if self.config.hidden_state_mixing and k > 1:
            back = draw_states_back(k, *size, self.key)
            rows = torch.arange(size[0]).unsqueeze(1)
            previous = torch.stack(list(history))[k - 1 - back, rows, self.places + back]
        return tokens, previous

    def parallel(self) -> dict[int, Tensor]:
        states = {}
        for k in range(1, self.config.depth + 1):
            p = f"mtp.depths.{k - 1}"
            x = self.block(self.branch, f"{p}.block", self.places, self.sees)
            states[k] = self.norm(x, f"{p}.norm") + self.correction(k)
        return states

    def medusa(self) -> dict[int, Tensor]:
        if self.config.rank > 1:
            return {}
        return {
            k: self.branch + F.silu(self.linear(self.branch, f"mtp.depths.{k - 1}"))
            + self.correction(k)
            for k in range(1, self.config.depth + 1)
        }  # fmt: skip

    def correction(self, k: int, table: int | None = None) -> Tensor:
        """``table`` is the index of the correction's weights; None for one per depth."""
        index, kind = k - 1 if table is None else table, self.config.correction
        p = f"mtp.corrections.{index}"
        if kind in ("none", "selector"):  # a selector changes drafts and no state
            return torch.zeros(())
        if kind == "mlp":
            parts = [self.branch, *(self.read(j) for j in range(1, k + 1))]
            inner = F.silu(self.linear(torch.cat(parts, -1), f"{p}.up"))
        else:
            table = self.w[f"{p}.embedding.weight"]
            inner = table[self.batch.tokens[:, k : self.seq_len + k]]
        return self.linear(inner, f"{p}.down")

    def joint(self) -> dict[int, Tensor]:
        j = torch.arange(self.config.depth + 1)
        places = [self.w["mtp.gamma"] * self.branch + self.read(int(k)) for k in j]
        x = self.norm(torch.stack(places, 2), "mtp.norm")
        mixed = self.attention(x, "mtp.attention", j, (j <= j.unsqueeze(1)).expand(1, 1, -1, -1))
        return {k: self.branch + mixed[:, :, k] for k in range(1, self.config.depth + 1)}

    def nextlat(self) -> dict[int, Tensor]:
        states, g, p = {}, self.branch, "mtp.depths.0"
        for k in range(1, self.config.depth + 1):
            x = torch.cat((g, self.read(k)), -1)
            gain, shift = self.w[f"{p}.norm.weight"], self.w[f"{p}.norm.bias"]
            x = F.layer_norm(x, x.shape[-1:], gain, shift, self.c.norm_eps)
            x = F.gelu(self.linear(x, f"{p}.first"))
            g = g + self.linear(F.gelu(self.linear(x, f"{p}.second")), f"{p}.last")
            states[k] = g
        return states

    def eagle(self) -> dict[int, Tensor]:
        """One query at a time, over the keys that the cache has when its token is drafted."""
        p, n, m = "mtp.depths.0", self.c.n_heads, self.c.n_kv_heads
        layers, size = self.config.layers or default_layers(self.c.n_layers), self.c.d_head
        read = torch.cat([self.after[layer] for layer in layers], -1)
        g = self.linear(read if self.config.detach == "none" else read.detach(), f"{p}.fuse")
        states, keys, values = {}, [], []
        for k in range(1, self.config.depth + 1):
            halves = self.norm(self.read(k), f"{p}.token_norm"), self.norm(g, f"{p}.hidden_norm")
            qkv = self.linear(torch.cat(halves, -1), f"{p}.attention.qkv").unflatten(-1, (-1, size))
            q, key, value = qkv.split([n, m, m], dim=-2)
            q, key = (rotated(part, self.places + k - 1, self.c.rope_theta) for part in (q, key))
            keys.append(key.repeat_interleave(n // m, dim=-2))
            values.append(value.repeat_interleave(n // m, dim=-2))
            mixed = torch.zeros_like(q)
            for b, t in itertools.product(range(len(self.batch)), range(self.seq_len)):
                seen, steps = self.sees[b, t], range(1, k)
                keys_SNH, values_SNH = (
                    torch.cat([entries[0][b, seen], *(entries[i][b, t : t + 1] for i in steps)])
                    for entries in (keys, values)
                )
                shares = ((keys_SNH * q[b, t]).sum(-1) / math.sqrt(size)).softmax(0)
                mixed[b, t] = (shares.unsqueeze(-1) * values_SNH).sum(0)
            g = g + self.linear(mixed.flatten(-2), f"{p}.attention.out")
            normed = self.norm(g, f"{p}.feed_forward_norm")
            gate, up = self.linear(normed, f"{p}.feed_forward.gate_up").chunk(2, dim=-1)
            g = g + self.linear(F.silu(gate) * up, f"{p}.feed_forward.down")
            states[k] = self.norm(g, f"{p}.norm")
        return states

    def dflash(self) -> dict[int, Tensor]:
        """One window and one position at a time: a block reads the text up to it and itself."""
        depth, n, m, size = self.config.depth, self.c.n_heads, self.c.n_kv_heads, self.c.d_head
        layers = self.config.layers or default_layers(self.c.n_layers)
        read = torch.cat([self.after[layer] for layer in layers], -1)
        read = self.linear(read if self.config.detach == "none" else read.detach(), "mtp.fuse")
        text, first = self.norm(read, "mtp.text_norm"), self.read(1)

        def entry(x: Tensor, p: str, places: Tensor) -> tuple[Tensor, Tensor]:
            heads = self.linear(x, f"{p}.key_value").unflatten(-1, (-1, size))
            key, value = heads.split([m, m], dim=-2)
            key = rotated(self.norm(key, f"{p}.key_norm"), places, self.c.rope_theta)
            return key.repeat_interleave(n // m, dim=-2), value.repeat_interleave(n // m, dim=-2)

        def block(b: int, t: int) -> Tensor:
            y = torch.cat([first[b, t : t + 1], self.w["mtp.mask"].expand(depth, -1)])
            places = torch.arange(t + 1, t + depth + 2)
            for layer in range(self.config.blocks):
                p = f"mtp.layers.{layer}"
                x = self.norm(y, f"{p}.attention_norm")
                q = self.linear(x, f"{p}.attention.query").unflatten(-1, (-1, size))
                q = self.norm(q, f"{p}.attention.query_norm")
                q = rotated(q, places, self.c.rope_theta)
                seen = self.sees[b, t]
                entries = (
                    entry(text[b, seen], f"{p}.attention", self.places[seen]),
                    entry(x, f"{p}.attention", places),
                )
                k, v = (torch.cat(part) for part in zip(*entries, strict=True))
                shares = (torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(size)).softmax(-1)
                mixed = torch.einsum("nqk,knh->qnh", shares, v).flatten(-2)
                y = y + self.linear(mixed, f"{p}.attention.out")
                normed = self.norm(y, f"{p}.feed_forward_norm")
                gate, up = self.linear(normed, f"{p}.feed_forward.gate_up").chunk(2, dim=-1)
                y = y + self.linear(F.silu(gate) * up, f"{p}.feed_forward.down")
            return self.norm(y, "mtp.norm")

        windows = [
            torch.stack([block(b, t) for t in range(self.seq_len)]) for b in range(len(self.batch))
        ]
        states = torch.stack(windows)
        return {k: states[:, :, k] + self.correction(k, table=0) for k in range(1, depth + 1)}

    def registers(self) -> dict[int, Tensor]:
        """Registers come after the tokens; each attends to its token, earlier ones and itself."""
        tokens = self.embedding[self.batch.tokens[:, : self.seq_len]]
        both = torch.cat((tokens, self.w["mtp.register"].expand_as(tokens)), 1)
        places = torch.cat((self.places, self.places + self.mtp.offset(self.key) - 1))
        none, itself = torch.zeros_like(self.sees), torch.eye(self.seq_len).bool()
        itself = itself.expand_as(self.sees)
        sees = torch.cat((torch.cat((self.sees, none), 2), torch.cat((self.sees, itself), 2)), 1)
        _, last = self.trunk(both, places, sees)
        return {1: self.norm(last[:, self.seq_len :], "trunk.norm")}

    def masked(self) -> dict[int, Tensor]:
        """One token at a time: the trunk reads the text up to it and the masks."""
        depth, size = self.config.depth, len(self.batch)
        tokens = self.embedding[self.batch.tokens[:, : self.seq_len]]
        states, gaps = [], [[] for _ in range(size)]
        for t in range(self.seq_len):
            n = t + 1
            masks = self.w["mtp.masks"].expand(size, -1, -1)
            sees = torch.zeros(size, n + depth, n + depth, dtype=torch.bool)
            sees[:, :n, :n] = self.sees[:, :n, :n]
            sees[:, n:, :n] = self.sees[:, t : t + 1, :n]
            sees[:, n:, n:] = torch.ones(depth, depth).tril()
            places = torch.arange(n + depth)
            self.gate = (places > t).unsqueeze(-1)
            _, last = self.trunk(torch.cat((tokens[:, :n], masks), 1), places, sees)
            self.gate = None
            states.append(self.norm(last, "trunk.norm")[:, n:])
            for b, k in itertools.product(range(size), range(1, depth + 1)):
                if t + k < self.seq_len and self.sees[b, t + k, t]:
                    gap = states[-1][b, k - 1] - self.final[b, t + k].detach()
                    gaps[b].append((k, (gap * gap).mean()))
        total = torch.zeros((), dtype=torch.float64)
        for of_window in gaps:
            for k in {k for k, _ in of_window}:
                total = total + torch.stack([gap for i, gap in of_window if i == k]).mean()
        self.consistency = self.config.consistency * total / (depth * size)
        sampled = {}
        for k in range(1, depth + 1):
            z = torch.stack([state[:, k - 1] for state in states], 1)
            both = torch.cat((z, self.norm(self.read(k), "mtp.sampler.norm")), -1)
            inner = F.silu(self.linear(both, "mtp.sampler.up"))
            sampled[k] = z + self.linear(inner, "mtp.sampler.down")
        return sampled

    def log_probs(self, *, train_head: bool) -> dict[int, Tensor]:
        """Depth -> log q [B, T, V]; 0 is the main prediction."""
        if self.config.rank > 1:
            return self.of_components()
        trained = train_head and self.config.detach != "all"
        head = self.head if trained else self.head.detach()
        if self.mtp.own_head is not None:
            head = self.w["mtp.depths.0.head.weight"]
        depths = {
            k: self.over_all(torch.log_softmax(h @ head.T, -1)) for k, h in self.states.items()
        }
        return {0: torch.log_softmax(self.final @ self.head.T, -1), **depths}

    def over_all(self, log_q: Tensor) -> Tensor:
        """Log q over all tokens; a token without a row in the stack's head has probability 0."""
        if self.mtp.own_head is None:
            return log_q
        wide = log_q.new_full((*log_q.shape[:-1], self.c.vocab_size), -math.inf)
        wide[..., self.mtp.own_head.tokens] = log_q
        return wide

    def of_components(self) -> dict[int, Tensor]:
        """Log q of a mixture, whose weights are the probabilities that the components gave to the
        tokens before."""
        h, depths = self.final, {}
        log_w = torch.log_softmax(self.linear(h, "mtp.weigh"), -1)
        for k in range(self.config.depth + 1):
            names = [f"mtp.depths.{k - 1}.{a}" for a in range(self.config.rank)]
            if k == 0:
                names = [f"mtp.next.{a}" for a in range(self.config.rank - 1)]
            moved = [h + F.silu(self.linear(h, name)) for name in names]
            parts = torch.stack(moved if k else [h, *moved], 2)
            log_p = torch.log_softmax(parts @ self.head.T, -1)
            depths[k] = (log_w.unsqueeze(-1) + log_p).logsumexp(2)
            token = self.batch.tokens[:, k + 1 : self.seq_len + k + 1, None]
            if k < self.config.depth:
                token = token.expand(-1, -1, self.config.rank)
                log_w = torch.log_softmax(log_w + log_prob_of(log_p, token), -1)
        return depths


HEADS: dict[str, Callable[[Forward], dict[int, Tensor]]] = {
    "none": lambda forward: {},
    "teacherless": lambda forward: {},
    "parameter_free": lambda forward: dict.fromkeys(
        range(1, forward.config.depth + 1), forward.final
    ),
    "sequential": Forward.sequential,
    "parallel": Forward.parallel,
    "linear": Forward.medusa,
    "joint": Forward.joint,
    "nextlat": Forward.nextlat,
    "eagle": Forward.eagle,
    "dflash": Forward.dflash,
    "registers": Forward.registers,
    "masked": Forward.masked,
    "top": lambda forward: {},  # these two have no token predictions
    "bag": lambda forward: {},
}
