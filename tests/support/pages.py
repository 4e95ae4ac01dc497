"""The pages of the documentation, and the examples in them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
# Pages by their path from the root; those of docs/results/ show what benchmarks wrote.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(DOCS.rglob("*.md")),
        *sorted(DOCS.rglob("*.rst")),
    )
}
# Pages whose examples print what the page says: tests/test_guides.py runs those.
PRINTING = (
    "docs/start.md", "docs/which_function.md", "docs/faq.md", "docs/distributed.md",
    "docs/concepts/", "docs/switching/",
)  # fmt: skip


class Block(NamedTuple):
    """A fenced block of code."""

    page: str
    language: str
    code: str

    def run(self) -> dict[str, Any]:
        """Execute it in a namespace of its own, which is returned."""
        names: dict[str, Any] = {}
        exec(compile(self.code, self.page, "exec"), names)
        return names


def blocks(language: str) -> list[Block]:
    """All blocks in a language (a regular expression), also those within a list."""
    return [
        Block(page, language, re.sub(rf"^{indent}", "", code, flags=re.M))
        for page, text in PAGES.items()
        for indent, code in re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.M | re.S)
    ]


def example(definition: str, page: str = "docs/guide/") -> Block:
    """The only example with this in its code, on the pages of which the path begins so."""
    (found,) = (
        block
        for block in blocks("python")
        if block.page.startswith(page) and definition in block.code
    )
    return found
