"""Whatever is done with lazy logits, in whatever order, gives what it gives with plain ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import budget
from support.lazy_and_plain import (
    CLOSE,
    IDS,
    MODEL,
    VOCAB,
    assert_same_tensors,
    form_of,
    hidden_states,
    lazily_or_not,
    logprobs_of_ids,
    make_model,
)
from support.lazy_programs import ENDS, MAPS, OPERATIONS, VIEWS, WRITES, Step, run

# Random programs


def _total(values: list[tuple[str, Tensor | str]], chosen: list[bool]) -> Tensor:
    """A loss of some of what a program returned; what is not finite counts as zero."""
    total = torch.zeros((), dtype=torch.float64, requires_grad=True) * 0
    for n, ((_, x), is_chosen) in enumerate(zip(values, chosen, strict=True)):
        if is_chosen and isinstance(x, Tensor) and x.requires_grad:
            torch.manual_seed(n)
            weights = torch.randn(x.shape, dtype=torch.float64)
            total = total + (x.double().nan_to_num(0, 0, 0) * weights).sum()
    return total


def _gradients(total: Tensor, hidden: Tensor) -> list[Any]:
    """Gradients, zero where there are none; nothing where PyTorch refuses, since something that it
    has kept was written into.
    """
    inputs = [hidden, MODEL.lm_head.weight]
    try:
        found = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "is a view" in str(error)
        return []
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _outcome(
    program: list[Step], shape: list[int], lazy: bool, first: list[bool] | None = None
) -> Any:
    """What a program returns; the gradients of a loss of what is fused of that; and of one of all,
    for which the logits are built.
    """
    with lazily_or_not(lazy):
        hidden = hidden_states(*shape).requires_grad_()
        logits = MODEL.lm_head(hidden)
        values = run(program, logits)
        if first is None:  # what is no tensor over the vocabulary any more
            first = [type(x) is Tensor for _, x in values]
        fused = _gradients(_total(values, first), hidden)
        everything = _gradients(_total(values, [True] * len(values)), hidden)
        needs = [isinstance(x, Tensor) and x.requires_grad for _, x in values]
        read = [x.detach() + 0 if isinstance(x, Tensor) else x for _, x in [*values, ("", logits)]]
        forms = [form_of(x) for _, x in values if isinstance(x, Tensor)]
    return first, (read, needs, forms), fused, everything


def _assert_as_plain(program: list[Step], shape: list[int]) -> None:
    refused = None
    try:
        first, values, *gradients = _outcome(program, shape, True)
    except RuntimeError as error:  # such as of a view that PyTorch lets nobody write into
        first, refused = [False] * 1000, error
    try:
        _, plain_values, *plain = _outcome(program, shape, False, first)
    except (RuntimeError, ValueError) as error:
        assert (
            refused is None or str(refused)[:30] == str(error)[:30] or isinstance(error, ValueError)
        )
        return
    assert refused is None, refused
    assert values[1:] == plain_values[1:]
    for n, (a, b) in enumerate(zip(values[0], plain_values[0], strict=True)):
        assert_same_tensors(a, b, f"result {n}")
    for some, of_plain in zip(gradients, plain, strict=True):
        if of_plain:  # else plain logits have none
            for a, b in zip(some, of_plain, strict=True):
                assert torch.allclose(a, b, **CLOSE), "gradient"


_PRECISE = [x for x in OPERATIONS if x not in ("float", "F.log_softmax", "to")]
_FUSED = [x for x in (*VIEWS, *MAPS, *ENDS) if x in _PRECISE]


def _programs(names: list[str], size: int) -> Any:
    numbers = st.integers(0, 7)
    of = st.sampled_from([0, 0, 0, 1, 2])
    step = st.builds(Step, st.sampled_from(names), of, numbers, numbers)
    return st.lists(step, min_size=1, max_size=size)


_SHAPES = st.sampled_from([[2, 3], [3], [1, 2], [2, 1, 2]])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(program=_programs(_FUSED, 5), shape=_SHAPES)
def test_programs_of_known_functions(program, shape) -> None:
    _assert_as_plain(program, shape)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(program=_programs([*_PRECISE, *WRITES], 6), shape=_SHAPES)
def test_programs_of_all_functions_and_writes(program, shape) -> None:
    _assert_as_plain(program, shape)


def _low_precision_programs() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "log-probs": lambda z: -logprobs_of_ids(z).mean(),
        "log-probs in fp32": lambda z: -logprobs_of_ids(z.float() / 0.7).mean(),
        "cross-entropy": lambda z: F.cross_entropy(z.view(-1, VOCAB), IDS.view(-1)),
        "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
        "sums": lambda z: (z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)).mean(),
        "built": lambda z: logprobs_of_ids(z.div_(2).masked_fill_(z > 0.5, -1.0)).mean(),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _low_precision_programs())
def test_low_precision(name, dtype, autocast) -> None:
    """As near to fp64 as the plain loop, with values of the same dtype."""
    program, model = _low_precision_programs()[name], make_model()

    def outcome(dtype: torch.dtype, lazy: bool, autocast: bool) -> list[Tensor]:
        with (
            lazily_or_not(lazy, model.to(dtype)),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            hidden = hidden_states(2, 3).bfloat16().to(dtype).requires_grad_()
            loss = program(model.lm_head(hidden))
        return [loss, *torch.autograd.grad(loss, [hidden, model.lm_head.weight])]

    model.to(torch.bfloat16)  # the same weights for all
    exact = outcome(torch.float64, False, False)
    plain, found = (outcome(dtype, lazy, autocast) for lazy in (False, True))
    rounding = torch.bfloat16 if autocast else dtype
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.dtype is b.dtype
        error, of_plain = (float((x.double() - c).detach().norm()) for x in (a, b))
        assert error <= budget(of_plain, rounding, float(c.detach().norm()))
