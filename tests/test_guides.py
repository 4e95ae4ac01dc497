"""The pages that teach: their code runs, it prints what they say, and their figures are measured.

Every block of Python stands by itself, so that a reader can copy it: each runs in a namespace of
its own. A block of text that is introduced by "It prints" is what the block before it prints.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastrlhf

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [
    *(DOCS / f"{name}.md" for name in ("start", "which_function", "faq", "distributed")),
    *sorted((DOCS / "concepts").glob("*.md")),
    *sorted((DOCS / "switching").glob("*.md")),
]
CODE = re.compile(
    r"^```python\n(.*?)^```\n(?:\nIt prints[^\n]*:\n\n```text\n(.*?)^```)?", re.M | re.S
)
# Packages that a page on switching from one of them needs.
PACKAGES = "trl|transformers|liger_kernel|peft|accelerate"


class Block(NamedTuple):
    """Code of a page, and what the page says that it prints, or an empty string."""

    page: str
    number: int
    code: str
    prints: str

    def run(self) -> tuple[dict[str, Any], str]:
        """Execute it in a namespace of its own: what it defines, and what it prints."""
        names: dict[str, Any] = {"__name__": self.page}
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(self.code, self.page, "exec"), names)
        return names, said.getvalue()


def blocks() -> list[Block]:
    return [
        Block(page.stem, number, code, prints)
        for page in PAGES
        for number, (code, prints) in enumerate(CODE.findall(page.read_text("utf-8")))
    ]


BLOCKS = blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}-{block.number}")
def test_a_block_runs_by_itself_and_prints_what_the_page_says(block: Block) -> None:
    for name in set(re.findall(rf"^(?:from|import) ({PACKAGES})\b", block.code, re.M)):
        pytest.importorskip(name, reason=f"needs {name}")
    names, printed = block.run()
    for name in ("trl", "transformers"):  # what a block patches
        if hasattr(names.get(name), "unpatch"):
            names[name].unpatch()
    assert near(printed, block.prints) if block.prints else True


NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def near(printed: str, said: str) -> bool:
    """Whether two texts are the same but for the last digits of their numbers."""
    found, wanted = (text.split() for text in (printed, said))
    if len(found) != len(wanted):
        return False
    return all(
        NUMBER.sub("", x) == NUMBER.sub("", y)
        and [float(n) for n in NUMBER.findall(x)]
        == pytest.approx([float(n) for n in NUMBER.findall(y)], rel=2e-3, abs=1e-4)
        for x, y in zip(found, wanted, strict=True)
    )


def test_another_number_or_another_word_is_noticed() -> None:
    assert near("loss 0.69315 at 3", "loss  0.6932 at 3")
    for other in ("loss 0.6982 at 3", "gain 0.6932 at 3", "loss 0.6932 at 4", "loss 0.6932 at"):
        assert not near("loss 0.69315 at 3", other)


def test_every_page_has_code_and_every_name_on_it_is_there() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        assert len(text.splitlines()) > 20, page
        for name in re.findall(r"fastrlhf\.(\w+)\(", text):
            assert hasattr(fastrlhf, name), (page, name)
