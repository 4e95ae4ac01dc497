"""Divergences of rows that are hostile: words that one side or both rule out, rows of nothing but
minus infinity, NaN, and rows that a mask leaves out.
"""

import pytest
import torch
from support.compare import assert_as_accurate
from support.divergence_formulas import (
    BACKENDS,
    IMPLS,
    KINDS,
    MEASURES,
    assert_close_to_oracle,
    assert_rows_as_accurate,
    evaluate,
    oracle,
    random_pair,
)
from support.plain import of_rows
from torch import autograd

import fastrlhf


def masked_vocabularies(device, vocab=5000):
    """Logits of both sides with -inf at the same places of each row, several tiles in all."""
    logits, ref = random_pair(5, vocab, device)
    for x in (logits, ref):
        x[0, :2100] = -torch.inf  # whole tiles at the start
        x[1, 1000:] = -torch.inf
        x[2, ::2] = -torch.inf
        x[3] = -torch.inf
        x[3, 4000] = 3.0  # nothing but one token
        x[4, :-1:3] = -torch.inf
    return logits, ref


@BACKENDS
@KINDS
def test_masked_vocabulary_makes_no_nan_wherever_it_stands(impl, measure, device) -> None:
    logits, ref = masked_vocabularies(device)
    options = MEASURES[measure] | {"temperature": 0.7}
    expected = oracle(logits, ref, **options)
    found = evaluate(logits, ref, impl=impl, **options)
    plain = of_rows(logits, ref, None, None, **options)
    assert_as_accurate(found[0], plain[0], expected[0], size=1.0)
    regular = [0, 1, 2, 4]
    every = torch.ones(4, dtype=torch.bool)
    for own, by_plain, exact in zip(found[1:], plain[1:], expected[1:], strict=True):
        assert own.isfinite().all()
        assert_rows_as_accurate(own[regular], by_plain[regular], exact[regular], every, 32.0)
        assert_as_accurate(own[3], by_plain[3], exact[3], size=1.0)


@BACKENDS
@KINDS
def test_masked_vocabulary_makes_no_nan_in_a_gradient_to_be_differentiated(
    impl, measure, device
) -> None:
    logits, ref = (x[:, :40].detach() for x in masked_vocabularies(device))
    ref[2:4, 7] = logits[2:4, 7] = 1.0  # no row is empty
    logits[0, :9], ref[0, :9] = 1.0, 2.0
    expected = evaluate(logits, ref, impl=impl, **MEASURES[measure])[1:]
    sides = logits.requires_grad_(), ref.requires_grad_()
    values = fastrlhf.kl_divergence(*sides, impl=impl, **MEASURES[measure])
    found = autograd.grad(values.sum(), sides, create_graph=True)
    exact = oracle(logits, ref, **MEASURES[measure])[1:]
    for a, b, right in zip(found, expected, exact, strict=True):
        assert_as_accurate(a, b, right)
    norms = sum(gradient.square().sum() for gradient in found)
    assert all(gradient.isfinite().all() for gradient in autograd.grad(norms, sides))


@BACKENDS
def test_where_only_one_side_is_possible(impl, device) -> None:
    logits, ref = random_pair(2, 3000, device)
    ref[0, 5] = ref[1, :2500] = -torch.inf
    for direction, wide, narrow in (("reverse", logits, ref), ("forward", ref, logits)):
        values = fastrlhf.kl_divergence(wide, narrow, direction=direction, impl=impl)
        assert (values == torch.inf).all()
        # The other way round, terms without probability are nothing, whatever the other side is.
        options = {"direction": direction}
        found = evaluate(narrow, wide, impl=impl, **options)
        plain = of_rows(narrow, wide, None, None, **options)
        assert_close_to_oracle(found, plain, oracle(narrow, wide, **options))
    # The mixture of a jsd is possible wherever a side is.
    for beta in (0.1, 0.5):
        options = {"direction": "jsd", "beta": beta}
        found = evaluate(logits, ref, impl=impl, **options)
        plain = of_rows(logits, ref, None, None, **options)
        assert_close_to_oracle(found, plain, oracle(logits, ref, **options))


