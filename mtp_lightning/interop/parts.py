"""Tensors of files that are read when needed, so that a model is filled one tensor at a time.

Holding all of a model's tensors next to the model that they fill would double its memory.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.nn.weight_map import MappedWeight
from mtp_lightning.nn.weight_scales import WeightScales
from mtp_lightning.opening import Stored


class Part(Stored):
    """One tensor of a file.

    Attributes:
        dtype: the stored dtype.
    """

    dtype: torch.dtype

    @abstractmethod
    def read(self) -> Tensor:
        """The values, to be used and released: they may be in the file's pages."""

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self.read())


@dataclass(frozen=True)
class Assembled(Stored):
    """A tensor of this project, assembled from those of a layout.

    Attributes:
        mapped: the names and shapes of the parts, and how they are stacked.
        parts: the tensors of the layout, in that order.
    """

    mapped: MappedWeight
    parts: tuple[Part, ...]

    @property
    def shape(self) -> torch.Size:
        (rows, *rest) = self.parts[0].shape
        rows = sum(part.shape[0] for part in self.parts)
        stacked = self.mapped.stacked
        return torch.Size((rows, *rest) if stacked is None else (stacked, rows // stacked, *rest))

    def copy_to(self, target: Tensor) -> None:
        rows = target if self.mapped.stacked is None else target.flatten(0, 1)
        assert rows.data_ptr() == target.data_ptr()
        order = self.mapped.order
        where = None if order is None else torch.tensor(order).argsort()
        at = 0
        for part in self.parts:
            own = slice(at, at + part.shape[0])
            if where is None:
                part.copy_to(rows[own])
            else:
                rows[where[own]] = part.read().to(rows.dtype)
            at = own.stop

    def scales(self) -> WeightScales | None:
        found = [each for part in self.parts if (each := part.scales()) is not None]
        if self.mapped.stacked is not None or len(found) < len(self.parts):
            return None
        return WeightScales.joined(found, self.mapped.order)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, in any stored dtype."""
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())
