"""The registry of config classes that a checkpoint may name. A class definition registers itself.

A family (the MTP stacks, the attention layers, the feed-forward layers) is a base class. A variant
is a subclass with a name:

    class MTPConfig(Registered, family="mtp"): ...
    class SequentialConfig(MTPConfig, variant="sequential"): ...

A checkpoint stores the variant's name and fields. Reading it can build this project's variants,
those that this process has already imported, and those of packages that the caller allows by name.
Nothing else is ever imported for a checkpoint.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import ChainMap
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, ClassVar, Self

from mtp_lightning.errors import UserError
from mtp_lightning.stored import require_text

_OWN = __name__.partition(".")[0]


class NotAllowed(UserError):
    """A variant is code of a package that the user has not allowed."""


class Registered:
    """Base of a family of configs, which are dataclasses.

    Class arguments:
        family: name of a base class, in messages and as the key in the config.
        variant: name of a subclass, in checkpoints and as the name of its YAML file.

    Raises:
        UserError: another class has the same name; or, when an object is made, the class has none.
    """

    family: ClassVar[str]
    variant: ClassVar[str]
    # The module of a variant, in the family's folder, where it has another name than the variant.
    modules: ClassVar[dict[str, str]] = {}
    # A class's own fields that are stored unless they have this value, as in older checkpoints.
    newer: ClassVar[dict[str, Any]] = {}
    _variants: ClassVar[dict[str, type[Any]]]
    _home: ClassVar[str]  # the module of the family's base

    def __init_subclass__(
        cls, *, family: str | None = None, variant: str | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls._variants, cls._home = family, {}, cls.__module__
        if variant is None:
            return
        if not is_own(cls):  # this project's variant of the name may not have been imported yet
            _import_siblings(cls._home, cls.modules.get(variant, variant))
        registered = cls._variants.get(variant)
        # A reloaded module may define the same class again.
        if registered is not None and _place(registered) != _place(cls):
            taken, new = sorted((registered, cls), key=lambda kind: not is_own(kind))
            raise UserError(
                f"{cls.family}={variant} is {_place(taken)} already: give {_place(new)} "
                "another variant name."
            )
        cls.variant = variant
        cls._variants[variant] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # A checkpoint finds the class again by this name.
        if cls._variants.get(getattr(cls, "variant", "")) is not cls:
            raise UserError(
                f"{_place(cls)} has no variant name of its own: define it as "
                f'class {cls.__name__}(.., variant="NAME").'
            )
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain containers for a checkpoint. A foreign variant's module is included."""
        origin = {} if is_own(type(self)) else {"module": type(self).__module__}
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        newer = ChainMap(*(vars(kind).get("newer", {}) for kind in type(self).__mro__))
        stored = {k: v for k, v in fields.items() if k not in newer or v != newer[k]}
        return {"variant": self.variant, **origin, **stored}

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, allow: Collection[str] = ()) -> Self:
        """Build a config from the result of :meth:`to_dict`; the packages in ``allow`` may be
        imported for their variants.

        Raises:
            UserError: a variant or field is unknown, or a module is not allowed.
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
        """All known variants by name: this project's, and those that have been imported."""
        _import_siblings(cls.__module__)
        return dict(cls._variants)

    @classmethod
    def find(cls, variant: Any, *, module: Any = None, allow: Collection[str] = ()) -> type[Self]:
        """Find the class of a variant; see :meth:`from_dict` for arguments and errors."""
        if not isinstance(variant, str):
            raise UserError(f"{cls.family} must name a variant, not {variant!r:.80}.")
        for only in (cls.modules.get(variant, variant), None):
            if variant not in cls._variants:
                _import_siblings(cls.__module__, only)
        if variant not in cls._variants and module is not None:
            package = str(module).partition(".")[0]
            if package not in allow:
                raise NotAllowed(
                    f"{cls.family}={variant} is code of the package {package}: if you trust it, "
                    f"say 'allow=[{package}]' (certify and doctor: --allow {package})."
                )
            try:
                importlib.import_module(str(module))
            except ImportError as error:
                raise UserError(
                    f"{cls.family}={variant} needs the module {module}, which cannot be imported "
                    f"({error}): put its folder on PYTHONPATH."
                ) from error
        if variant not in cls._variants:
            names = ", ".join(cls._variants)
            raise UserError(f"{cls.family}={variant} is unknown here; known are {names}.")
        return cls._variants[variant]


def imported(name: str) -> Any:
    """The object of a dotted name, imported on demand: for tables of an option's words."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def is_own(cls: type) -> bool:
    """Whether a class is this project's."""
    return cls.__module__.partition(".")[0] == _OWN


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _import_siblings(module: str, only: str | None = None) -> None:
    """Import the modules in the folder of a family's base, or only the one that is named, which
    register their variants."""
    package = importlib.import_module(module.rpartition(".")[0])
    for sibling in pkgutil.iter_modules(package.__path__):
        if only in (None, sibling.name):
            importlib.import_module(f"{package.__name__}.{sibling.name}")
