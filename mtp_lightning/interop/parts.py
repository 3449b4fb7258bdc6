"""Tensors of files that are read when they are wanted: a model is filled one tensor at a time.

All of a model's tensors at once, beside the model that they fill, would take its memory twice.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.nn.places import Place
from mtp_lightning.opening import Stored


class Part(Stored):
    """One tensor of a file.

    Attributes:
        dtype: as it is stored.
    """

    dtype: torch.dtype

    @abstractmethod
    def read(self) -> Tensor:
        """The numbers, for now: they may lie in the file's pages, and are to be let go of."""

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self.read())


@dataclass(frozen=True)
class Held(Part):
    """One that is in memory already."""

    numbers: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.numbers.dtype

    def read(self) -> Tensor:
        return self.numbers


@dataclass(frozen=True)
class Assembled(Stored):
    """A tensor of this project's, made of those that a layout has for it.

    Attributes:
        place: what lies where.
        parts: in the place's order, of its shapes.
    """

    place: Place
    parts: tuple[Part, ...]

    @property
    def shape(self) -> torch.Size:
        (rows, *rest) = self.parts[0].shape
        rows = sum(part.shape[0] for part in self.parts)
        stacked = self.place.stacked
        return torch.Size((rows, *rest) if stacked is None else (stacked, rows // stacked, *rest))

    def copy_to(self, target: Tensor) -> None:
        rows = target if self.place.stacked is None else target.flatten(0, 1)
        assert rows.data_ptr() == target.data_ptr()
        order = self.place.order
        where = None if order is None else torch.tensor(order).argsort()
        at = 0
        for part in self.parts:
            own = slice(at, at + part.shape[0])
            if where is None:
                part.copy_to(rows[own])
            else:
                rows[where[own]] = part.read().to(rows.dtype)
            at = own.stop


def equal(one: Part, other: Part) -> bool:
    """Whether two hold the same numbers, whatever they are stored as."""
    a, b = one.read(), other.read()
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())