@BACKENDS
@pytest.mark.parametrize("gap", [40.0, 140.0, 1e4])
def test_a_probability_that_rounds_to_zero_counts_as_zero(impl, gap, device) -> None:
    # Token 1 is impossible for the reference and, but for a gap of 40, too unlikely for fp32. (The
    # others make a wide row, in which one lane of a kernel never sees the likeliest token.)
    logits = torch.full((1, 3000), -0.5 * gap, device=device)
    ref = torch.zeros(1, 3000, device=device)
    logits[0, 0], logits[0, 1], ref[0, 1] = 0.0, -gap, -torch.inf
    values, d_logits, d_ref = evaluate(logits, ref, impl=impl)
    if gap == 40:
        assert values == torch.inf
        return
    without = torch.arange(3000, device=device) != 1
    expected = evaluate(logits[:, without], ref[:, without], impl=impl)
    exact = oracle(logits[:, without], ref[:, without], direction="reverse")[0]
    # Of log-ratios as large as the gap.
    assert_as_accurate(values, expected[0], exact, size=max(gap, float(exact)))
    assert d_logits.isfinite().all() and d_ref.isfinite().all()


@BACKENDS
@KINDS
def test_a_row_of_nothing_but_minus_infinity(impl, measure, device) -> None:
    logits, ref = random_pair(3, 60, device)
    logits[0], ref[1] = -torch.inf, -torch.inf
    logits[2] = ref[2] = -torch.inf
    values, *gradients = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    assert not values.isnan().any() and values[2] == 0
    # Without a distribution on the side that is averaged over, there is nothing to add up; on the
    # other, nothing is possible.
    if measure in ("reverse", "forward"):
        expected = [0.0, torch.inf] if measure == "reverse" else [torch.inf, 0.0]
        assert values[:2].tolist() == expected
    for gradient in gradients:
        assert not gradient[2].any()
        assert not gradient[:2][values[:2].isfinite()].isnan().any()


@KINDS
def test_all_backends_agree_on_a_side_of_nothing_but_minus_infinity(measure, device) -> None:
    logits, ref = random_pair(2, 60, device)
    logits[0], ref[1] = -torch.inf, -torch.inf
    eager, *others = (
        fastrlhf.kl_divergence(logits, ref, impl=impl, **MEASURES[measure]) for impl in IMPLS
    )
    for other in others:
        torch.testing.assert_close(eager, other)


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
@pytest.mark.parametrize(
    ("side", "garbage"),
    [("policy", torch.nan), ("reference", torch.nan), ("both", torch.nan), ("both", torch.inf)],
)
def test_a_live_row_with_garbage_says_nan_and_leaves_the_others_alone(
    impl, measure, garbage, side, device
) -> None:
    logits, ref = random_pair(3, 100, device)
    clean = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    if side != "reference":
        logits[1, 50] = garbage
    if side != "policy":
        ref[1, 50] = garbage
    found = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    assert found[0][1].isnan()
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_are_exactly_zero_whatever_they_hold(impl, measure, garbage, device) -> None:
    logits, ref = random_pair(5, 70, device)
    mask = torch.tensor([0, 1, 0, 0, 1], device=device)
    logits[0] = ref[2] = logits[3] = ref[3] = garbage
    g = torch.tensor([torch.nan, 1.0, torch.inf, 1.0, 2.0], device=device)
    own = torch.tensor([torch.nan, 0.5, 0.0, -1.0, 2.0], device=device)
    found = evaluate(
        logits, ref, g=g, mask=mask, temperature=own, softcap=30.0, impl=impl, **MEASURES[measure]
    )
    for x in found:
        assert not x[mask == 0].any()
        assert x[mask == 1].isfinite().all() and x[mask == 1].any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_of_any_dtype(impl, dtype, device) -> None:
    logits, ref = random_pair(3, 20, device)
    mask = torch.tensor([1, 0, 1], device=device)
    found = fastrlhf.kl_divergence(logits, ref, mask=mask.to(dtype), impl=impl)
    assert torch.equal(found, fastrlhf.kl_divergence(logits, ref, impl=impl) * mask)


@BACKENDS
def test_a_mask_of_nothing(impl, device) -> None:
    logits, ref = (torch.full((2, 3, 9), torch.nan, device=device) for _ in range(2))
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    for x in evaluate(logits, ref, mask=mask, impl=impl):
        assert not x.any()
