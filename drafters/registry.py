"""The drafter kinds by name: those of certdraft, and every class that is registered beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from certdraft.drafters.protocol import Drafter

Kind = TypeVar("Kind", bound=type[Drafter])
_KINDS: dict[str, type[Drafter]] = {}


def register_drafter(family: str) -> Callable[[Kind], Kind]:
    """Class decorator that makes a drafter kind known to export, `load_drafter` and `lint_export`.

    Args:
        family: name of the kind, written into the `drafter.json` of its exports.

    Raises:
        ValueError: another class has this name.

    Examples:
        @register_drafter("mine")
        class MyDrafter(Drafter): ...
    """

    def register(kind: Kind) -> Kind:
        known = _KINDS.setdefault(family, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(
                f"drafter family {family!r} is {known.__qualname__} already; choose another name."
            )
        _KINDS[family] = kind  # a module that is loaded again brings the same class
        kind.family = family
        return kind

    return register


def drafter_kinds() -> Mapping[str, type[Drafter]]:
    """Classes by family, in the order of their registration."""
    return MappingProxyType(_KINDS)


def kind_named(family: str, where: object) -> type[Drafter]:
    """Return the class of a family."""
    if family not in _KINDS:
        raise ValueError(
            f"{where} holds a drafter of family {family!r}; known are {', '.join(_KINDS)}. Import the "
            "module that registers your own kind before its folders are loaded."
        )
    return _KINDS[family]
