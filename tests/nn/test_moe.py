"""The mixture of experts against DeepSeek's equations in float64, and its routing."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtp_lightning.nn import experts as plain
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.experts import Experts
from mtp_lightning.nn.moe import ExpertsConfig, MoE, Router
from tests import deepseek, deepseek_reference, models, reference
from tests.losses import reported_loss


def layer_of(**experts: object) -> MoE:
    torch.manual_seed(0)
    layer = MoE(32, deepseek.trunk(experts=experts).feed_forward)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
        layer.router.expert_bias.normal_(0, 0.2)
    return layer


CASES = [
    {},
    {"n_groups": 1, "top_groups": 1},
    {"n_shared": 0, "top_k": 4, "top_groups": 4, "scaling": 1.0},
    {"n_shared": 2, "top_k": 1, "n_groups": 2, "top_groups": 1},
]


@pytest.mark.parametrize(
    ("case", "tokens", "grad"),
    list(zip(CASES, (3, 70, 70, 3), (False, True, False, True), strict=True)),
)
def test_the_layer_equals_the_equations(kernels: str, case: dict, tokens: int, grad: bool) -> None:
    """Few tokens without a gradient are computed one by one, others sorted by expert."""
    layer = layer_of(**case)
    x = torch.randn(1, tokens, 32)
    weights = {f"m.{name}": t.double() for name, t in layer.state_dict().items()}
    with torch.set_grad_enabled(grad):
        y = layer(x)[0]
    expected = deepseek_reference.moe(x[0].double(), weights, "m", deepseek.trunk(experts=case))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_those_through_every_expert(
    kernels: str, dtype: torch.dtype, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped:
        if kernels != "plain" or dtype == torch.float64:
            pytest.skip("only the plain formula has grouped products, and fp32 tests them")
        # They also run on a CPU, though slowly.
        monkeypatch.setattr(plain, "fits_grouped", lambda *_: True)
    torch.manual_seed(1)
    experts = Experts(16, 24, 6).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    x = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    # Expert 5 gets no token, expert 0 more than the others.
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(50)])
    chosen[:20, 0], chosen[:20, 1] = 0, 3
    gates = torch.rand(50, 2, dtype=dtype, requires_grad=True)
    seed = torch.randn(50, 16, dtype=dtype)
    inputs = [x, gates, experts.gate_up, experts.down]
    y = experts(x, chosen, gates)
    expected = reference.experts(x, chosen, gates, experts.gate_up, experts.down)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(y, inputs, seed),
        torch.autograd.grad(expected, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_the_chosen_experts_are_computed(kernels: str) -> None:
    experts = Experts(16, 24, 6).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(50)])
    with FlopCounterMode(display=False) as counter:
        experts(x, chosen, torch.ones(50, 2, dtype=torch.float64))
    assert counter.get_total_flops() == 2 * 50 * 2 * 3 * 16 * 24


def test_the_chosen_experts_are_those_of_sorting() -> None:
    config = deepseek.trunk(experts={"n_routed": 24, "n_groups": 6, "top_groups": 3, "top_k": 5})
    router = Router(32, config.feed_forward)
    router.expert_bias.normal_(0, 0.2)
    scores = torch.rand(200, 24)
    for row, chosen in zip(scores, router.choose(scores).tolist(), strict=True):
        expected = deepseek_reference.choose(row.double(), router.expert_bias.double(), config)
        assert sorted(chosen) == sorted(expected)


def context(auxiliary: AuxiliaryOutputs | None) -> ForwardContext:
    config = deepseek.trunk()
    return ForwardContext.of_window(config, 1, device=torch.device("cpu"), auxiliary=auxiliary)


def test_loads_count_each_reported_pass_once() -> None:
    layer = layer_of()
    x = torch.randn(2, 30, 32)
    auxiliary = AuxiliaryOutputs()
    layer(x, context(auxiliary))
    layer(x, context(auxiliary))
    layer(x, context(None))
    layer(x, context(auxiliary).repeated())
    assert auxiliary.loads[layer.router].sum() == 2 * 60 * 2
    chosen = layer.router.choose(layer.router(x.view(-1, 32))[0])
    counted = torch.bincount(chosen.flatten(), minlength=8)
    assert torch.equal(auxiliary.loads[layer.router], 2 * counted)


def test_a_frozen_router_counts_no_loads() -> None:
    layer = layer_of().requires_grad_(False)
    auxiliary = AuxiliaryOutputs()
    layer(torch.randn(1, 4, 32, requires_grad=True), context(auxiliary))
    assert auxiliary.loads == {}


def test_the_sequence_loss_equals_the_equations_and_is_reported_once() -> None:
    config = deepseek.trunk(experts={"sequence_loss": 0.01})
    layer = layer_of(sequence_loss=0.01)
    x = torch.randn(3, 20, 32)
    auxiliary = AuxiliaryOutputs()
    layer(x, context(auxiliary))
    (loss,) = auxiliary.losses
    expected = torch.zeros((), dtype=torch.float64)
    for row in x.double():
        scores = torch.sigmoid(row @ layer.router.weight.detach().double().T)
        expected += 0.01 * deepseek_reference.balance_loss(scores, config)
    torch.testing.assert_close(loss.double(), expected)
    grad = torch.autograd.grad(loss, layer.router.weight)[0]
    assert grad.abs().max() > 0
    layer(x, context(auxiliary).repeated())  # a recomputation
    assert len(auxiliary.losses) == 1


def test_biases_of_experts_stay_in_fp32() -> None:
    layer = layer_of()
    for precise in (layer.double(), layer.bfloat16()):
        assert precise.router.expert_bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_groups": 3}, "n_routed=8 is not divisible by model.feed_forward.n_groups=3"),
        ({"n_groups": 8}, "leaves 1 expert a group"),
        ({"top_groups": 5}, "top_groups=5 is more than model.feed_forward.n_groups=4"),
        (
            {"top_k": 5},
            "top_k=5 experts do not exist in model.feed_forward.top_groups=2 groups of 2",
        ),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, not 0"),
        ({"bias_frozen": 1.5}, r"bias_frozen must be a number in \[0, 1\], not 1.5"),
        ({"bias_rate": -1.0}, "bias_rate must be a number of at least 0, not -1.0"),
        ({"scaling": 0.0}, "scaling must be a number above 0, not 0.0"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepseek.trunk(experts=change)


def test_biases_of_experts_are_frozen_at_the_end_of_a_run() -> None:
    config = ExpertsConfig(n_routed=4, n_shared=0, top_k=1, d_expert=8, bias_frozen=0.25)
    rates = [config.rate(done) for done in (0.0, 0.74, 0.75, 0.99)]
    assert rates == [0.001, 0.001, 0.0, 0.0]
    # 1 - 0.18 is one ulp more than 0.82.
    config = ExpertsConfig(n_routed=4, n_shared=0, top_k=1, d_expert=8, bias_frozen=0.18)
    assert [config.rate(step / 100) for step in (81, 82)] == [0.001, 0.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_of_experts_share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers have reported before one. The programs run without being compiled."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    # Compiling changes the methods of the class.
    for name in ("add_loss", "count"):
        monkeypatch.setattr(AuxiliaryOutputs, name, vars(AuxiliaryOutputs)[name])
    torch._dynamo.reset()  # programs of other tests count towards the limit
    config = deepseek.trunk(n_layers=5, experts={"sequence_loss": 0.1})
    results = []
    for compiled in (False, True):
        model = deepseek.build(config, depth=1).train()
        if compiled:
            model.compile_blocks()
        batch = models.windows(2, 12, 1)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=3):
            loss, _, auxiliary = reported_loss(model, batch, [0.3], [24, 22])
        results.append([loss, *auxiliary.losses, *auxiliary.loads.values()])
    assert len(results[0]) == 1 + 5 + 5
    torch.testing.assert_close(results[0], results[1])
