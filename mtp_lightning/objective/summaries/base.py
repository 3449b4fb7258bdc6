"""What a head that summarises the future is trained on, and its gradient in closed form.

Shapes: R positions of one chunk, V vocabulary, S places ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from mtp_lightning.mtp.summary import Summary


class SummaryTerm(ABC):
    """The loss of one kind of head.

    Class arguments:
        of: the kind.

    Args:
        head: the head, for its settings.
    """

    _known: ClassVar[dict[type[Summary], type[SummaryTerm]]] = {}

    def __init_subclass__(cls, *, of: type[Summary], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SummaryTerm._known[of] = cls

    def __init__(self, head: Any) -> None:
        self.head = head

    @classmethod
    def of_head(cls, head: Summary) -> SummaryTerm:
        """The term that a head is trained on."""
        return cls._known[type(head)](head)

    @abstractmethod
    def gradient(
        self, logits_RV: Tensor, tokens_RS: Tensor, counts_RS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of every position [R], and its derivative by the logits [R, V].

        Args:
            logits_RV: of the head, at least fp32; may be overwritten.
            tokens_RS: ids of the tokens ahead, the nearest first.
            counts_RS: which of them count and are the nearest of their id. Where none does, the
                results must be finite; they are multiplied by 0.
        """
