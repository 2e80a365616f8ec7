"""Named choices that can be extended from outside: data formats, adapters, optimisers.

Closed choices are a `Literal` and a `match`; a registry is only for what others may add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from luthier.errors import Refused, suggest

Item = TypeVar("Item")
T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from name to object whose misses are clear errors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """Decorator: `@FORMATS.register("alpaca")`. A name can be taken once."""

        def add(item: Item) -> Item:
            if name in self._items:
                raise ValueError(f"{self.kind} '{name}' is registered already")
            self._items[name] = item  # pyright: ignore[reportArgumentType]
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise Refused(
                f"{self.kind} '{name}' was asked for",
                f"known: {', '.join(sorted(self._items))}",
                suggest(name, self._items),
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        return iter(self._items.items())
