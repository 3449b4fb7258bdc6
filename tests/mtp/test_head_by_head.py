"""One head after the other, as Gloeckle et al. 2024 do to save memory: only the activations of one
head at a time are kept. ``tests/objective/test_cross_product.py`` compares the gradients of the
losses with those of a joint backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.feed import Together
from mtp_lightning.mtp.own_head import OwnHead
from mtp_lightning.mtp.parallel import ParallelConfig, ParallelMTP
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.micro_batch import feed_loss
from mtp_lightning.objective.plan import depths_of
from mtp_lightning.objective.targets import DepthTarget
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from tests.losses import gradients, mtp_loss, reported_loss
from tests.models import build, windows


def joint(
    model: MTPModel,
    batch: WindowBatch,
    weights: list[float],
    counts: list[int],
    auxiliary: AuxiliaryOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective with a joint backward pass after the forward passes of all heads."""
    factors = [1.0, *weights]
    depths = depths_of(factors)
    final, inputs = model.run_trunk(batch, depths, auxiliary=auxiliary)
    feed = Together(final, list(model.mtp.states(inputs, depths)), {})
    targets = [
        DepthTarget(k, batch.targets(k), factors[k] / max(counts[k], 1), CrossEntropy())
        for k in (0, *depths)
    ]
    train_head = model.mtp.config.detach != "all"
    return feed_loss(model.head.weight, feed, targets, train_head=train_head)


def test_balance_losses_of_heads_are_those_of_a_joint_backward_pass(
    tiny_trunk: TrunkConfig,
) -> None:
    """They are sequence-wise, and each pass counts the loads of its experts once."""
    experts = {"n_routed": 4, "n_shared": 1, "top_k": 2, "d_expert": 16, "sequence_loss": 0.5}
    trunk = replace(tiny_trunk, feed_forward=ExpertsConfig(**experts))
    model = build(trunk, "parallel", depth=2).double()
    batch, counts, weights = windows(3, 10, 2), [30] * 3, [0.3, 0.1]
    total, _, reported = reported_loss(model, batch, weights, counts, windows=6)
    total.backward()
    streamed = gradients(model)
    loads = reported.loads.values()
    assert all(int(load.sum()) == 30 * 2 for load in loads) and len(loads) == 4
    auxiliary = AuxiliaryOutputs()
    total, _ = joint(model, batch, weights, counts, auxiliary)
    (total + sum(auxiliary.losses) / 6).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(streamed[name], grad, rtol=1e-6, atol=1e-8, msg=name)
    # Without the balance losses the routers' gradients differ.
    joint(model, batch, weights, counts)[0].backward()
    name = "mtp.depths.1.block.feed_forward.router.weight"
    assert not torch.allclose(gradients(model)[name], streamed[name], rtol=1e-3)


@pytest.mark.parametrize("correction", ["none", "selector"])
def test_the_loss_is_the_same_without_gradients(tiny_trunk: TrunkConfig, correction: str) -> None:
    model = build(tiny_trunk, "parallel", depth=2, correction=correction)
    with torch.no_grad():
        evaluated, _ = mtp_loss(model, windows(2, 8, 2), [0.2, 0.2], [16] * 3)
    trained, _ = mtp_loss(model, windows(2, 8, 2), [0.2, 0.2], [16] * 3)
    assert not evaluated.requires_grad
    # For a gradient, layers may use other kernels.
    torch.testing.assert_close(evaluated, trained.detach())


class _Saved:
    """A saved tensor that is counted until autograd releases it."""

    def __init__(self, tensor: Tensor, live: dict[str, int]) -> None:
        self.tensor, self.live = tensor, live
        live["now"] += tensor.nbytes
        live["peak"] = max(live["peak"], live["now"])

    def __del__(self) -> None:
        self.live["now"] -= self.tensor.nbytes


@contextmanager
def saved_bytes() -> Iterator[dict[str, int]]:
    """The bytes, now and at most, that autograd saves for backward passes, without parameters."""
    live = {"now": 0, "peak": 0}

    def pack(tensor: Tensor) -> object:
        return tensor if isinstance(tensor, torch.nn.Parameter) else _Saved(tensor, live)

    def unpack(saved: object) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved  # type: ignore[return-value]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield live


@pytest.mark.parametrize(("variant", "correction"), [("parallel", "none"), ("linear", "markov")])
def test_saved_activations_do_not_grow_with_depth(
    tiny_trunk: TrunkConfig, variant: str, correction: str
) -> None:
    def peak(depth: int, loss_of: object) -> int:
        mtp = MTPConfig.find(variant)(depth=depth, correction=correction)
        model = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=mtp))
        model.initialize(0)
        batch = windows(4, 32, depth)
        with saved_bytes() as live:
            total, _ = loss_of(model, batch, [0.1] * depth, [128] * (depth + 1))  # type: ignore
            total.backward()
        del total
        assert live["now"] == 0, "tensors are still saved after the backward pass"
        return live["peak"]

    in_turn = [peak(depth, mtp_loss) for depth in (1, 2, 6)]
    # A Markov head saves the id of each token that it reads.
    ids = 0 if correction == "none" else 4 * 8
    assert in_turn[0] == in_turn[1] - ids == in_turn[2] - 5 * ids
    together = [peak(depth, joint) for depth in (1, 2, 6)]
    # Control: for a joint backward pass the bytes grow with the depth.
    assert together[2] > together[1] > together[0]
    per_head = together[1] - together[0]
    assert together[2] - in_turn[2] >= 4 * per_head


class ParallelWithOwnHead(ParallelMTP):
    """A user's parallel heads with an output matrix of their own."""

    def __init__(self, config: ParallelConfig, trunk: TrunkConfig) -> None:
        super().__init__(config, trunk)
        self.own = OwnHead(trunk.vocab_size, trunk.d_model, 20)
        torch.nn.init.normal_(self.own.weight, std=0.1, generator=torch.Generator().manual_seed(1))

    @property
    def own_head(self) -> OwnHead:
        return self.own


def test_an_output_matrix_of_the_heads_gets_its_gradient(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, "parallel", depth=2).double()
    model.mtp = ParallelWithOwnHead(ParallelConfig(depth=2), tiny_trunk).double()
    model.initialize(0)
    batch, head = windows(2, seq_len=9, depth=2), model.mtp.own_head
    rows = {k: head.rows_of(batch.targets(k)) for k in (1, 2)}
    final, inputs = model.run_trunk(batch, [1, 2])
    for k, hidden in model.mtp.states(inputs, [1, 2]):
        log_q_BTN = (hidden @ head.weight.T).log_softmax(-1)[rows[k] >= 0]
        targets_M = rows[k][rows[k] >= 0]
        (-log_q_BTN[torch.arange(len(targets_M)), targets_M].sum()).backward(retain_graph=True)
    expected, head.weight.grad = head.weight.grad, None

    final, inputs = model.run_trunk(batch, [1, 2])
    targets = [DepthTarget(k, rows[k], 1.0, CrossEntropy()) for k in rows]
    targets = [DepthTarget(0, batch.targets(0), 0.0, CrossEntropy()), *targets]
    feed = model.mtp.feed(final, inputs, batch, [1, 2])
    feed_loss(model.head.weight, feed, targets)[0].backward()
    torch.testing.assert_close(head.weight.grad, expected)
