"""Docstrings and signatures of this library, as the reference shows them.

The docstrings are Google's style with two liberties, for which napoleon has no parser: several
arguments may share a description, also over two lines, and `Returns:` may be prose, or a list of
named results.
"""

import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress

from sphinx.application import Sphinx
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer

import fastrlhf

# "Args:", "Returns:", or a sentence that ends in a colon, with an indented block below.
_SECTION = re.compile(r"([A-Z].*[^:]):")
_NAMES = re.compile(r"[\w*.]+(?:,\s+[\w*.]+)*:\s+(?=\S)")
_CODE = re.compile(r"(`[^`]*`)")


def restructured(lines: list[str]) -> Iterator[str]:
    """Yield a docstring as reStructuredText: its sections are fields, in them definitions."""
    rest = [line.rstrip() for line in lines]
    before = ""
    while rest:
        line = rest.pop(0)
        block = _indented_part(rest)
        heading = _SECTION.fullmatch(line)
        if heading and block and block[0]:
            if " " in heading[1]:  # a sentence is no name of a field
                yield from (_escaped(line), *_definitions(block), "")
            else:
                yield from ("", f":{heading[1]}:", *_indented(_definitions(block)), "")
            del rest[: len(block)]
        elif line.endswith("::"):
            yield from (_escaped(line), *block)
            del rest[: len(block)]
        elif not before and line[:1].islower() and _NAMES.match(line):  # the fields of a tuple
            end = rest.index("") if "" in rest else len(rest)
            yield from (*_definitions([line, *rest[:end]]), "")
            del rest[:end]
        else:
            yield _escaped(line)
        before = "" if line.endswith(":") and block else line


def _indented_part(lines: list[str]) -> list[str]:
    """What is indented, or empty, at the beginning."""
    end = next((i for i, x in enumerate(lines) if x and not x.startswith(" ")), len(lines))
    return lines[:end]


def _definitions(block: list[str]) -> Iterator[str]:
    """The paragraphs of a section: names with their definitions, examples, or prose."""
    text = textwrap.dedent("\n".join(block)).strip("\n")
    for paragraph in re.split(r"\n\n(?=\S)", text):
        if paragraph.startswith(">>>"):
            yield from ("", *paragraph.splitlines())
            continue
        if not _NAMES.match(paragraph):
            yield from ("", *map(_escaped, paragraph.splitlines()))
            continue
        for entry in re.split(rf"\n(?={_NAMES.pattern})", paragraph):
            names, _, description = entry.partition(":")
            first, _, more = description.strip().partition("\n")
            yield from ("", ", ".join(f"``{name}``" for name in re.split(r",\s+", names)))
            yield from _indented(restructured([first, *textwrap.dedent(more).splitlines()]))


def _indented(lines: Iterator[str]) -> list[str]:
    return textwrap.indent("\n".join(lines), "   ").splitlines()


def _escaped(line: str) -> str:
    """Outside of code, * and | are no markup. A bar that looks like | keeps a table's columns."""
    parts = _CODE.split(line)
    return "".join(
        part if part.startswith("`") else part.replace("*", r"\*").replace("|", "∣")
        for part in parts
    )


def _process(app: Sphinx, what: str, name: str, it: object, options: object, lines: list) -> None:
    lines[:] = restructured(lines)


def _forget_overloads(app: Sphinx) -> None:
    """Overloads tell a type checker what is returned; a reader wants the signature that has all."""
    for name in fastrlhf.__all__:
        analyzer = ModuleAnalyzer.for_module(getattr(fastrlhf, name).__module__)
        with suppress(PycodeError):  # Sphinx cannot parse it, and so sees no overloads there
            analyzer.analyze()
            analyzer.overloads.clear()


def setup(app: Sphinx) -> None:
    """Have signatures and docstrings rewritten as they are read."""
    app.connect("builder-inited", _forget_overloads)
    app.connect("autodoc-process-docstring", _process)
