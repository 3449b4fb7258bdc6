"""A training step and a validation never wait for the device.

The tests run on the device "meta", whose tensors have no values, so that every operation that reads
a value fails (``item``, ``tolist``, ``nonzero``, a mask as an index, ``bincount``). Copies from
pageable host memory wait for a real device, too; they do not fail on "meta", so the tests record
them.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import mtp_lightning.nn.experts as experts
from data_modules.windows import WindowBatch
from mtp_lightning.metrics.rates import rates_of
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.trunk import TrunkOutput
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.kl import KL
from tests import deepseek
from tests.models import build, windows

STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "sequential": ("sequential", {"depth": 2}),
    "mixing": ("sequential", {"depth": 2, "hidden_state_mixing": True, "token_dropout": 0.5}),
    "parallel": ("parallel", {"depth": 2}),
    "parallel, selector": ("parallel", {"depth": 2, "correction": "selector"}),
    "linear": ("linear", {"depth": 2}),
    "parameter_free": ("parameter_free", {"depth": 2}),
    "joint": ("joint", {"depth": 2}),
    "registers": ("registers", {"depth": 1, "lookahead": 3}),
}
OBJECTIVES = {"ce": Objective(term=CrossEntropy()), "kl": Objective(term=KL())}
# A stack, an objective, and whether the windows have documents.
CASES = [
    ("none", "ce", True),
    ("sequential", "ce", False),
    ("sequential", "kl", True),
    ("mixing", "ce", True),
    ("parallel", "kl", False),
    ("parallel, selector", "ce", True),
    ("linear", "ce", False),
    ("parameter_free", "kl", False),
    ("joint", "kl", False),
    ("registers", "ce", True),
]


_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class HostCopies(TorchFunctionMode):
    """Records every call that copies numbers from the host to the device.

    A tensor without dimensions does not count: it is passed as an argument of the kernel.

    Attributes:
        calls: each function, with the line of the project that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "meta" for tensor in (*inputs, *outputs))
        from_host = any(tensor.device.type == "cpu" and tensor.dim() for tensor in inputs)
        from_numbers = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        from_list = func in _INDEXING and _has_list(args[1])
        waits = not kwargs.get("non_blocking", False)
        if on_device and waits and (from_host or from_numbers or from_list):
            self.calls.append(f"{getattr(func, '__name__', func)} in {_caller()}")
        return result


def _has_list(index: Any) -> bool:
    """Whether an index has a list of positions, which becomes a tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, (list, tuple, range)) for part in parts)


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "mtp_lightning/" in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a test"


def masked(batch: WindowBatch) -> WindowBatch:
    """The batch with documents of five tokens, as one text of an evaluation."""
    shape = batch.tokens.shape
    documents = (torch.arange(shape[1]) // 5).expand(shape)
    texts = torch.zeros(shape, dtype=torch.int64)
    return WindowBatch(batch.tokens, batch.depth, documents, texts == 0, texts)


def copies_of_a_step(model: MTPModel, batch: WindowBatch, objective: Objective) -> list[str]:
    """The copies from the host in one optimizer step of two micro-batches."""
    model = model.to("meta").train()
    step = OptimizerStep(
        model,
        schedule=Piecewise(model.depth, 0.3),
        balance=NoBalance(model.depth),
        objective=objective,
        accumulate=2,
        clip_norm=1.0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batch.to("meta")
    with HostCopies() as copies:
        result = step(batch, Progress(step=0, max_steps=10), optimizer)
        assert result.loss.device.type == "meta"
    return copies.calls


@pytest.mark.parametrize(("stack", "objective", "documents"), CASES)
def test_a_step_copies_nothing_from_the_host(
    tiny_trunk: TrunkConfig, stack: str, objective: str, documents: bool
) -> None:
    variant, switches = STACKS[stack]
    config = MTPConfig.find(variant)(**{"depth": 0, **switches})
    batch = windows(4, 12, config.depth)
    batch = masked(batch) if documents else batch
    model = build(tiny_trunk, config)
    assert copies_of_a_step(model, batch, OBJECTIVES[objective]) == []


def test_experts_copy_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, one grouped product computes all experts."""
    monkeypatch.setattr(experts, "fits_grouped", lambda x_MC, down: True)
    model = deepseek.build(deepseek.TRUNK, depth=2).to(torch.bfloat16)
    assert copies_of_a_step(model, windows(4, 12, 2), OBJECTIVES["ce"]) == []


def test_a_validation_copies_nothing_from_the_host(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's autocast does not support the device "meta".
    monkeypatch.setattr(torch, "autocast", lambda device, **_: nullcontext())
    model = build(tiny_trunk, "sequential", depth=2).to("meta").eval()
    batch = masked(windows(4, 12, 2)).to("meta")
    rates = rates_of(model, [60]).to("meta")
    with HostCopies() as copies, torch.no_grad():
        rates.update(model, batch, model(batch))
    assert copies.calls == []


@pytest.mark.parametrize(("device", "compiled"), [("meta", True), ("meta", False), ("cpu", True)])
def test_a_mask_in_blocks_copies_nothing_from_the_host(
    tiny_trunk: TrunkConfig, device: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only compiled blocks on a GPU get a mask in blocks."""
    trunk = replace(tiny_trunk, d_head=16)
    model = build(trunk, "none", depth=0).to(device)
    model.compiled = compiled
    batch = masked(windows(4, 12, 0)).to(device)
    masks = []

    def run(embedded: torch.Tensor, ctx: ForwardContext) -> TrunkOutput:
        masks.append(ctx.mask)
        return TrunkOutput(embedded, embedded, embedded)

    monkeypatch.setattr(model.trunk, "forward", run)
    with HostCopies() as copies:
        model.run_trunk(batch, [])
    assert copies.calls == []
    assert isinstance(masks[0], BlockMask) == (device == "meta" and compiled)


def test_host_copies_are_recorded_and_reads_of_values_fail() -> None:
    """Copies of Python numbers, of lists as indices, and of tensors of the host."""
    x = torch.empty(4, 3, device="meta")
    with HostCopies() as copies:
        x.new_tensor([1.0, 2.0])
        torch.tensor([1.0], device="meta")
        x[[0, 1]]
        x[0, 1] = 1.0
        torch.arange(3).to("meta")
        torch.arange(3).to("meta", non_blocking=True)
        x * torch.tensor(2.0)
    assert [call.split(" in ")[0] for call in copies.calls] == [
        "new_tensor",
        "tensor",
        "__getitem__",
        "to",
    ]
    for read in (torch.Tensor.tolist, torch.nonzero, torch.Tensor.item, lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(x[0, :1])
