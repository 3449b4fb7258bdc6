"""Estimates of memory and time against sums by hand and against a block's saved tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.plan import STRATEGIES, Machines, Plan, describe, kept_bytes, main, plans_of
from tests import closed_forms
from tests.integration.helpers import CONF

SIZES: dict[str, Any] = {
    "vocab_size": 100, "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 160,
}  # fmt: skip
LATENT = {
    "n_kv_heads": 4,
    "attention": {
        "variant": "latent", "q_rank": 24, "kv_rank": 16, "d_nope": 16, "d_rope": 8, "d_value": 16,
    },
    "feed_forward": {
        "variant": "experts", "n_routed": 8, "n_shared": 1, "top_k": 2, "d_expert": 48,
        "first_k_dense": 1,
    },
}  # fmt: skip


def plan_of(*, devices: int, **values: Any) -> Plan:
    trunk = TrunkConfig(**{**SIZES, **values})
    return Plan(
        model=ModelConfig(trunk=trunk, mtp=NoMTPConfig()), seq_len=32, batch=2, devices=devices
    )


def test_memory_equals_a_sum_by_hand() -> None:
    plan = plan_of(devices=16)
    trunk, params = plan.model.trunk, plan.model.num_params()
    block = closed_forms.block(trunk, 0)[0]
    assert params == 100 * 64 + 3 * block + 64
    ddp, fsdp, hsdp = (plan.memory(strategy) for strategy in STRATEGIES)
    assert (ddp.states, fsdp.states, hsdp.states) == (16 * params, params, 2 * params)
    assert ddp.gathered == 6 * params
    root = params - 3 * block
    assert fsdp.gathered == hsdp.gathered == 2 * root + 8 * block
    saved = 3 * kept_bytes(trunk) + 4 * 64
    assert ddp.activations == fsdp.activations == 2 * 32 * saved
    assert ddp.head == 6 * 64 * 100, "there are fewer rows than a chunk has"
    assert ddp.total == ddp.states + ddp.gathered + ddp.activations + ddp.head
    # One device shards nothing.
    alone = plan_of(devices=1)
    assert alone.memory("fsdp").states == ddp.states
    recomputed = plan_of(devices=16, recompute=True)
    assert recomputed.memory("ddp").activations == 2 * 32 * (
        3 * 4 * 64 + 4 * 64 + kept_bytes(trunk)
    )


def test_a_frozen_trunk_has_weights_alone() -> None:
    trunk = TrunkConfig(**SIZES)
    mtp = SequentialConfig(depth=1, freeze_trunk=True)
    plan = Plan(model=ModelConfig(trunk=trunk, mtp=mtp), seq_len=32, batch=2, devices=16)
    params, frozen = plan.model.num_params(), plan.model.num_trunk_params()
    ddp, fsdp, _ = (plan.memory(strategy) for strategy in STRATEGIES)
    assert ddp.states == 16 * (params - frozen) + 4 * frozen == 16 * fsdp.states
    assert ddp.gathered == 4 * (params - frozen) + 2 * params
    # The module's block and projection, and two outputs in fp32.
    one_block = 2 * 32 * (kept_bytes(trunk) + 2 * 4 * 64)
    assert one_block < ddp.activations < 2 * one_block
    # An all-reduce over two machines moves the modules' gradients alone.
    expected = 2 * 4 * (params - frozen) * 15 / 16 / plan.machines.far
    assert plan.network_seconds("ddp") == pytest.approx(expected)


def test_time_equals_a_sum_by_hand() -> None:
    plan = plan_of(devices=16)
    params, machines = plan.model.num_params(), plan.machines
    flops = closed_forms.training(plan.model, 32, []) * 64
    assert plan.compute_seconds() == pytest.approx(flops / (989e12 * 0.4))
    assert plan.network_seconds("ddp") == pytest.approx(8 * params * 15 / 16 / machines.far)
    assert plan.network_seconds("fsdp") == pytest.approx(8 * params * 15 / 16 / machines.far)
    within = 8 * params * 7 / 8 / machines.near
    between = 8 * params / 8 * 1 / 2 / machines.far
    assert plan.network_seconds("hsdp") == pytest.approx(within + between)
    for strategy in STRATEGIES:  # so small a batch waits for the network
        rate = 16 * 64 / plan.network_seconds(strategy)
        assert plan.tokens_per_second(strategy) == pytest.approx(rate)
    one = plan_of(devices=1)
    assert [one.network_seconds(strategy) for strategy in STRATEGIES] == [0, 0, 0]
    assert one.tokens_per_second("ddp") == pytest.approx(64 / one.compute_seconds())


@pytest.mark.parametrize("kind", ["dense", "latent dense", "latent experts"])
def test_kept_bytes_are_near_those_that_a_block_saves(kind: str) -> None:
    """In fp32 on a CPU, whose attention saves no [T, T] either: twice the bytes of bf16, and some
    more tensors of eager kernels."""
    trunk = TrunkConfig(**{**SIZES, **(LATENT if "latent" in kind else {})})
    layer = 0 if "dense" in kind else 2
    block = Block(trunk, layer)
    T = 64
    ctx = ForwardContext.of_window(
        trunk, T, device=torch.device("cpu"), dtype=torch.float32, documents=None
    )
    inputs = {p.untyped_storage()._cdata for p in block.parameters()}
    inputs |= {t.untyped_storage()._cdata for t in (ctx.cos, ctx.sin)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in inputs:
            saved[storage._cdata] = storage.nbytes()
        storages.append(storage)  # alive, so that no address is used twice
        return tensor

    storages: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.randn(1, T, trunk.d_model, requires_grad=True), ctx)
    single = 4 * (2 * trunk.d_model + trunk.n_heads)
    expected = 2 * (kept_bytes(trunk, layer) - single) + single
    assert 0.6 < sum(saved.values()) / T / expected < 1.6


@pytest.mark.slow
def test_deepseek_v3_has_its_published_size() -> None:
    settings = ["model=deepseek_v3", "mtp.depth=1", "vocab_size=129280", "data.seq_len=4096"]
    plans, tokens = plans_of([*settings, "data.batch_size=1", "devices=2048", "tokens=14.8e12"])
    (plan,) = plans
    assert plan.model.num_trunk_params() == pytest.approx(671.0e9, rel=1e-3)
    assert tokens == 14.8e12 and plan.devices == 2048
    lines = describe(plans, tokens)
    assert "estimated, not run" in lines[1] and len(lines) == 3 + len(STRATEGIES)


@pytest.mark.parametrize("head", sorted(file.stem for file in (CONF / "mtp").glob("*.yaml")))
def test_every_head_can_be_planned(head: str) -> None:
    settings = ["model=pico", "data.seq_len=32", f"mtp={head}"]
    ((plan,), _), ((plain,), _) = plans_of(settings), plans_of([*settings[:2], "mtp=none"])
    more = plan.memory("ddp").activations - plain.memory("ddp").activations
    assert more >= 0
    if head == "masked":  # the trunk reads its masks, too
        assert more > 2 * plain.memory("ddp").activations - 2 * 4 * 32 * 4 * 64


def test_the_command_line_prints_a_table_errors_and_help(capsys):
    main(["model=nano", "devices=1,16", "mfu=0.5", "near=1e11"])
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines()[3:]]
    assert [(row[0], row[1]) for row in rows] == [(n, s) for n in ("1", "16") for s in STRATEGIES]
    assert "MFU 0.5" in output and "100 GB/s within" in output
    with pytest.raises(SystemExit):
        main(["devices=none"])
    assert "error: devices" in capsys.readouterr().err
    main(["--help"])
    text = capsys.readouterr().out
    assert "an estimate" in text and "devices=8" in text and "vocab_size=32768" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("devices=12", "whole machines of 8"),
        ("devices=0", "at least 1"),
        ("devices=many", "must be numbers"),
        ("mfu=40", r"mfu must be a number in \(0, 1\]"),
        ("memory=0", "memory must be a number above 0"),
        ("peak=nan", "peak must be a number above 0"),
        ("in_machine=inf", "in_machine must be a number above 0"),
        ("in_machine=2.5", "in_machine must be a whole number"),
        ("vocab_size=nan", "vocab_size must be a whole number of at least 1"),
        ("vocab_size=1.5", "vocab_size must be a whole number of at least 1"),
        ("modle=nano", "modle"),
        ("mtp.depth=-1", "depth"),
        ("data.batch_size=0", "data.batch_size must be"),
        ("data.seq_len=x", "data.seq_len must be"),
        ("data.seq_len=10000000000", r"data.seq_len must be a whole number in \[1, 16777216\]"),
        ("tokens=-1", "tokens must be a number above 0"),
    ],
)
def test_a_wrong_setting_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plans_of([setting])


def test_a_foreign_attention_is_refused() -> None:
    class Mine:
        pass

    trunk = TrunkConfig(**SIZES)
    object.__setattr__(trunk, "attention", Mine())
    with pytest.raises(ValueError, match="What Mine keeps"):
        kept_bytes(trunk)
    assert Machines(in_machine=4).in_machine == 4
