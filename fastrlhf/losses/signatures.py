"""Signatures that show the options which a function takes as `**options`.

Type checkers and editors read these from a TypedDict. What looks at a running function instead
(`help`, a notebook's completion) reads its `__signature__`, which is made here.
"""

from collections.abc import Callable, Mapping
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
