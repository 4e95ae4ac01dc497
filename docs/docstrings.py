"""The docstrings of this library as reStructuredText.

They are Google's style with two liberties, for which napoleon has no parser: several arguments may
share a description, also over two lines, and `Returns:` may be prose, or a list of named results.
"""

import re
import textwrap
from collections.abc import Iterator

from sphinx.application import Sphinx

# "Args:", "Returns:", or a sentence that ends in a colon, with an indented block below.
_SECTION = re.compile(r"([A-Z].*[^:]):")
_NAMES = re.compile(r"([\w*.]+(?:,\s+[\w*.]+)*):\s+(?=\S)")
_CODE = re.compile(r"(`[^`]*`)")


def restructured(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a docstring, its sections as fields of definition lists."""
    rest = [line.rstrip() for line in lines]
    while rest:
        line = rest.pop(0)
        block = _block_below(rest)
        heading = _SECTION.fullmatch(line)
        if line == "Example:":  # a doctest: code, in which nothing is escaped
            yield from ("", ":Example:", *block, "")
            del rest[: len(block)]
        elif heading and block and rest[0]:
            yield ""
            yield f":{heading[1]}:"
            yield from _indented("\n".join(_entries(block)))
            yield ""
            del rest[: len(block)]
        elif line.endswith("::"):
            yield from (_escaped(line), *block)
            del rest[: len(block)]
        else:
            yield _escaped(line)


def _block_below(lines: list[str]) -> list[str]:
    """What is indented, or empty, at the beginning."""
    for i, line in enumerate(lines):
        if line and not line.startswith(" "):
            return lines[:i]
    return list(lines)


def _entries(block: list[str]) -> Iterator[str]:
    """The lines of a section: named entries as definitions, all else as it is."""
    below_name = False
    for entry in re.split(r"\n(?=\S)", textwrap.dedent("\n".join(block))):
        first, _, more = entry.partition("\n")
        text = f"{first}\n{textwrap.dedent(more)}"
        named = _NAMES.match(text)
        if named is not None:
            names = " ".join(named[1].split()).replace(", ", "``, ``")
            yield from ("", f"``{names}``")
            yield from _indented("\n".join(restructured(text[named.end() :].splitlines())))
        else:
            yield from [""] if below_name else []
            yield from map(_escaped, text.splitlines())
        below_name = named is not None


def _indented(text: str) -> list[str]:
    return textwrap.indent(text, "   ").splitlines()


def _escaped(line: str) -> str:
    """Outside of code, * and | are no markup. A bar that looks like | keeps a table's columns."""
    parts = _CODE.split(line)
    return "".join(
        part if part.startswith("`") else part.replace("*", r"\*").replace("|", "∣")
        for part in parts
    )


def _process(app: Sphinx, what: str, name: str, it: object, options: object, lines: list) -> None:
    lines[:] = restructured(lines)


def setup(app: Sphinx) -> None:
    """Have each docstring rewritten as it is read."""
    app.connect("autodoc-process-docstring", _process)
