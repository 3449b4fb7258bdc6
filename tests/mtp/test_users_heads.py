"""A user's head: what it shares is trained, and its mistakes are one sentence each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.trunk_states import cache_obstacle
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.config import ModulesConfig
from mtp_lightning.mtp.feed import OwnLoss
from mtp_lightning.mtp.kinds import Chain, SideBySide
from mtp_lightning.mtp.summary import Summary, SummaryConfig
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.linear import Linear
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep, StepResult
from tests.decoding.models import ids_of, random_prompts
from tests.models import build, windows

DEPTH = 2


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests do not see the variants that are defined here."""
    monkeypatch.setattr(MTPConfig, "_variants", dict(MTPConfig._variants))


def config_of(build_it) -> MTPConfig:
    """The config of a stack that ``build_it(config, trunk)`` builds."""

    @dataclass(frozen=True, kw_only=True)
    class UsersConfig(MTPConfig, variant="users"):
        def build(self, trunk: TrunkConfig):
            return build_it(self, trunk)

    return UsersConfig(depth=DEPTH)


def one_step(model: MTPModel) -> StepResult:
    step = OptimizerStep(model, schedule=Piecewise(DEPTH, 0.3), balance=NoBalance(DEPTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return step(windows(2, 8, DEPTH), Progress(step=0, max_steps=1), optimizer)


def train(trunk: TrunkConfig, build_it) -> dict[str, torch.Tensor]:
    """One step; returns how each weight has changed, those of the stack by their names in it."""
    model = build(trunk, config_of(build_it)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(model)
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return {name.removeprefix("mtp."): change for name, change in changes.items()}


def test_kept_states_need_to_know_which_states_a_head_reads(tiny_trunk: TrunkConfig) -> None:
    class FirstBlock(SideBySide):
        def branch(self, trunk, output):
            return output.blocks[0]

        def step(self, k, branch_BTC, ctx):
            return branch_BTC

    @dataclass(frozen=True, kw_only=True)
    class FirstBlockConfig(ModulesConfig, variant="first_block"):
        def build(self, trunk: TrunkConfig):
            return FirstBlock(self, [nn.Identity() for _ in range(self.depth)])

    config = FirstBlockConfig(depth=DEPTH, freeze_trunk=True)
    assert "define read_states in FirstBlockConfig" in cache_obstacle(build(tiny_trunk, config))

    class KeyedConfig(FirstBlockConfig, variant="keyed"):
        read_states = ("first block",)

    keyed = KeyedConfig(depth=DEPTH, freeze_trunk=True)
    assert cache_obstacle(build(tiny_trunk, keyed)) == ""


def test_only_a_stack_that_looks_further_asks_for_longer_windows() -> None:
    @dataclass(frozen=True, kw_only=True)
    class FarConfig(MTPConfig, variant="far"):
        reach: int = 8

        def build(self, trunk: TrunkConfig):
            raise NotImplementedError

        @property
        def places_ahead(self) -> int:
            return self.reach

    assert FarConfig(depth=2).data_options == {"lookahead": 8}
    assert FarConfig(depth=2).extra_places == 5
    # Data modules of users need not know the argument.
    assert FarConfig(depth=2, reach=3).data_options == {}
    assert config_of(Shares).data_options == {}


class Shares(SideBySide):
    """Every depth uses one more matrix and one more vector, which belong to no depth."""

    def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
        width = trunk.d_model
        super().__init__(config, [Linear(width, width) for _ in range(config.depth)])
        self.shared = Linear(width, width)
        self.scale = nn.Parameter(torch.empty(width))

    def step(self, k, branch_BTC, ctx):
        return self.depths[k - 1](branch_BTC) + self.scale * self.shared(branch_BTC)


class SharesTogether(Shares):
    """The same with the feed of any stack, where autograd does everything."""

    def feed(self, *arguments):
        return super(SideBySide, self).feed(*arguments)


class OneMatrix(Shares):
    """The matrix of every depth is the shared one."""

    def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
        super().__init__(config, trunk)
        self.depths = nn.ModuleList(self.shared for _ in range(config.depth))


class OneMatrixTogether(OneMatrix, SharesTogether):
    pass


@pytest.mark.parametrize(
    ("heads", "together"), [(Shares, SharesTogether), (OneMatrix, OneMatrixTogether)]
)
def test_what_heads_side_by_side_share_is_trained(heads, together, tiny_trunk: TrunkConfig) -> None:
    changes, expected = train(tiny_trunk, heads), train(tiny_trunk, together)
    assert all(change.any() for change in expected.values())
    for name, change in expected.items():
        torch.testing.assert_close(changes[name], change, msg=name)


class ReadsTokens(Shares):
    """The heads read the tokens between without a correction."""

    def reads(self, k):
        return range(1, k + 1)

    def depth_state(self, k, inputs, previous_BTC):
        return super().depth_state(k, inputs, previous_BTC) + inputs.embedded_at(k)


class ReadsTokensTogether(ReadsTokens, SharesTogether):
    pass


def test_heads_side_by_side_train_the_embedding_that_they_read(tiny_trunk: TrunkConfig) -> None:
    trunk = replace(tiny_trunk, tie_embeddings=False)
    changes, expected = train(trunk, ReadsTokens), train(trunk, ReadsTokensTogether)
    for name, change in expected.items():
        torch.testing.assert_close(changes[name], change, msg=name)


class LimitsItsInput(Shares):
    def step(self, k, branch_BTC, ctx):
        if ctx.auxiliary is not None:
            ctx.auxiliary.add_loss(branch_BTC.square().mean(), "train/size")
        return super().step(k, branch_BTC, ctx)


@pytest.mark.parametrize("freeze_trunk", [False, True])
def test_a_further_loss_may_depend_on_nothing_that_learns(
    freeze_trunk: bool, tiny_trunk: TrunkConfig
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class LimitsConfig(ModulesConfig, variant="limits"):
        def build(self, trunk: TrunkConfig):
            return LimitsItsInput(self, trunk)

    model = build(tiny_trunk, LimitsConfig(depth=DEPTH, freeze_trunk=freeze_trunk)).train()
    assert float(one_step(model).values["train/size"]) > 0


class SharesByFrozenSum(Shares):
    """The shared vector is frozen, and a matrix is read by its sum, whose gradient is one row that
    is shown as many."""

    def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
        super().__init__(config, trunk)
        self.scale = nn.Parameter(torch.ones(trunk.d_model), requires_grad=False)
        self.table = nn.Parameter(torch.zeros(3, trunk.d_model))

    def step(self, k, branch_BTC, ctx):
        return super().step(k, branch_BTC, ctx) + self.table.sum(0)


def test_a_head_may_have_frozen_weights_and_read_sums(tiny_trunk: TrunkConfig) -> None:
    changes = train(tiny_trunk, SharesByFrozenSum)
    assert not changes["scale"].any() and changes["shared.weight"].any()
    first, *others = changes["table"]
    assert first.any() and all(torch.allclose(row, first, atol=1e-6) for row in others)


class OneAtEvenPositions(OwnLoss):
    def __init__(self, weight: torch.Tensor, batch: WindowBatch) -> None:
        even_T = torch.arange(batch.seq_len, device=batch.device) % 2 == 0
        super().__init__(weight, even_T.expand(len(batch), -1))

    def value(self, rows, logits_RV):
        return 1 + 0 * logits_RV.sum(-1)


class OwnLossStack(Summary):
    def own_loss(self, k, batch):
        return OneAtEvenPositions(self.head.weight, batch)


def test_an_own_loss_is_a_mean_over_the_positions_that_it_counts(tiny_trunk: TrunkConfig) -> None:
    @dataclass(frozen=True, kw_only=True)
    class OwnLossConfig(SummaryConfig, variant="own_loss"):
        lookahead: int = 4

        def build(self, trunk: TrunkConfig):
            return OwnLossStack(self, trunk)

    config = OwnLossConfig()
    model, extra = build(tiny_trunk, config).train(), config.extra_places
    step = OptimizerStep(model, schedule=Piecewise(1, 0.3), balance=NoBalance(1))
    batch = WindowBatch(windows(2, 9, 1 + extra).tokens, 1, extra=extra)
    result = step(batch, Progress(0, 1), torch.optim.SGD(model.parameters(), lr=0.1))
    assert result.losses[1] == 1 and list(result.plan.counts.valid) == [18, 10]


@pytest.mark.parametrize("name", ["hidden", "_hidden"])
@pytest.mark.parametrize("kind", [list, tuple, "dict", "parameters"])
def test_layers_in_a_python_container_are_refused(kind, name: str, tiny_trunk: TrunkConfig) -> None:
    class Hidden(Shares):
        def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
            super().__init__(config, trunk)
            layers = [nn.Linear(2, 2) for _ in range(2)]
            weights = [nn.Parameter(torch.ones(2))]
            hidden = {"dict": dict(enumerate(layers)), "parameters": weights}
            setattr(self, name, hidden[kind] if isinstance(kind, str) else kind(layers))
            self.known = [self.shared, self.scale]  # references to registered ones

    with pytest.raises(UserError, match=rf"Hidden\.{name} is a \w+ with layers, which would be"):
        build(tiny_trunk, config_of(Hidden))


def test_a_config_that_builds_no_stack_is_refused(tiny_trunk: TrunkConfig) -> None:
    with pytest.raises(UserError, match=r"Config\.build gives NoneType: return the MTPStack"):
        build(tiny_trunk, config_of(lambda config, trunk: None))


class Users(Chain):
    """A chain whose step is the test's."""

    def __init__(self, config: MTPConfig, trunk: TrunkConfig, step) -> None:
        super().__init__(config)
        self.depths = nn.ModuleList(Linear(trunk.d_model, trunk.d_model) for _ in range(DEPTH))
        self.users_step = step

    def step(self, k, previous_BTC, embedded_BTC, ctx):
        return self.users_step(previous_BTC, self.depths[k - 1](embedded_BTC))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda h, out: out[:, :-1], r"gives \[2, 7, 32\], and .* = \[2, 8, 32\] is needed"),
        (lambda h, out: out[..., :16], r"gives \[2, 8, 16\], and .* = \[2, 8, 32\] is needed"),
        (lambda h, out: None, "depth 1 of mtp=users gives NoneType, and a tensor"),
        (lambda h, out: (out, h), "depth 1 of mtp=users gives tuple, and a tensor"),
        (lambda h, out: out.flatten(0, 1), r"depth 1 of mtp=users gives \[16, 32\]"),
        (lambda h, out: h.add_(out), "changes the state that it reads in place"),
    ],
)
def test_a_wrong_state_is_refused(tiny_trunk: TrunkConfig, step, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_trunk, lambda config, trunk: Users(config, trunk, step))


def test_biases_of_pytorchs_modules_start_at_zero(tiny_trunk: TrunkConfig) -> None:
    def cells(config: MTPConfig, trunk: TrunkConfig) -> Shares:
        stack = Shares(config, trunk)
        stack.cell = nn.GRUCell(trunk.d_model, trunk.d_model)
        return stack

    model = build(tiny_trunk, config_of(cells))
    model.initialize(0)
    values = dict(model.mtp.named_parameters())
    assert not values["cell.bias_ih"].any() and not values["cell.bias_hh"].any()
    assert values["cell.weight_ih"].any() and (values["scale"] == 1).all()


class TwoBlocks(Chain):
    """Two blocks per depth, the second one called by name."""

    def __init__(self, config: MTPConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.cached_blocks = 2
        self.first = nn.ModuleList(Block(trunk) for _ in range(config.depth))
        self.second = nn.ModuleList(Block(trunk) for _ in range(config.depth))

    def step(self, k, previous_BTC, embedded_BTC, ctx):
        h_BTC = self.first[k - 1](previous_BTC + embedded_BTC, ctx)
        return self.second[k - 1](h_BTC, ctx=ctx, layer=1)


def test_a_depth_may_have_several_blocks_and_says_how_many(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, config_of(TwoBlocks)).eval()
    prompts = random_prompts(0, (3, 9, 21))
    plain = ids_of(generate(model, prompts, speculative=False, max_new_tokens=20))
    assert ids_of(generate(model, prompts, max_new_tokens=20)) == plain
    model.mtp.cached_blocks = 1
    with pytest.raises(UserError, match=r"its layer 1 .* has cached_blocks=1: set it"):
        generate(model, prompts, max_new_tokens=20)


TAKEN = """
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.base import MTPConfig
try:
    class Mine(MTPConfig, variant="linear"): pass
except UserError as error:
    print(error)
"""


def test_the_name_of_a_built_in_head_is_taken_before_it_is_imported() -> None:
    message = subprocess.check_output([sys.executable, "-c", TAKEN], text=True)
    assert "LinearConfig already: give __main__.Mine another variant name" in message


def test_a_head_needs_a_variant_name_of_its_own() -> None:
    sequential = MTPConfig.find("sequential")

    @dataclass(frozen=True, kw_only=True)
    class Mine(sequential):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(UserError, match=r"Mine has no variant name of its own: .*variant="):
        Mine(depth=1)
    with pytest.raises(UserError, match=r"SequentialConfig already: give .*Again another variant"):

        class Again(MTPConfig, variant="sequential"):
            pass
