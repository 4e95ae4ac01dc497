"""Find out whether a call is run, or traced into a graph.

Checks that read what tensors hold, and code that must not be traced, ask it first; see `checks.py`
and `backend.py`.
"""

from typing import Any, TypeVar

import torch
from torch._guards import TracingContext

Fields = TypeVar("Fields", bound=tuple[Any, ...])


def being_traced() -> bool:
    """Whether PyTorch's compiler or exporter traces this call, so that no tensor holds a value.

    `torch.compiler.is_compiling()` alone is also true in all other threads of a process while one
    of them compiles.
    """
    if not torch.compiler.is_compiling():
        return False
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    return TracingContext.try_get() is not None  # of this thread


def replaced(fields: Fields, **changes: Any) -> Fields:
    """As `fields._replace(**changes)`, for a NamedTuple that outlives a break of the graph.

    The compiler of PyTorch 2.11 fails where code behind the break reads what `_replace` returned.
    """
    return type(fields)(**(fields._asdict() | changes))  # type: ignore[attr-defined]
