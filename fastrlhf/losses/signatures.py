"""Options that a function takes as `**options`: its signature shows them, and it knows no others.

Type checkers and editors read them from a TypedDict. What looks at a running function instead
(`help`, a notebook's completion) reads its `__signature__`, which is made here.
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


def showing(keywords: type, defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """Show the keywords of a TypedDict, those that have a default, in place of `**options`."""
    kinds = get_type_hints(keywords)
    shown = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in defaults.items()
    ]

    def decorated(function: F) -> F:
        given = signature(function)
        named = [p for p in given.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        function.__signature__ = given.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
        return function

    return decorated


def check_options(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for a keyword of a function that is no option."""
    names = tuple(known)
    for name in given:
        if name not in names:
            raise TypeError(
                f"{function}: unexpected option {name!r}; expected one of {', '.join(names)}"
            )
