"""Where the time of a run's step goes: by part of the platform, and by kind of layer, both ways.

Every part and every layer of the model opens a span of PyTorch's profiler. A moment belongs to the
innermost span that is open; one of a backward pass to the layer whose forward pass made the node of
the graph (autograd numbers both alike). So the shares of a step add up to 1.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "part: "
_NODE = "autograd::engine::evaluate_function"
REST = "Lightning"

# Methods of a callback that are called in every step.
_HOOKS = ("on_train_batch_start", "on_train_batch_end")


class StepProfile(Callback):
    """Watches some steps of a run; the last of its callbacks.

    Args:
        first: optimizer steps done before the first one that is watched.
        n_steps: how many.
    """

    def __init__(self, first: int, n_steps: int) -> None:
        self.first = first
        self.n_steps = n_steps
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._patches = ExitStack()
        self._whole = record_function(_MARK + REST)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin or end to watch: what is between two calls is a whole step."""
        if trainer.global_step == self.first:
            self._patches.enter_context(_labelled(trainer, pl_module))
            self._profile.start()
            self._whole.__enter__()
        elif trainer.global_step == self.first + self.n_steps:
            self._whole.__exit__(None, None, None)
            self._profile.stop()
            self._patches.close()

    def rows(self) -> list[dict[str, Any]]:
        """``part``, ``ms`` a step and ``share`` of it, the largest first."""
        spent = _by_part(list(self._profile.events()))
        total = sum(spent.values())
        return [
            {"part": part, "ms": us / 1e3 / self.n_steps, "share": us / total}
            for part, us in sorted(spent.items(), key=lambda item: -item[1])
        ]


def _by_part(events: list[Any]) -> dict[str, float]:
    """Microseconds of every part of the watched steps."""
    makers: dict[int, Any] = {}  # number of a node -> the newest forward operator that has it
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith(_NODE) and not _in_node(event):
            makers[event.sequence_nr] = event

    @functools.cache
    def part_of(event: Any) -> str | None:
        if event.name.startswith(_MARK):
            return str(event.name.removeprefix(_MARK))
        if event.name.startswith(_NODE):
            maker = makers.get(event.sequence_nr)
            found = None if maker is None else part_of(maker)
            return "gradients of weights, added up" if found is None else f"{found}, backward"
        return None if event.cpu_parent is None else part_of(event.cpu_parent)

    spent: dict[str, float] = defaultdict(float)
    for event in events:
        part = part_of(event)
        if part is not None:  # what stands outside of all spans is not of the watched steps
            spent[part] += event.self_cpu_time_total
    return spent


def _in_node(event: Any) -> bool:
    """Whether an operator belongs to a backward pass, whose operators repeat the node's number."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith(_NODE):
            return True
        if event.name.startswith(_MARK):
            return False
    return False


@contextmanager
def _labelled(trainer: Any, module: Any) -> Iterator[None]:
    """Inside, the parts of a step and the layers of its model open spans."""
    from data_modules.loader import WindowLoader
    from mtp_lightning.module import MTPModule
    from mtp_lightning.objective import step

    connector = type(trainer._logger_connector)
    optimizer = trainer.optimizers[0]
    with ExitStack() as stack:

        def span(owner: Any, name: str, part: str) -> None:
            method = getattr(owner, name)

            @functools.wraps(method)
            def labelled(*args: Any, **kwargs: Any) -> Any:
                with record_function(_MARK + part):
                    return method(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, labelled))

        batches = trainer.fit_loop._data_fetcher.combined_loader._iterator.iterators
        batches[:] = [_Labelled(it) for it in batches]
        stack.callback(lambda: batches.__setitem__(slice(None), [it.inner for it in batches]))
        assert isinstance(trainer.train_dataloader, WindowLoader)
        span(MTPModule, "training_step", "the module's step")
        span(step.OptimizerStep, "loss", "head and losses")
        span(MTPModule, "manual_backward", REST)
        span(torch.Tensor, "backward", "the module's step")
        span(nn.utils, "clip_grad_norm_", "clipping")
        span(optimizer, "step", "optimizer")
        span(optimizer, "zero_grad", "optimizer")
        span(MTPModule, "log_here", "logging")
        span(MTPModule, "log_dict", "logging")
        span(MTPModule, "log", "logging")
        for name in ("on_batch_start", "on_batch_end", "update_train_step_metrics"):
            span(connector, name, "logging")
        for callback in trainer.callbacks:
            if not isinstance(callback, StepProfile):
                for name in _HOOKS:
                    span(callback, name, "callbacks")
        stack.enter_context(_labelled_layers(module.model))
        yield


class _Labelled:
    """An iterator of batches whose work is the data's."""

    def __init__(self, inner: Iterator[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with record_function(_MARK + "data"):
            return next(self.inner)


@contextmanager
def _labelled_layers(model: nn.Module) -> Iterator[None]:
    labels = {}
    for parent in model.modules():
        for child in parent.children():
            kind = type(child).__name__
            of = f" of {type(parent).__name__}" if kind == "Linear" else ""
            labels[child] = _MARK + kind + of
    open_spans: list[Any] = []

    def enter(layer: nn.Module, inputs: Any) -> None:
        if layer in labels:
            open_spans.append(record_function(labels[layer]))
            open_spans[-1].__enter__()

    def leave(layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer in labels:
            open_spans.pop().__exit__(None, None, None)

    hooks = nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
