"""Where a weight lies in a folder of Hugging Face's layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor here, and the tensors of a folder that it is made of.

    Attributes:
        own: its name here.
        parts: names and shapes there, in the order of their rows.
        stacked: the tensor here is so many matrices of one shape, whose rows lie on top of each
            other there; None if it has their number of axes.
        order: row i here is row ``order[i]`` of all parts' rows on top of each other; None leaves
            them.
        copy: the folder may hold it, and then it must be equal to what ``own`` has already.
        precise: stays in float32 whatever the folder's dtype.
    """

    own: str
    parts: tuple[tuple[str, Shape], ...]
    stacked: int | None = None
    order: tuple[int, ...] | None = None
    copy: bool = False
    precise: bool = False

    def under(self, own: str, theirs: str) -> Place:
        """The same with prefixes before the names."""
        parts = tuple((f"{theirs}{name}", shape) for name, shape in self.parts)
        return replace(self, own=f"{own}{self.own}", parts=parts)


def renamed(own: str, theirs: str, shape: Shape, *, copy: bool = False) -> Place:
    """A weight that is the same there, under another name."""
    return Place(own=own, parts=((theirs, shape),), copy=copy)
