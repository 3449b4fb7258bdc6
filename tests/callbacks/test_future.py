"""A user's module that reads the future is refused; this project's own read none."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mtp_lightning.callbacks.future import HiddenFuture, require_hidden_future
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.kinds import Chain
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build, windows

DEPTH = 2


@pytest.mark.parametrize(
    "variant",
    [
        *("sequential", "parallel", "linear", "joint", "nextlat", "eagle", "dflash"),
        *("parameter_free", "masked"),
    ],
)
def test_our_own_heads_see_no_future(tiny_trunk: TrunkConfig, variant: str) -> None:
    require_hidden_future(build(tiny_trunk, variant, depth=DEPTH), windows(2, 12, DEPTH))


class Reads(nn.Module):
    """Adds the states ``ahead`` positions later."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, states_BTC: Tensor, *_: object) -> Tensor:
        return states_BTC + states_BTC.roll(-self.ahead, 1)


class Peeks(Chain):
    """A chain whose steps read embeddings that are later than their own."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__(config)
        self.depths = nn.ModuleList(Reads(1) for _ in range(config.depth))

    def step(self, k, previous_BTC, embedded_BTC, ctx):
        return previous_BTC + self.depths[k - 1](embedded_BTC)


def test_a_head_that_reads_the_future_is_refused(tiny_trunk, monkeypatch):
    monkeypatch.setattr(MTPConfig, "_variants", dict(MTPConfig._variants))

    @dataclass(frozen=True, kw_only=True)
    class PeeksConfig(MTPConfig, variant="peeks"):
        def build(self, trunk: TrunkConfig) -> Peeks:
            return Peeks(self)

    model, batch = build(tiny_trunk, PeeksConfig(depth=DEPTH)), windows(2, 12, DEPTH)
    with pytest.raises(UserError, match=r"depth 1 of mtp=peeks at position 4 reads .* position 6"):
        require_hidden_future(model, batch)
    for module in model.mtp.depths:
        module.ahead = 0
    require_hidden_future(model, batch)
    model.train()
    require_hidden_future(model, replace(batch, states=torch.zeros(2, 1, 12, 32)))
    assert all(module.training for module in model.modules())


def test_a_trunk_that_reads_the_future_is_refused(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "linear", depth=DEPTH)
    model.trunk.blocks[-1] = Reads(2)
    with pytest.raises(UserError, match="the trunk at position 4 reads the token at position 6"):
        require_hidden_future(model, windows(2, 12, DEPTH))


def test_a_run_is_looked_at_twice_and_only_with_a_users_module(tiny_trunk, monkeypatch):
    """Also later, since a module may hide what it reads while its weights are zero."""
    model, batch = build(tiny_trunk, "linear", depth=DEPTH), windows(2, 12, DEPTH)
    reads = Reads(1)
    for n_batches, processes, users, looks in (
        (1, 1, True, True),
        (9, 1, True, False),
        (11, 1, True, True),
        (1, 2, True, False),
        (1, 1, False, False),
    ):
        callback = HiddenFuture()
        model.trunk.blocks[-1] = Reads(0)
        trainer, module = SimpleNamespace(world_size=processes), SimpleNamespace(model=model)
        for _ in range(n_batches - 1):
            callback.on_train_batch_start(trainer, module, batch, 0)
        model.trunk.blocks[-1] = reads
        monkeypatch.setattr(Reads, "__module__", __name__ if users else "mtp_lightning.nn.block")
        with pytest.raises(UserError) if looks else nullcontext():
            callback.on_train_batch_start(trainer, module, batch, 0)
