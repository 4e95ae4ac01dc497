"""What a change of the library is that some test must notice: see `mutants.py`."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: `old`, which stands in the file exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # a pattern of files in tests/, the narrowest selection of which is enough
    select: str = ""  # what pytest takes as -k
    equivalent: str = ""  # why no test can tell it from the original, if none can


def mutants_of(
    file: str, tests: str, *rows: tuple[str, str, str] | tuple[str, str, str, str]
) -> list[Mutant]:
    """Make the mutants of one file that the same tests should notice: name, old, new, selection."""
    return [Mutant(row[0], file, row[1], row[2], tests, *row[3:]) for row in rows]
