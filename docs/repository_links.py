"""Links to Markdown files outside of docs/ lead to the pages of the site that include them.

So a page can link to the file, as one reads it where the repository is shown: a link to
examples/README.md leads to `examples.md` here, whose content is that file.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

_DOCS = Path(__file__).parent
_INCLUDE = re.compile(r"^```\{include\} (\S+)$", flags=re.M)
_LINK = re.compile(r"(?<=\]\()([^)#\s]+\.md)(?=[)#])")


def _pages() -> dict[Path, Path]:
    """The page that includes a file, by the file."""
    found = {_DOCS.parent / "README.md": _DOCS / "index.md"}
    for page in _DOCS.rglob("*.md"):
        for file in _INCLUDE.findall(page.read_text(encoding="utf-8")):
            found[(page.parent / file).resolve()] = page
    return found


def _redirect(app: Sphinx, name: str, source: list[str]) -> None:
    folder = (_DOCS / name).parent
    pages = _pages()

    def target(link: re.Match[str]) -> str:
        page = pages.get((folder / link[0]).resolve())
        return os.path.relpath(page, folder) if page else link[0]

    source[0] = _LINK.sub(target, source[0])


def setup(app: Sphinx) -> None:
    """Have each page's links rewritten as it is read."""
    app.connect("source-read", _redirect)
