"""Named things: a duplicate is refused, an unknown name suggests near ones, a package is imported on first use."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from edgeattn.errors import UsageError

Item = TypeVar("Item")


def near(name: str, names: list[str]) -> str:
    """Return "; did you mean a or b?" for the names close to `name`, or "" when none is."""
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class Registry(Generic[Item]):
    """A dictionary of `kind` filled by importing every public module of `package`."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._items: dict[str, Item] = {}
        self._loaded = False

    def add(self, name: str, item: Item) -> None:
        """Register `item`; a second one of the same name is a bug in the package."""
        if name in self._items:
            raise ValueError(f"{name}: two definitions of this {self.kind}")
        self._items[name] = item

    def get(self, name: str) -> Item:
        """Return the item called `name`, or raise EA0101 with the nearest names."""
        self._load()
        if name not in self._items:
            raise UsageError("EA0101", f"{name}: no such {self.kind}{near(name, list(self._items))}")
        return self._items[name]

    def names(self) -> list[str]:
        """Return all names, in order of registration within alphabetically ordered modules."""
        self._load()
        return list(self._items)

    def __iter__(self) -> Iterator[Item]:
        self._load()
        return iter(list(self._items.values()))

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._items

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
            if not module.startswith("_"):
                importlib.import_module(f"{self.package}.{module}")
