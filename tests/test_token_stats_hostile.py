"""Token statistics of hostile rows: vocabulary that is masked, NaN, infinite logits, rows that are
ignored, and empty shapes.
"""

import pytest
import torch
from support.compare import assert_as_accurate, assert_gradient_as_accurate
from support.oracle import token_stats_oracle
from support.plain import of_tokens, plain_token_stats
from support.token_stats_rows import BACKENDS, evaluate

import fastrlhf


@BACKENDS
def test_masked_vocabulary_makes_no_nan_wherever_it_stands(impl, device) -> None:
    vocab = 40000  # more than two splits
    logits = torch.randn(7, vocab, device=device)
    targets = torch.randint(20000, 30000, (7,), device=device)
    logits[0, :4096] = -torch.inf  # whole tiles at the start
    logits[1, :16384] = -torch.inf  # a whole split at the start
    logits[2, 16384:] = -torch.inf
    targets[2] = 5
    logits[3, ::2] = -torch.inf
    targets[3] = 20001
    logits[4, targets[4]] = -torch.inf  # the target itself
    logits[5] = -torch.inf
    logits[5, targets[5]] = 3.0  # nothing but the target
    logits[6] = -torch.inf  # nothing at all
    g, h = torch.ones(7), torch.full((7,), 0.5)
    expected = token_stats_oracle(logits, targets, g=g, h=h)
    stats, gradient = evaluate(logits, targets, g=g.to(device), h=h.to(device), impl=impl)
    plain = plain_token_stats(logits, targets)
    for name, by_plain in zip(("logprob", "entropy"), plain[:2], strict=True):
        exact = getattr(expected, name)
        assert_as_accurate(getattr(stats, name), by_plain, exact, of=name)
    assert stats.logprob[4] == stats.logprob[6] == -torch.inf
    assert stats.logprob[5] == 0 and stats.entropy[5] == 0
    assert not gradient[6].any()
    regular = [0, 1, 2, 3]
    _, by_plain = of_tokens(logits[:5], targets[:5], *(x.to(device) for x in (g[:5], h[:5])))
    assert_gradient_as_accurate(
        gradient[regular], by_plain[regular], expected.gradient[regular], targets[regular]
    )
    assert_as_accurate(gradient[4], by_plain[4], expected.gradient[4], of="gradient")
    assert not gradient.isnan().any()


@BACKENDS
def test_a_live_row_with_nan_says_nan_and_leaves_the_others_alone(impl, device) -> None:
    logits = torch.randn(3, 100, device=device)
    targets = torch.tensor([1, 2, 3], device=device)
    clean, clean_gradient = evaluate(logits, targets, h=torch.ones(3), impl=impl)
    logits[1, 50] = torch.nan
    stats, gradient = evaluate(logits, targets, h=torch.ones(3), impl=impl, softcap=None)
    assert stats.logprob[1].isnan() and stats.entropy[1].isnan() and gradient[1].isnan().any()
    for row in (0, 2):
        assert stats.logprob[row] == clean.logprob[row]
        assert torch.equal(gradient[row], clean_gradient[row])


@BACKENDS
@pytest.mark.parametrize("vocab", [1, 2, 100, 20000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_row_of_nothing_but_nan_says_nan(impl, vocab, softcap, device) -> None:
    logits = torch.full((2, vocab), torch.nan, device=device)
    targets = torch.tensor([0, vocab - 1], device=device)
    h = torch.ones(2, device=device)
    stats, gradient = evaluate(logits, targets, h=h, impl=impl, softcap=softcap)
    for value in (stats.logprob, stats.entropy, stats.lse, gradient):
        assert value.isnan().all()


@BACKENDS
@pytest.mark.parametrize("at_target", [True, False])
def test_an_infinite_logit_says_nan_as_log_softmax_does(impl, at_target, device) -> None:
    logits = torch.randn(1, 50, device=device)
    logits[0, 7] = torch.inf
    targets = torch.tensor([7 if at_target else 8], device=device)
    stats, gradient = evaluate(logits, targets, impl=impl)
    assert stats.logprob.isnan().all() and gradient.isnan().any()


@BACKENDS
def test_a_live_nan_passes_through_the_cap(impl, device) -> None:
    logits = torch.randn(1, 10, device=device)
    logits[0, 4] = torch.nan
    stats, _ = evaluate(logits, torch.tensor([2], device=device), impl=impl, softcap=5.0)
    assert stats.logprob.isnan().all()


@BACKENDS
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(impl, garbage, inplace, device) -> None:
    logits = torch.randn(4, 70, device=device)
    targets = torch.tensor([-100, 5, -100, 69], device=device)
    logits[0], logits[2] = garbage, garbage
    g = torch.tensor([torch.nan, 1.0, torch.inf, 2.0], device=device)
    stats, gradient = evaluate(
        logits, targets, g=g, h=g, impl=impl, inplace_backward=inplace, softcap=3.0
    )
    for value in (stats.logprob, stats.entropy, stats.lse, gradient):
        assert not value[[0, 2]].any()
        assert value[[1, 3]].isfinite().all()


@BACKENDS
def test_any_integer_can_mark_ignored_targets(impl, device) -> None:
    logits = torch.randn(3, 10, device=device)
    for ignore_index, targets in ((0, [0, 1, 2]), (-1, [-1, 1, 2]), (7, [7, 1, 2])):
        index = torch.tensor(targets, device=device)
        stats = fastrlhf.token_stats(logits, index, ignore_index=ignore_index, impl=impl)
        assert stats.logprob[0] == 0 and (stats.logprob[1:] < 0).all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype(impl, dtype, device) -> None:
    logits = torch.randn(4, 100, device=device)
    targets = torch.tensor([0, 99, 50, 3], device=device)
    expected = fastrlhf.token_logprobs(logits, targets, impl=impl)
    unaligned = torch.cat([targets[:1], targets]).to(dtype)[1:]
    assert torch.equal(fastrlhf.token_logprobs(logits, unaligned, impl=impl), expected)


@BACKENDS
def test_empty_and_smallest_shapes(impl, device) -> None:
    for shape in ((0, 5), (2, 0, 5), (0, 3, 5)):
        logits = torch.randn(shape, device=device, requires_grad=True)
        targets = torch.zeros(shape[:-1], dtype=torch.long, device=device)
        stats = fastrlhf.token_stats(logits, targets, entropy=True, impl=impl)
        assert stats.logprob.shape == stats.entropy.shape == stats.lse.shape == shape[:-1]
        stats.logprob.sum().backward()
        assert logits.grad.shape == shape
    logits = torch.randn(5, device=device, requires_grad=True)
    value = fastrlhf.token_logprobs(logits, torch.tensor(3, device=device), impl=impl)
    plain, exact = logits.log_softmax(-1)[3], logits.double().log_softmax(-1)[3]
    assert_as_accurate(value, plain, exact)
    certain = torch.randn(2, 1, device=device, requires_grad=True)
    stats = fastrlhf.token_stats(
        certain, torch.zeros(2, dtype=torch.long, device=device), entropy=True, impl=impl
    )
    (stats.logprob + stats.entropy).sum().backward()
    assert not stats.logprob.any() and not stats.entropy.any() and not certain.grad.any()
