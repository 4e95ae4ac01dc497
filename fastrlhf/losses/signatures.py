"""Options that a function takes as `**options`: its signature shows them, and it knows no others.

Type checkers and editors read them from a TypedDict. What looks at a running function instead
(`help`, a notebook's completion) reads its `__signature__`, which is made here.
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


def showing(
    keywords: type, defaults: Mapping[str, Any], *, and_others: bool = False
) -> Callable[[F], F]:
    """Show the keywords of a TypedDict, those that have a default, in place of `**options`, or
    before it, where there can be others.
    """
    kinds = get_type_hints(keywords)
    shown = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in defaults.items()
    ]

    def decorated(function: F) -> F:
        given = signature(function)
        *named, options = given.parameters.values()
        others = [options] if and_others else []
        function.__signature__ = given.replace(  # type: ignore[attr-defined]
            parameters=[*named, *shown, *others]
        )
        return function

    return decorated


# The names that other libraries have for options, and the names of these here.
_ELSEWHERE = {
    "beta": "kl_coef", "epsilon": "clip_low and clip_high", "epsilon_low": "clip_low",
    "epsilon_high": "clip_high", "delta": "dual_clip", "clip_ratio_c": "dual_clip",
    "importance_sampling_level": "ratio_level", "use_bias_correction_kl": "kl_bias_correction",
    "loss_agg_mode": "reduction", "f_divergence_type": "f_divergence",
}  # fmt: skip


def check_options(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for a keyword of a function that is no option."""
    names = tuple(known)
    for name in given:
        if name not in names:
            ours = _ELSEWHERE.get(name, "nothing")
            hint = f", which is {ours} here" if ours.split()[0] in names else ""
            raise TypeError(
                f"{function}: unexpected option {name!r}{hint}; expected one of {', '.join(names)}"
            )
