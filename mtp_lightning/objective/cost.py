"""FLOPs of a training step, counted by running one on PyTorch's ``meta`` device.

Tensors of that device have shapes and no values, so a step takes neither memory nor arithmetic.
It counts the matrix products of PyTorch's operators, forward and backward; a
multiply-add is two FLOPs. Elementwise operations count as nothing. Attention counts all T keys for
every query, as if there were no causal mask: the usual convention, which keeps figures comparable.
Positions without a valid target are computed and count. A recomputed activation counts once.

Shapes: T positions of a window, C d_model, D depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig
from mtp_lightning.objective.micro_batch import micro_batch_loss
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.plan import PositionCounts, StepPlan

if TYPE_CHECKING:
    from mtp_lightning.objective.balance.gradients import Scope


class StepCost:
    """FLOPs of training a model on one window; each kind of step is counted once."""

    def __init__(self, config: ModelConfig, objective: Objective = CROSS_ENTROPY) -> None:
        # Recomputed activations do not count: they bring no progress.
        self.config = replace(config, trunk=replace(config.trunk, recompute=False))
        self.objective = objective
        self._flops: dict[tuple[Any, ...], int] = {}

    def per_token(self, seq_len: int, active: Sequence[int] | None = None, **kind: Any) -> int:
        """FLOPs per position of one window; arguments as in :meth:`__call__`."""
        return self(seq_len, active, **kind) // seq_len

    def __call__(
        self,
        seq_len: int,
        active: Sequence[int] | None = None,
        *,
        main: bool | None = None,
        stored: bool = False,
        scope: Scope | None = None,
    ) -> int:
        """FLOPs of one window.

        Args:
            seq_len: T.
            active: the MTP depths that are computed; None for all.
            main: whether the main prediction is computed; None if the trunk learns.
            stored: whether the trunk's states are read instead of computed.
            scope: the parameters for which every depth's gradient is measured too; None for no
                measurement.

        Raises:
            UserError: a layer cannot run on the ``meta`` device.
        """
        mtp = self.config.mtp
        active = range(1, mtp.depth + 1) if active is None else active
        main = mtp.trains_trunk if main is None else main
        kind = seq_len, tuple(active), main, stored, scope
        if kind not in self._flops:
            # A profiler or counter around the step would see the operators of this one too.
            with (
                _disable_current_modes(),
                torch.inference_mode(False),
                torch.enable_grad(),
                counted_flops() as count,
            ):
                self._run(*kind)
            self._flops[kind] = count.total
        return self._flops[kind]

    def _run(
        self, seq_len: int, active: Sequence[int], main: bool, stored: bool, scope: Scope | None
    ) -> None:
        model = self.config.on_meta()
        objective = self.objective.for_model(model)
        batch = replace(window_on_meta(self.config, seq_len, stored=stored), key=RandomKey(0, 0))
        factors = [float(main), *(float(k in active) for k in range(1, model.depth + 1))]
        counts = PositionCounts([1] * len(factors), [1] * len(factors), 1)
        plan = StepPlan(
            lambdas=factors, factors=factors, counts=counts, windows=1, micro_batches=[batch]
        )
        loss, *_ = micro_batch_loss(model, objective, plan, batch)
        if loss.requires_grad:
            loss.backward()
        if scope is not None:
            from mtp_lightning.objective.balance.gradients import add_gradients, shared_parameters

            shared = shared_parameters(model, scope)
            size = sum(p.numel() for p in shared)
            totals = {k: torch.empty(size, device="meta") for k in (0, *active)}
            add_gradients(model, objective, plan, batch, shared, totals)


@torch.no_grad()
def forward_flops(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of a forward pass over one window, with all depths and their logits."""
    model = config.on_meta()
    with counted_flops() as count:
        batch = window_on_meta(config, seq_len)
        for k, hidden in model(batch).items():
            if k == 0:
                model.head(hidden)
            else:  # the values are not read: any tokens stand for those before the drafts
                model.draft_logits(k, hidden, batch.targets(0))
    return count.total


def window_on_meta(config: ModelConfig, seq_len: int, *, stored: bool = False) -> WindowBatch:
    """One window of T positions without values; with the trunk's states if ``stored``."""
    mtp, width = config.mtp, config.trunk.d_model
    n_tokens = seq_len + mtp.stride * mtp.depth + 1 + mtp.extra_places
    tokens = torch.empty(1, n_tokens, dtype=torch.int64, device="meta")
    return WindowBatch(
        tokens,
        mtp.depth,
        scored=tokens.bool() if mtp.answers_at_once else None,
        stride=mtp.stride,
        extra=mtp.extra_places,
        states=torch.empty(1, 1 + mtp.n_states, seq_len, width, device="meta") if stored else None,
    )


@contextmanager
def counted_flops() -> Iterator[FlopCount]:
    """A context that counts the FLOPs of matrix products, attention included.

    Raises:
        UserError: on the ``meta`` device, a layer reads a tensor's values.
    """
    # trainer.detect_anomaly reads the values of every gradient, and meta tensors have none.
    anomalies = torch.autograd.set_detect_anomaly(False)
    try:
        with anomalies, sdpa_kernel(SDPBackend.MATH), FlopCount() as count:
            yield count
    except RuntimeError as error:
        if "meta" not in str(error).lower():
            raise
        raise UserError(
            "A step's FLOPs are counted on the meta device, whose tensors have no values, and this "
            f"model needs some ({error}): compute with tensors on the input's device, without "
            "item(), tolist() or a mask as an index."
        ) from error


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of the operators called inside, by PyTorch's own formulas.
    PyTorch's ``FlopCounterMode`` refuses ``autograd.grad`` within a pass, which heads side by side
    need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0  # FLOPs so far
        self._inferred: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._result(func, args, kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operator. PyTorch infers shapes on ``meta`` in Python, which takes most
        of a count's time, so the result for equal operands is inferred once."""
        try:
            kind = (func, *map(_shape, args), *((k, _shape(v)) for k, v in kwargs.items()))
            if kind in self._inferred:
                return self._inferred[kind].clone()
        except TypeError:  # an operand of another device, or something that cannot be compared
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        returns = func._schema.returns
        fresh = isinstance(out, Tensor) and out.is_meta and returns[0].alias_info is None
        if fresh and not func._schema.is_mutable:
            self._inferred[kind] = out.clone()
        return out


def _shape(operand: Any) -> Any:
    """The properties of an operand that determine the result's shape.

    Raises:
        TypeError: the operand's values do.
    """
    if isinstance(operand, Tensor):
        if not operand.is_meta:
            raise TypeError
        return operand.shape, operand.stride(), operand.dtype
    return tuple(map(_shape, operand)) if isinstance(operand, list) else (type(operand), operand)
