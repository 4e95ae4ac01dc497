"""The README is short, and what it says of the library is so."""

import re

from support.pages import PAGES, ROOT

import fastrlhf
from fastrlhf.losses.grpo import _GRPO
from fastrlhf.losses.preference import LOSS_TYPES

README = PAGES["README.md"]


def test_it_is_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 150


def test_it_leads_to_every_page_of_the_guides() -> None:
    links = set(re.findall(r"\]\(([^)#]+)", README))
    guides = {page for page in PAGES if page.startswith("docs/guide/")}
    assert len(guides) > 5 and guides <= links, guides - links


def test_the_losses_are_counted_right() -> None:
    assert f"`dpo_loss` ({len(LOSS_TYPES)} types and their sums)" in README
    assert f"GRPO's family of {len(_GRPO)}" in README


def test_the_functions_that_it_names_are_public() -> None:
    table = README[README.index("| you have | you call |") : README.index("## Where to read on")]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 10 and set(names) <= set(fastrlhf.__all__)


def test_the_versions_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', project)
    torch = re.search(r'"torch>=([\d.]+)"', project)
    assert f"Python {python[1]} or newer · PyTorch {torch[1]} or newer" in README


def test_what_the_readme_shows_and_names_is_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures == ["benchmarks/results/cpu/overview.svg"]
    assert all((ROOT / picture).is_file() for picture in pictures)
