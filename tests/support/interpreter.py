"""Triton's interpreter, without what takes a third of its time and changes nothing.

At every call of a device function it puts its own operations in the place of the language's, and
to find them looks through all that the language has. The names are the same every time.
"""

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_PARTS = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


def look_up_the_language_once() -> None:
    """Before the first kernel: afterwards some of the language is the interpreter's."""
    builtins = {
        part: [name for name, value in inspect.getmembers(part) if tl.core.is_builtin(value)]
        for part in _PARTS
    }

    def patch(part: Any, builder: Any, *scope: Any) -> None:
        for name in builtins[part]:
            member = getattr(part, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(part, name, member, builder, *scope)

    interpreter._patch_builtin = patch
