"""Random calls against formulas written a second time, and proof that the budget can fail."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from support.fuzz.cases import MAKERS
from support.fuzz.draw import Draw
from support.fuzz.judge import judge
from support.fuzz.run import run

CASES, BLOCK = 2000, 50


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_random_calls_give_what_their_formulas_say(first) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels of CPU tensors are interpreted, and here they are compiled")
    failures = []
    for seed in range(first, first + BLOCK):
        result = run(seed)
        if result.failure:
            failures.append(f"make fuzz CASES=1 SEED={seed}: {result.name}: {result.failure}")
    assert not failures, "\n".join(failures)


def _spoiled(case, spoil):
    """The case with what the library returns changed."""

    def call(tensors):
        return [None if y is None else spoil(y) for y in case.call(tensors)]

    return replace(case, call=call, twice=False)


def _first_off(y: torch.Tensor) -> torch.Tensor:
    """A twentieth more at the entry that weighs most, or one more of a whole number."""
    if not y.is_floating_point():
        return torch.cat(((y.reshape(-1)[:1] + 1), y.reshape(-1)[1:])).view(y.shape)
    factor = torch.ones_like(y).reshape(-1)
    factor[y.detach().nan_to_num(0, 0, 0).abs().reshape(-1).argmax()] = 1.05
    return y * factor.view(y.shape)


MUTANTS = {
    "another sign": lambda y: -y,
    "a twentieth too much": lambda y: y * 1.05 if y.is_floating_point() else y + 1,
    "a twentieth too much at one entry": _first_off,
    "NaN": lambda y: y * torch.nan if y.is_floating_point() else y + 1,
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("maker", sorted(set(MAKERS), key=lambda maker: maker.__name__))
def test_the_budget_catches_wrong_results(maker, mutant) -> None:
    # Some cases are all zeros, masked or so near a cancellation that nothing is known of them.
    caught = 0
    for seed in range(40):
        draw = Draw(seed)
        case = maker(draw)
        if torch.float16 in {x.dtype for x in case.tensors.values()} or not _numbers(case):
            continue
        verdict = judge(_spoiled(case, MUTANTS[mutant]), draw.generator)
        caught += verdict.failure is not None
        if caught >= 3:
            return
    raise AssertionError(f"{caught} caught")


def _numbers(case) -> bool:
    return all(y is None or y.numel() for y in case.call(dict(case.tensors)))


def test_the_budget_catches_a_missing_part_of_a_gradient() -> None:
    """A gradient of log-probs without the softmax: the target's entry is right."""
    caught = 0
    for seed in range(400):
        draw = Draw(seed)
        case = draw.of(*MAKERS)(draw)
        if case.name != "token_stats" or case.wants != ("logits",):
            continue

        class Halved(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                return torch.where(g == g.amax(-1, keepdim=True), g, 0.0)

        def call(tensors, case=case, function=Halved):
            return case.call({"logits": function.apply(tensors["logits"])})

        verdict = judge(replace(case, call=call, twice=False), draw.generator)
        caught += verdict.failure is not None
    assert caught >= 3
