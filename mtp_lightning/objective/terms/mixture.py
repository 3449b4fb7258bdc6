"""Several terms at once, each with a weight."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

import mtp_lightning.objective.terms as terms_package
from mtp_lightning.errors import UserError
from mtp_lightning.objective.terms.base import Chunk, Term
from mtp_lightning.settings import require_number


class Mixture(Term):
    """``objective=mix``: ``L_k = sum_TERM weight_TERM * L_k/TERM``.

    Args:
        terms: a term's name -> its weight, or ``{weight: 0.5, ..}`` with settings of the term, or
            ``{weight: 0.5, term: ..}`` with a term of the user's own.

    Raises:
        UserError: a name is unknown, a weight is not above 0, a term refuses a setting or occurs
            twice, or all terms are of hidden states.
    """

    name = "mix"

    def __init__(self, terms: Mapping[str, Any]) -> None:
        if not isinstance(terms, Mapping) or not terms:
            raise UserError(
                "objective.terms names no term: give words and weights, like "
                "'objective.terms={ce: 0.1, tv: 0.9}'."
            )
        self._parts: dict[str, tuple[float, Term]] = {}
        self._words = ", ".join(map(str, terms))
        for word, entry in terms.items():
            weight, term = _term(str(word), entry)
            for share, part in term.parts():
                if part.name in self._parts:
                    raise UserError(
                        f"objective.terms has {part.name} twice (with {word}): name it once."
                    )
                self._parts[part.name] = weight * share, part
        if all(part.of_state for _, part in self._parts.values()):
            raise UserError(
                f"{self.setting} does not train what the depths predict: add a term that does, "
                "such as ce or kl."
            )

    @property
    def setting(self) -> str:
        return f"objective.terms={{{self._words}}}"  # objective=anchor is a mixture, too

    def parts(self) -> Iterator[tuple[float, Term]]:
        yield from self._parts.values()

    def value(self, chunk: Chunk) -> Tensor:
        raise AssertionError("the parts of a mixture are computed separately")


def known_terms() -> dict[str, type[Term]]:
    """The project's own terms, and those of imported modules, by name."""
    for module in pkgutil.iter_modules(terms_package.__path__, prefix=f"{terms_package.__name__}."):
        importlib.import_module(module.name)
    kinds = _subclasses(Term)  # type: ignore[type-abstract]
    return {kind.name: kind for kind in kinds if kind is not Mixture}


def _subclasses(kind: type[Term]) -> Iterator[type[Term]]:
    for sub in kind.__subclasses__():
        if not inspect.isabstract(sub) and "name" in vars(sub) and sub.selectable:
            yield sub
        yield from _subclasses(sub)


def _term(word: str, entry: Any) -> tuple[float, Term]:
    """A term and its weight, from an entry of the config."""
    settings = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
    weight = settings.pop("weight", None)
    weight = require_number(f"the weight of {word} in objective.terms", weight, above=0)
    term = settings.pop("term", None)
    if term is not None:
        if not isinstance(term, Term) or settings:
            raise UserError(
                f"objective.terms.{word} must be {{weight: .., term: {{_target_: .., ..}}}}, with "
                "the settings next to the term's own _target_."
            )
        return weight, term
    terms = known_terms()
    if word not in terms:
        raise UserError(
            f"objective.terms has {word}, which is unknown: choose among {', '.join(terms)}."
        )
    try:
        return weight, terms[word](**settings)
    except TypeError as error:
        raise UserError(f"objective.terms.{word} refuses its settings: {error}.") from error
