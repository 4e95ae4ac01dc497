"""The pages that teach: their code runs, it prints what they say, and their figures are measured.

Every block of Python stands by itself, so that a reader can copy it: each runs in a namespace of
its own. A block of text that is introduced by "It prints" is what the block before it prints.
"""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastrlhf

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS.parent / "benchmarks" / "results" / "cpu"
PAGES = [
    *(DOCS / f"{name}.md" for name in ("start", "which_function", "faq", "distributed")),
    *sorted(page for part in ("concepts", "switching") for page in (DOCS / part).glob("*.md")),
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
        names: dict[str, Any] = {"__name__": "__main__"}  # a module that the compiler can import
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_function_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"fastrlhf\.(\w+)\(", text):
        assert hasattr(fastrlhf, name), name


# Figures and pictures.


def figures(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def text_of(page: str) -> str:
    """Without the ends of its lines."""
    return " ".join((DOCS / page).read_text("utf-8").split())


def test_the_figures_of_memory_are_those_of_the_record() -> None:
    peaks = {
        (x["loss"], x["trained"] == "all", x["provider"]): round(x["peak_mib"])
        for x in figures("lazy-logits")["records"]
        if x["dtype"] == "float32"
    }
    shown = []
    for loss in ("DPO, log_softmax and gather", "GRPO, and entropy as a metric"):
        shown += [peaks[loss, False, provider] for provider in ("plain", "lazy_logits")]
    said = "where the head is frozen, {} MiB become {} (DPO) and {} become {} (GRPO"
    assert said.format(*shown) in text_of("concepts/memory.md")
    (sizes,) = {
        (x["sequences"], x["tokens"], x["vocab"]) for x in figures("lazy-logits")["records"]
    }
    said = "on {} sequences of {} tokens with V = {:,}"
    assert said.format(*sizes) in text_of("concepts/memory.md")


def test_the_sizes_under_the_picture_of_fewer_tokens_are_those_of_the_record() -> None:
    sizes = figures("fewer-rows")["sizes"]
    said = "{tokens:,} tokens, V = {vocab:,}, H = {width:,}, {dtype}"
    assert said.format(**sizes) in text_of("concepts/plans.md")
    assert f"V = {figures('numerics')['sizes']['vocab']:,}" in text_of("concepts/numerics.md")


def test_plain_formulas_lose_what_ours_keep() -> None:
    for measured in (x for x in figures("numerics").values() if "errors" in x):
        for name, errors in measured["errors"].items():
            if name.startswith("fastrlhf"):
                assert max(errors) < 2e-6, name
            else:
                assert max(errors) >= 1, name


def test_the_errors_are_measured_as_the_record_has_them() -> None:
    numerics = importlib.import_module("numerics")
    held = figures("numerics")
    assert held["log-prob of a target that leads by"]["nats"] == numerics.LEADS
    for found in (numerics.log_probs(), numerics.penalties()):
        for name, errors in found.items():
            if name.startswith("fastrlhf"):
                assert max(errors) < 2e-6, name


@pytest.mark.parametrize("name", ["matmuls", "memory", "fewer", "tails"])
def test_a_picture_is_what_the_record_draws(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    concepts = importlib.import_module("concepts")
    concepts.draw(name, tmp_path)
    drawn, kept = (folder / f"{name}.svg" for folder in (tmp_path, DOCS / "pictures"))
    # Versions of matplotlib place labels elsewhere by a hair: what is said is the same.
    assert words(drawn) == words(kept)
    assert any(f"pictures/{name}.svg" in page.read_text("utf-8") for page in PAGES)


def words(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", picture.read_text("utf-8"), re.S)
