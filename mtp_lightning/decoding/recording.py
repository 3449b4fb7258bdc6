"""A pass on a GPU as a CUDA graph: its kernels recorded once, and started together ever after.

A small model's kernels are done before the host has launched the next one. What a graph reads and
writes lies at the addresses of its recording. Caches and tables stay where they are; the rest, a
few tokens and states, is copied to where the graph reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Recording:
    """A recorded function; called, it is played.

    Args:
        function: of tensors of these shapes; it looks at no number on the host.
        passing: its first inputs, as in the first call; the others give numbers of their own.
        staying: the rest, read and written where they lie.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        passing: Sequence[Tensor],
        staying: Sequence[Tensor],
    ) -> None:
        self._passing = [x.clone() for x in passing]
        # What a graph points to must live as long as the graph.
        inputs = self._inputs = (*self._passing, *staying)
        function(*inputs)  # compiles and loads the kernels, which no recording can
        self._play, self._outputs = record(lambda: function(*inputs))

    def __call__(self, *passing: Tensor) -> list[Tensor]:
        for own, given in zip(self._passing, passing, strict=True):
            own.copy_(given)
        self._play()
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
