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

    They are wanted between `install` and `remove`, and while any thread is inside of `installed`.
    `find` is called when they are put in place. It looks up what to replace, and raises an error
    where it does not know what it finds.
    """

    def __init__(self, find: Callable[[], list[Replacement]]):
        self._find = find
        self._lock = RLock()
        self._wanted = False
        self._inside = 0
        self._before: list[Replacement] = []
        self._there: list[Replacement] = []

    def install(self) -> None:
        """Put the replacements in place, if they are not. A second call changes nothing."""
        with self._lock:
            self._put_in_place()
            self._wanted = True

    def remove(self) -> None:
        """Put back what was there before, once nobody is inside of `installed`.

        Raises:
            RuntimeError: something else has taken the place of a replacement since.
        """
        with self._lock:
            self._wanted = False
            self._put_back_if_unwanted()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the replacements in place within; it may be nested, and left in any order."""
        with self._lock:
            self._put_in_place()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                self._put_back_if_unwanted()

    @property
    def in_place(self) -> bool:
        """Whether the replacements are there now."""
        return bool(self._there)

    def _put_in_place(self) -> None:
        if self._there:
            return
        replacements = self._find()
        # From the owner's own dict: of a class, this is the function and not a bound method.
        self._before = [Replacement(x.owner, x.name, vars(x.owner)[x.name]) for x in replacements]
        self._there = replacements
        for owner, name, value in replacements:
            setattr(owner, name, value)

    def _put_back_if_unwanted(self) -> None:
        if self._wanted or self._inside:
            return
        for owner, name, value in self._there:
            if vars(owner).get(name) is not value:
                raise RuntimeError(
                    f"{owner.__name__}.{name} was patched by other code after fastrlhf, which has "
                    "to be taken back first"
                )
        for owner, name, value in self._before:
            setattr(owner, name, value)
        self._before, self._there = [], []
