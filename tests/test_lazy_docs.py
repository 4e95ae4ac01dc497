"""What the page on lazy logits says is recognised, at which cost, and what it says is built."""

import contextlib
import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.pages import PAGES, example
from support.tiny_models import VOCAB, make
from torch import Tensor, nn

import fastrlhf

PAGE = PAGES["docs/lazy_logits.md"]
IDS = torch.arange(12).view(2, 6) % 7
LABELS = IDS.masked_fill(IDS == 2, -100)
ROW = re.compile(r"^\| `(.+?)` \| (.+) \|$", flags=re.M)
RECOGNISED, BUILT = (
    ROW.findall(PAGE[PAGE.index(begin) : PAGE.index(end)])
    for begin, end in (
        ("\n## What is recognised", "\n### Time against"),
        ("\n## What builds", "\n## Hooks"),
    )
)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A model and its teacher."""
    model = make("Llama")
    teacher = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        teacher.model.norm.weight.mul_(1.1)
    return model, teacher


def asked(expression: str, model: nn.Module, teacher: nn.Module, *, lazy: bool) -> Any:
    """What an expression of the page gives, and the report of it."""
    fastrlhf.lazy_report(clear=True)
    if not lazy:
        found = evaluated(expression, model(IDS).logits, teacher(IDS).logits)
    else:
        with fastrlhf.lazy_logits(model), fastrlhf.lazy_logits(teacher):
            found = evaluated(expression, model(IDS).logits, teacher(IDS).logits)
    return tensors(found), fastrlhf.lazy_report(clear=True)


def evaluated(expression: str, logits: Tensor, teacher: Tensor) -> Any:
    names = {"logits": logits, "teacher": teacher, "ids": IDS, "labels": LABELS, "mask": IDS != 2}
    return eval(expression, {"F": F, "torch": torch, "V": VOCAB, **names})


def tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def gradients(found: list[Tensor], model: nn.Module) -> list[Tensor]:
    total = sum(x.sum() for x in found if x.requires_grad)
    assert isinstance(total, Tensor)
    weights = [x for x in model.parameters() if x.requires_grad]
    return list(torch.autograd.grad(total, weights))


def are_near(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """As near to fp64 as the plain formula, but for few of its roundings."""
    for x, y, z in zip(found, plain, exact, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if not x.is_floating_point():
            assert torch.equal(x, y)
            continue
        size = 8 * torch.finfo(x.dtype).eps * z.abs().max()
        assert (x - z).abs().max() <= 4 * (y - z).abs().max() + size


@pytest.mark.parametrize(("expression", "plans"), RECOGNISED, ids=[x for x, _ in RECOGNISED])
def test_what_the_page_says_is_recognised_costs_what_it_says(models, expression, plans) -> None:
    model, teacher = models
    in_fp64 = [copy.deepcopy(x).double() for x in models]
    for kind, plan in zip(("none", "frozen", "trained"), plans.split(" | "), strict=True):
        for each in (model, in_fp64[0]):
            each.requires_grad_(True)
            each.lm_head.weight.requires_grad_(kind == "trained")
        with torch.set_grad_enabled(kind != "none"):
            found, report = asked(expression, model, teacher, lazy=True)
            plain, _ = asked(expression, model, teacher, lazy=False)
            exact, _ = asked(expression, *in_fp64, lazy=False)
        assert not report.built, report
        assert f"{sum(int(use.plan[:-1]) for use in report.fused)}G" == plan, report
        are_near(found, plain, exact)
        if any(x.requires_grad for x in plain):
            of_all = (gradients(found, model), gradients(plain, model))
            are_near(*of_all, gradients(exact, in_fp64[0]))


@pytest.mark.parametrize(("expression", "instead"), BUILT, ids=[x for x, _ in BUILT])
def test_what_the_page_says_builds_does_and_what_stands_instead_does_not(
    models, expression, instead
) -> None:
    torch.manual_seed(0)
    found, report = asked(expression, *models, lazy=True)
    assert report.built
    torch.manual_seed(0)
    plain, _ = asked(expression, *models, lazy=False)
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))
    for text in re.findall(r"`(logits.*?)`", instead):
        _, report = asked(text, *models, lazy=True)
        assert report.fused and not report.built, report


def test_the_tables_are_read_as_a_whole() -> None:
    assert len(RECOGNISED) == 25 and len(BUILT) == 9


def test_the_example_trains_and_builds_nothing() -> None:
    train = example("def train(model, optimizer", "docs/lazy_logits.md").run()["train"]
    model = make("Llama")
    before = copy.deepcopy(model.state_dict())
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    fastrlhf.lazy_report(clear=True)
    report = train(model, optimizer, [batch, batch])
    assert [use.calls for use in report.fused] == [2] and not report.built
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["amax", "max"])
def test_of_words_with_the_same_logit_one_has_the_gradient(models, name: str) -> None:
    model = copy.deepcopy(models[0])
    shared = {}
    for lazy in (True, False):
        weight = nn.Parameter(torch.zeros(VOCAB, model.config.hidden_size))  # all logits are 0
        model.lm_head.weight = weight
        with fastrlhf.lazy_logits(model) if lazy else contextlib.nullcontext():
            logits = model(IDS).logits
        found = logits.amax(-1) if name == "amax" else logits.max(-1).values
        found.sum().backward()
        shared[lazy] = int((weight.grad != 0).any(1).sum())
    assert shared == {True: 1, False: VOCAB if name == "amax" else 1}
