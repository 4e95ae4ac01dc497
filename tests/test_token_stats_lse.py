"""The gradient of the logsumexp beside that of the log-prob and the entropy, against the oracle."""

import pytest
import torch
from support.compare import assert_as_accurate, assert_gradient_as_accurate, assert_gradient_close
from support.oracle import options_of, token_stats_oracle
from support.plain import of_tokens
from support.token_stats_rows import BACKENDS, DTYPES, evaluate, random_rows


def gradient_with_lse(logits, targets, g, h, l, impl, *, operator=None, **options):
    """The gradient of Σ g·logprob + h·entropy + l·lse, by the operators: `token_stats` gives the
    lse no gradient.
    """
    ops = torch.ops.fastrlhf
    own = options.get("temperature", 1.0)
    temperature = (own, 1.0) if isinstance(own, torch.Tensor) else (None, own)
    transform = (*temperature, options.get("softcap"), options.get("scale", 1.0))
    logprob, entropy, _, *rest = ops.token_stats(
        logits, targets, *transform, -100, h is not None, False, impl
    )
    slopes = [None if x is None else x.to(logprob) for x in (g, h, l)]
    saved = (logits, targets, logprob, entropy, *rest, *slopes[:2], *transform, impl)
    return (operator or ops.token_stats_backward)(*saved, slopes[2])


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 5003])
@pytest.mark.parametrize("kind", ["plain", "scaled", "capped", "all"])
@pytest.mark.parametrize("of", ["lse", "logprob and lse", "all three"])
def test_the_gradient_of_the_lse_matches_the_oracle(impl, dtype, vocab, kind, of, device) -> None:
    logits, targets, g, h = random_rows(5, vocab, device, dtype)
    l = torch.randn(5, device=device)
    g = torch.zeros_like(g) if of == "lse" else g
    h = h if of == "all three" else None
    options = options_of(kind, 5, device)
    expected = token_stats_oracle(logits, targets, g=g, h=h, l=l, **options).gradient
    gradient = gradient_with_lse(logits, targets, g, h, l, impl, **options)
    _, plain = of_tokens(logits, targets, g, h, l, **options)
    ulps = 16.0 if dtype in (torch.float32, torch.float64) else None
    assert_gradient_as_accurate(gradient, plain, expected, targets, ulps)
    assert gradient.dtype == dtype


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_tails_keep_their_relative_accuracy_beside_the_lse(impl, dtype, device) -> None:
    logits = torch.zeros(4, 50, dtype=dtype, device=device)
    logits[:, 7] = torch.tensor([20.0, 80.0, -20.0, -80.0])
    targets = torch.full((4,), 7, device=device)
    # At the target, g·(1 - p) is seen beside l·p where p is nearly 1 if l is as small as 1 - p.
    l = torch.tensor([1e-8, 1e-33, 1e8, 1e-3], dtype=dtype, device=device)
    g = torch.tensor([1.0, 1.0, 1e-3, 0.0], dtype=dtype, device=device)
    expected = token_stats_oracle(logits, targets, g=g, l=l).gradient
    gradient = gradient_with_lse(logits, targets, g, None, l, impl)
    torch.testing.assert_close(
        gradient.cpu().double(), expected, rtol=200 * torch.finfo(dtype).eps, atol=0
    )


@BACKENDS
def test_slopes_that_cancel_leave_the_logit_of_the_target(impl, device) -> None:
    # The log-prob and the lse add up to it.
    logits, targets, g, _ = random_rows(5, 1000, device)
    gradient = gradient_with_lse(logits, targets, g, None, g, impl)
    live = targets != -100
    index = targets[live].unsqueeze(1)
    torch.testing.assert_close(gradient[live].gather(1, index)[:, 0], g[live], rtol=1e-6, atol=0)
    assert not gradient[live].scatter(1, index, 0.0).any() and not gradient[~live].any()


@BACKENDS
def test_any_slope_may_be_zero_and_only_all_of_them_end_a_row(impl, device) -> None:
    logits, targets, g, h = random_rows(9, 33, device)
    l = torch.randn(9, device=device)
    slopes = torch.stack([g, h, l])
    # Row 2 is ignored; the other eight have each combination of zeros.
    live = [i for i in range(9) if i != 2]
    zero = torch.tensor([[bool(i >> k & 1) for i in range(8)] for k in range(3)], device=device)
    slopes[:, live] = torch.where(zero, 0.0, slopes[:, live])
    expected = token_stats_oracle(logits, targets, g=slopes[0], h=slopes[1], l=slopes[2]).gradient
    for into in (False, True):
        memory = logits.clone()
        ops = torch.ops.fastrlhf
        operator = ops.token_stats_backward_ if into else None
        found = gradient_with_lse(memory, targets, *slopes, impl, operator=operator)
        gradient = memory if into else found
        assert_gradient_close(gradient, expected, targets, 1e-5)
        assert gradient.any(-1).tolist() == [i in live[:7] for i in range(9)]


@BACKENDS
def test_the_lse_of_a_masked_vocabulary_makes_no_nan(impl, device) -> None:
    logits = torch.randn(5, 40000, device=device)  # more than two splits
    targets = torch.randint(20000, 30000, (5,), device=device)
    logits[0, :16384] = -torch.inf  # a whole split
    logits[1, targets[1]] = -torch.inf  # the target itself
    logits[2] = -torch.inf
    logits[2, targets[2]] = 3.0  # nothing but the target
    logits[3] = -torch.inf  # nothing at all
    targets[4], logits[4] = -100, torch.nan
    g, h = torch.ones(5, device=device), torch.full((5,), 0.5, device=device)
    # What a square makes of an lse of -inf.
    l = torch.tensor([2.0, 2.0, 2.0, -torch.inf, torch.nan], device=device)
    expected = token_stats_oracle(logits, targets, g=g, h=h, l=l).gradient
    gradient = gradient_with_lse(logits, targets, g, h, l, impl)
    rows = slice(0, 3)
    _, plain = of_tokens(logits[rows], targets[rows], g[rows], h[rows], l[rows])
    assert_as_accurate(gradient[rows], plain, expected[rows])
    assert gradient[1, targets[1]] == 1
    assert not gradient[3:].any()


@BACKENDS
def test_without_a_slope_of_the_lse_the_bits_are_those_of_before(impl, device) -> None:
    logits, targets, g, h = random_rows(5, 1000, device)
    zero = torch.zeros(5, device=device)
    for slope in (h, None):
        without = gradient_with_lse(logits, targets, g, slope, None, impl)
        _, expected = evaluate(logits, targets, g=g, h=slope, impl=impl)
        assert torch.equal(without, expected)
        found = gradient_with_lse(logits, targets, g, slope, zero, impl)
        torch.testing.assert_close(found, without, rtol=1e-6, atol=1e-9)
