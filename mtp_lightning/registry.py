"""Configs that a checkpoint may name: every variant registers itself where its class is defined.

A family (the MTP stacks, the attention layers, the feed-forward layers) is a base class; a variant
is a subclass with a name:

    class MTPConfig(Registered, family="mtp"): ...
    class SequentialConfig(MTPConfig, variant="sequential"): ...

A checkpoint stores the variant's name and fields. Reading it builds the platform's own variants,
those that this process has imported already, and those of packages that the caller allows by name;
nothing else is imported, whatever the checkpoint says.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, ClassVar, Self

from mtp_lightning.errors import UserError
from mtp_lightning.stored import require_text

_OWN = __name__.partition(".")[0]


class Registered:
    """Base of a family of configs, which are dataclasses.

    Class arguments:
        family: what a base class is called in messages; it is the key in the config, too.
        variant: a subclass's name, in the YAML's file name and in checkpoints alike.

    Raises:
        UserError: two classes want the same name.
    """

    family: ClassVar[str]
    variant: ClassVar[str]
    _variants: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(
        cls, *, family: str | None = None, variant: str | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls._variants = family, {}
        if variant is None:
            return
        known = cls._variants.get(variant)
        # The same class again (a module that was reloaded) takes its own place.
        if known is not None and _place(known) != _place(cls):
            raise UserError(
                f"{cls.family}={variant} is {_place(known)} already: give {_place(cls)} "
                "another variant name."
            )
        cls.variant = variant
        cls._variants[variant] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint; a variant from outside says where it comes from."""
        module = type(self).__module__
        origin = {} if module.partition(".")[0] == _OWN else {"module": module}
        return {"variant": self.variant, **origin, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, allow: Collection[str] = ()) -> Self:
        """The inverse of :meth:`to_dict`.

        Args:
            data: from a checkpoint; its fields reach the variant's class alone.
            allow: packages that may be imported for a variant of theirs.

        Raises:
            UserError: an unknown variant or field, or a module that is not allowed.
        """
        require_text(data, source=f"the {cls.family} config")
        fields = dict(data)
        variant, module = fields.pop("variant", None), fields.pop("module", None)
        kind = cls.find(variant, module=module, allow=allow)
        try:
            return kind(**fields)
        except TypeError as error:
            raise UserError(
                f"The {cls.family} config does not fit {cls.family}={variant}: {error}."
            ) from error

    @classmethod
    def variants(cls) -> dict[str, type[Self]]:
        """All that are known: the platform's own, and those that were imported, by name."""
        _import_siblings(cls.__module__)
        return dict(cls._variants)

    @classmethod
    def find(cls, variant: Any, *, module: Any = None, allow: Collection[str] = ()) -> type[Self]:
        """The class of a variant's name; arguments and errors as :meth:`from_dict`."""
        if not isinstance(variant, str):
            raise UserError(f"{cls.family} must name a variant, not {variant!r:.80}.")
        if variant not in cls._variants:
            _import_siblings(cls.__module__, only=variant)  # where most are
        if variant not in cls._variants:
            _import_siblings(cls.__module__)
        if variant not in cls._variants and module is not None:
            package = str(module).partition(".")[0]
            if package not in allow:
                raise UserError(
                    f"{cls.family}={variant} is code of the package {package}, which is not "
                    f"imported unasked: say allow=[{package}] if you trust it."
                )
            try:
                importlib.import_module(str(module))
            except ImportError as error:
                raise UserError(
                    f"{cls.family}={variant} needs the module {module}, which cannot be imported "
                    f"({error}): put its folder on PYTHONPATH."
                ) from error
        if variant not in cls._variants:
            known = ", ".join(cls._variants)
            raise UserError(f"{cls.family}={variant} is unknown here; known are {known}.")
        return cls._variants[variant]


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _import_siblings(module: str, *, only: str | None = None) -> None:
    """Import the platform's own modules beside a family's base, which register what they define.

    Args:
        module: the base's.
        only: the name of one of them; None is all.
    """
    name = module.rpartition(".")[0]
    package = importlib.import_module(name)
    for found in pkgutil.iter_modules(package.__path__, prefix=f"{name}."):
        if only in (None, found.name.rpartition(".")[2]):
            importlib.import_module(found.name)
