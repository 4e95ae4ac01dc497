"""Attributes of other people's modules, replaced for a while and put back exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """`owner.name = value`."""

    owner: Any  # a module or a class
    name: str
    value: Any


class Replacements:
    """Replacements that are in place while anybody wants them to be.

    That is between `install` and `remove`, and as long as somebody is inside of `installed`, from
    whatever threads. `find` looks for what is to be replaced, when it first is, and raises where it
    does not know what it finds.
    """

    def __init__(self, find: Callable[[], list[Replacement]]):
        self._find = find
        self._lock = RLock()
        self._wanted = False
        self._inside = 0
        self._before: list[Replacement] = []

    def install(self) -> None:
        """Put the replacements in place, if they are not."""
        with self._lock:
            self._put_in_place()
            self._wanted = True

    def remove(self) -> None:
        """Put back what was there before, unless somebody is inside of `installed`."""
        with self._lock:
            self._wanted = False
            self._put_back_if_unwanted()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the replacements in place within."""
        with self._lock:
            self._put_in_place()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                self._put_back_if_unwanted()

    def original(self, owner: Any, name: str) -> Any:
        """What stood, or stands, where a replacement is."""
        with self._lock:
            for before in self._before:
                if before.owner is owner and before.name == name:
                    return before.value
        return vars(owner)[name]

    def _put_in_place(self) -> None:
        if self._before:
            return
        for owner, name, value in self._find():
            # What the owner itself has: of a class, the function and not what is bound to it.
            self._before.append(Replacement(owner, name, vars(owner)[name]))
            setattr(owner, name, value)

    def _put_back_if_unwanted(self) -> None:
        if self._wanted or self._inside:
            return
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._before = []
