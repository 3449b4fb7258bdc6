"""A pass on a GPU as one launch: its kernels recorded once as a CUDA graph, and played again.

A small model's kernels are done before the host has launched the next one. What a graph reads and
writes lies at the addresses of its recording. Caches and tables stay where they are; the rest is
copied to where the graph reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]
# Of the inputs that change from call to call.
Pass = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def as_pass(function: Function, passing: Sequence[Tensor], staying: Sequence[Tensor]) -> Pass:
    """``function(*passing, *staying)`` as a function of ``passing``; on a GPU a recorded one.

    Args:
        function: of tensors of these shapes; it looks at no number on the host.
        passing: what the first call is going to give.
        staying: read and written where they lie, as long as the pass is used.
    """
    if staying[0].device.type == "cuda":
        return Recording(function, passing, staying)
    return lambda passing: function(*passing, *staying)


class Recording:
    """See :func:`as_pass`."""

    def __init__(
        self, function: Function, passing: Sequence[Tensor], staying: Sequence[Tensor]
    ) -> None:
        self._passing = [x.clone() for x in passing]
        # What a graph points to must live as long as the graph.
        inputs = self._inputs = (*self._passing, *staying)
        function(*inputs)  # loads the kernels, which no recording can
        self._replay, self._outputs = record(lambda: function(*inputs))

    def __call__(self, passing: Sequence[Tensor]) -> list[Tensor]:
        for own, given in zip(self._passing, passing, strict=True):
            own.copy_(given)
        self._replay()
        # The next call writes over the outputs.
        return [x.clone() for x in self._outputs]


def record(
    function: Callable[[], Sequence[Tensor]],
) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Kernels that ``function`` launches, as what plays them, and its outputs, which hold numbers
    from the first playing on. Other threads may go on using the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs
