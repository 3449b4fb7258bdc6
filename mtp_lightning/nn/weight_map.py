"""The weight map: which tensors of a folder in Hugging Face's layout make up a weight here."""

from __future__ import annotations

from dataclasses import dataclass, replace

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MappedWeight:
    """A tensor of this project, and the tensors of a folder that it is made of.

    Attributes:
        own: its name in this project.
        parts: names and shapes of the tensors in the folder, in the order of their rows.
        stacked: the tensor is a stack of this many matrices, whose rows are concatenated in the
            folder; None if it has the same number of axes as its parts.
        order: row i of the tensor is row ``order[i]`` of the concatenated parts; None keeps the
            order.
        copy: the folder may hold this tensor as a copy of ``own``, and must then agree with it.
        precise: whether it stays in float32 in a folder of any dtype.
    """

    own: str
    parts: tuple[tuple[str, Shape], ...]
    stacked: int | None = None
    order: tuple[int, ...] | None = None
    copy: bool = False
    precise: bool = False

    def under(self, prefix: str, hf_prefix: str) -> MappedWeight:
        """The same with prefixes before the names."""
        parts = tuple((f"{hf_prefix}{name}", shape) for name, shape in self.parts)
        return replace(self, own=f"{prefix}{self.own}", parts=parts)


def renamed(name: str, hf_name: str, shape: Shape, *, copy: bool = False) -> MappedWeight:
    """A weight that the folder holds unchanged under another name."""
    return MappedWeight(own=name, parts=((hf_name, shape),), copy=copy)
