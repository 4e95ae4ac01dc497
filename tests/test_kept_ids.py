"""Statistics over kept ids from logits, against rows of the kept columns alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate, assert_gradient_as_accurate
from support.kept import dense, everything, ids_of, of_each_token, random_support, support_of
from support.oracle import options_of, token_stats_oracle
from support.plain import of_tokens
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import reference, token_logprobs, token_stats

IMPLS = ["eager", "triton"]  # what is compiled is of hidden states
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("is_top1", "mean_logit", "log_sum_sq_probs")
TOKENS = 12


def random_tokens(vocab, device, dtype=torch.float32, spread=4.0, **options):
    """Logits with NaN in an ignored row, targets, their support, and upstream gradients."""
    logits = torch.randn(TOKENS, vocab).mul(spread).to(dtype)
    targets = torch.randint(vocab, (TOKENS,))
    targets[2], logits[2] = -100, torch.nan
    support = random_support(targets, vocab, **options)
    tensors = (logits, targets, *support, torch.randn(TOKENS), torch.randn(TOKENS))
    logits, targets, ids, offsets, g, h = (x.to(device) for x in tensors)
    return logits, targets, (ids, offsets), g, h


def by_oracle(rows, targets, **options):
    found = token_stats_oracle(rows, targets, **options)
    return (found.logprob, found.entropy, found.lse), found.gradient


def by_plain(rows, targets, g, h, **options):
    return of_tokens(rows, targets, g, h, **options)


def evaluate(logits, targets, support, g, h, **options):
    """Statistics, and the gradient of Σ g·logprob + h·entropy."""
    x = logits.detach().clone().requires_grad_()
    stats = token_stats(x, targets, entropy=True, support=support, **options)
    upstream = [y.to(stats.logprob) for y in (g, h)]
    return stats, autograd.grad((stats.logprob, stats.entropy), x, upstream)[0]


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "scaled", "capped", "all"])
@pytest.mark.parametrize("vocab", [1, 2, 60])
def test_it_is_the_oracle_of_the_kept_columns(impl, dtype, kind, vocab, device) -> None:
    given = random_tokens(vocab, device, dtype, most=50)
    g, h = given[3:]
    options = options_of(kind, TOKENS, device)
    stats, gradient = evaluate(*given, impl=impl, **options)
    assert gradient.dtype == dtype
    exact, exact_gradient = of_each_token(by_oracle, *given, **options)
    plain, plain_gradient = of_each_token(by_plain, *given, **options)
    size = max(1.0, float(exact[2].abs().max()))
    for name, x, y in zip(("logprob", "entropy", "lse"), plain, exact, strict=True):
        value = getattr(stats, name)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert_as_accurate(value, x, y, size=size, of=name)
        assert value[2] == 0
    # Of few ids, the terms of log-prob and entropy may cancel in any entry.
    terms = float((g.abs() + h.abs()).max() * exact_gradient.abs().max().clamp(min=1))
    assert_as_accurate(gradient, plain_gradient, exact_gradient, size=terms)
    assert not gradient.cpu()[exact_gradient == 0].any()


@BACKENDS
@pytest.mark.parametrize("kind", ["plain", "scaled", "capped", "all"])
def test_further_statistics_are_of_the_kept_ids(impl, kind, device) -> None:
    logits, targets, support, *_ = random_tokens(40, device, torch.float64)
    options = options_of(kind, TOKENS, device)
    found = token_stats(
        logits, targets, support=support, with_stats=NAMES, entropy=True, impl=impl, **options
    )
    for i in range(TOKENS):
        if targets[i] < 0:
            assert all(float(x[i]) == 0 for x in found)
            continue
        ids = ids_of(support, i)
        own = {k: x[i : i + 1] if isinstance(x, Tensor) else x for k, x in options.items()}
        order = ids.sort().values  # of equal logits the smallest id is on top
        whole = token_stats(
            logits[i : i + 1, order], (order == targets[i]).nonzero()[0], with_stats=NAMES,
            entropy=True, impl="eager", **own,
        )  # fmt: skip
        for x, y in zip(found, whole, strict=True):
            torch.testing.assert_close(x[i : i + 1], y)


@BACKENDS
def test_of_equal_logits_the_smallest_id_is_on_top(impl, device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 5.0], [1.0, 3.0, 3.0, 0.0]], device=device)
    logits = logits.repeat_interleave(2, 0)
    targets = torch.tensor([1, 2, 1, 2], device=device)
    for order in ([0, 1, 2], [2, 1, 0]):
        support = support_of([torch.tensor(order)] * 4, device)
        stats = token_stats(logits, targets, support=support, with_stats=NAMES, impl=impl)
        assert stats.is_top1.tolist() == [True, False, True, False]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_all_ids_it_is_the_dense_result(impl, dtype, device) -> None:
    logits, targets, _, g, h = random_tokens(100, device, dtype)
    support = everything(TOKENS, 100, device)
    found, gradient = evaluate(logits, targets, support, g, h, impl=impl, with_stats=NAMES)
    x = logits.clone().requires_grad_()
    whole = token_stats(x, targets, entropy=True, with_stats=NAMES, impl=impl)
    upstream = [y.to(whole.logprob) for y in (g, h)]
    (expected,) = autograd.grad((whole.logprob, whole.entropy), x, upstream)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected)


@BACKENDS
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 3.0])
def test_a_lone_id_is_certain_whatever_its_logit(impl, garbage, device) -> None:
    logits = torch.randn(3, 7, device=device)
    logits[1, 4] = garbage
    targets = torch.tensor([0, 4, 2], device=device)
    support = support_of([torch.tensor(x) for x in ([0, 5], [4], [6, 2, 1])], device)
    ones = torch.ones(3, device=device)
    stats, gradient = evaluate(
        logits, targets, support, ones, ones, impl=impl, with_stats=NAMES, softcap=5.0
    )
    assert stats.logprob[1] == 0 and stats.entropy[1] == 0 and stats.log_sum_sq_probs[1] == 0
    assert stats.is_top1[1]
    assert not gradient[1].any()
    if garbage == 3.0:
        torch.testing.assert_close(stats.lse[1].item(), 5.0 * torch.tensor(0.6).tanh().item())
    alone = evaluate(
        logits[::2], targets[::2], support_of([ids_of(support, i).cpu() for i in (0, 2)], device),
        ones[:2], ones[:2], impl=impl, softcap=5.0,
    )  # fmt: skip
    assert torch.equal(stats.logprob[::2], alone[0].logprob)
    assert torch.equal(gradient[::2], alone[1])


@BACKENDS
def test_long_rows_beside_short_ones(impl, device) -> None:
    vocab = 3000
    logits = torch.randn(4, vocab, device=device) * 3
    targets = torch.tensor([5, 7, 2999, 0], device=device)
    kept = [
        torch.randperm(vocab),
        torch.tensor([7]),
        torch.tensor([1, 2999]),
        torch.arange(0, 3000, 2),
    ]
    support = support_of(kept, device)
    g, h = torch.randn(2, 4, device=device)
    stats, gradient = evaluate(logits, targets, support, g, h, impl=impl)
    masked = dense(logits.double(), support, targets)
    exact, expected = by_oracle(masked.cpu(), targets.cpu(), g=g.cpu(), h=h.cpu())
    plain, of_plain = by_plain(masked.float().cpu(), targets.cpu(), g.cpu(), h.cpu())
    for name, x, y in zip(("logprob", "entropy", "lse"), plain, exact, strict=True):
        assert_as_accurate(getattr(stats, name), x, y, size=10.0, of=name)
    assert_gradient_as_accurate(gradient, of_plain, expected, targets.cpu(), 16.0)


@BACKENDS
def test_masked_and_missing_distributions(impl, device) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, device=device)
    logits[0, 3] = -torch.inf  # kept, without probability
    logits[1, [1, 2]] = -torch.inf  # all that is kept
    logits[2, 5] = -torch.inf  # the target
    logits[3, [0, 1, 2, 3]] = torch.nan  # what is not kept
    kept = [[3, 4, 0], [1, 2], [5, 0], [4, 5]]
    targets = torch.tensor([4, 1, 5, 4], device=device)
    support = support_of([torch.tensor(x) for x in kept], device)
    ones = torch.ones(4, dtype=torch.float64, device=device)
    stats, gradient = evaluate(logits, targets, support, ones, ones, impl=impl, with_stats=NAMES)
    two = logits[0, [4, 0]].log_softmax(0)
    torch.testing.assert_close(stats.logprob[0], two[0])
    torch.testing.assert_close(stats.entropy[0], -(two.exp() * two).sum())
    assert stats.logprob[1] == -torch.inf and stats.lse[1] == -torch.inf
    assert stats.entropy[1] == 0 and not stats.is_top1[1] and not gradient[1].any()
    assert stats.logprob[2] == -torch.inf
    assert gradient.isfinite().all() and gradient[0, 3] == 0 and not gradient[3, :4].any()


@BACKENDS
@pytest.mark.parametrize("spread", [1e4, 60.0])
def test_a_probability_of_nearly_one_keeps_its_relative_accuracy(impl, spread, device) -> None:
    logits = torch.tensor([[spread, spread - 30.0, 0.0, spread - 17.0]], device=device)
    targets = torch.tensor([0], device=device)
    support = support_of([torch.tensor([3, 0, 1])], device)
    one = torch.ones(1, device=device)
    stats, gradient = evaluate(logits, targets, support, one, 0 * one, impl=impl)
    _, expected = of_each_token(by_oracle, logits, targets, support, one, 0 * one)
    exact_rest = torch.tensor([-17.0, -30.0]).double().exp().sum()
    torch.testing.assert_close(
        stats.logprob.cpu().double()[0], -exact_rest.log1p(), rtol=3e-6, atol=0.0
    )
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=3e-6, atol=0.0)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(impl, dtype, device) -> None:
    given = random_tokens(50, device, dtype, most=45)
    logits, targets, support, g, h = given
    stats, gradient = evaluate(*given, impl=impl, temperature=0.7)
    again, gradient_again = evaluate(*given, impl=impl, temperature=0.7)
    assert torch.equal(gradient, gradient_again) and torch.equal(stats.lse, again.lse)
    for i in (0, 1, 2, 5, 11):
        one = slice(i, i + 1)
        own = support_of([ids_of(support, i).cpu()], device)
        alone, of_alone = evaluate(
            logits[one], targets[one], own, g[one], h[one], impl=impl, temperature=0.7
        )
        for a, b in zip(alone[:3], stats[:3], strict=True):
            assert torch.equal(a, b[one])
        assert torch.equal(of_alone, gradient[one])


@BACKENDS
def test_layouts_and_widths_of_integers_do_not_matter(impl, device) -> None:
    content = torch.randn(2, 3, 9, device=device)
    targets = torch.randint(9, (2, 3), device=device)
    ids, offsets = (x.to(device) for x in random_support(targets, 9))
    expected = token_stats(content, targets, support=(ids, offsets), entropy=True, impl=impl)
    views = (
        torch.cat([content, content], dim=1)[:, :3],
        torch.cat([content, content], dim=2)[..., :9],
        content.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        content[0, 0].expand(2, 3, 9),
    )
    for view in views:
        x = view.detach().requires_grad_()
        support = [ids.int(), offsets.int()]
        found = token_stats(x, targets.to(torch.int8), support=support, entropy=True, impl=impl)
        whole = token_stats(
            x.contiguous(), targets, support=(ids, offsets), entropy=True, impl=impl
        )  # fmt: skip
        for a, b in zip(found, whole, strict=True):
            assert torch.equal(a, b)
        found, whole = (autograd.grad(s.logprob.sum(), x)[0] for s in (found, whole))
        torch.testing.assert_close(found, whole)
    assert torch.equal(
        token_logprobs(content, targets, support=(ids, offsets), impl=impl), expected.logprob
    )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@BACKENDS
def test_no_tokens(impl, shape, device) -> None:
    logits = torch.randn(*shape, 5, device=device, requires_grad=True)
    support = support_of([], device)
    targets = torch.zeros(shape, dtype=torch.int64, device=device)
    stats = token_stats(logits, targets, support=support, entropy=True, with_stats=NAMES, impl=impl)
    assert all(x.shape == shape for x in stats)
    assert autograd.grad(stats.logprob.sum(), logits)[0].shape == logits.shape


@BACKENDS
def test_all_ignored(impl, device) -> None:
    logits = torch.full((2, 5), torch.nan, device=device, requires_grad=True)
    targets = torch.full((2,), -100, device=device)
    for kept in ([], [7, -3, 7, 2**40]):
        support = support_of([torch.tensor(kept), torch.tensor([])], device)
        stats = token_stats(logits, targets, support=support, entropy=True, impl=impl)
        assert not torch.stack([x.detach() for x in stats]).any()
        assert not autograd.grad(stats.logprob.sum(), logits)[0].any()


@BACKENDS
def test_the_backward_may_take_the_place_of_the_logits(impl, device) -> None:
    logits, targets, support, g, h = random_tokens(20, device)
    _, expected = evaluate(logits, targets, support, g, h, impl=impl)
    x = logits.clone().requires_grad_()
    spent = x * 1.0
    stats = token_stats(
        spent, targets, support=support, entropy=True, inplace_backward=True, impl=impl
    )
    later = spent.square().sum()
    (found,) = autograd.grad((stats.logprob, stats.entropy), spent, (g, h), retain_graph=True)
    assert found.data_ptr() == spent.data_ptr() and torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_derivatives_of_every_order() -> None:
    logits, targets, support, *_ = random_tokens(8, "cpu", torch.float64, spread=1.0, most=6)
    logits = logits.nan_to_num().requires_grad_()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        stats = token_stats(x, targets, support=support, entropy=True, softcap=3.0, temperature=0.7)
        return stats.logprob, stats.entropy

    assert autograd.gradcheck(both, logits)
    assert autograd.gradgradcheck(both, logits)


def test_transforms_of_functions() -> None:
    logits, targets, support, *_ = random_tokens(8, "cpu", torch.float64, most=6)
    logits = logits.nan_to_num()

    def total(x: Tensor) -> Tensor:
        stats = token_stats(x, targets, support=support, entropy=True, with_stats=NAMES)
        return (stats.logprob + stats.entropy).sum()

    x = logits.clone().requires_grad_()
    (expected,) = autograd.grad(total(x), x)
    torch.testing.assert_close(torch.func.grad(total)(logits), expected)
    batch = torch.stack((logits, 2 * logits))
    of_batch = torch.func.vmap(torch.func.grad(total))(batch)
    torch.testing.assert_close(of_batch[0], expected)
    value, derivative = torch.func.jvp(total, (logits,), (expected,))
    torch.testing.assert_close(derivative, expected.square().sum())
    torch.testing.assert_close(value, total(logits))

    def stats_of(x: Tensor):
        return token_stats(x, targets, support=support, entropy=True, with_stats=NAMES)

    for a, b in zip(torch.func.vmap(stats_of)(batch), stats_of(logits), strict=True):
        torch.testing.assert_close(a[0], b)


def test_the_definition_is_that_of_the_oracle() -> None:
    given = random_tokens(9, "cpu", torch.float64)
    logits, targets, support = given[:3]
    for kind in ("plain", "all"):
        options = options_of(kind, TOKENS, "cpu")
        defined = reference.kept_token_stats(
            logits, targets, support, entropy=True, with_stats=NAMES, **options
        )
        exact, _ = of_each_token(by_oracle, *given, **options)
        torch.testing.assert_close(list(defined[:3]), exact)
        found = token_stats(
            logits, targets, support=support, entropy=True, with_stats=NAMES, **options
        )
        torch.testing.assert_close(tuple(found), tuple(defined))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_under_the_compiler_it_runs_as_it_is() -> None:
    logits, targets, support, *_ = random_tokens(8, "cpu")
    logits.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return 2.0 * token_logprobs(1.0 * x, targets, support=support).sum()

    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), step(logits))
    torch.testing.assert_close(
        autograd.grad(compiled(logits), logits), autograd.grad(step(logits), logits)
    )


BAD = {
    "no tuple": (lambda i, o: i, TypeError, r"^support: expected a tuple of two"),
    "three": (lambda i, o: (i, o, o), TypeError, r"^support: expected a tuple of two"),
    "lists": (lambda i, o: (i.tolist(), o), TypeError, r"^support\[0\]: expected a tensor"),
    "floats": (lambda i, o: (i.float(), o), TypeError, r"^support\[0\]: expected int32 or int64"),
    "small offsets": (lambda i, o: (i, o.to(torch.int16)), TypeError, r"^support\[1\]: .*int32"),
    "two dimensions": (lambda i, o: (i[None], o), ValueError, r"^support\[0\]: .*\(M,\)"),
    "too few offsets": (lambda i, o: (i, o[:-1]), ValueError, r"^support\[1\]: .*shape \(4,\)"),
    "not from 0": (lambda i, o: (i, o + 1), ValueError, r"^support\[1\]: .*start at 0, got 1"),
    "falling": (
        lambda i, o: (i, torch.tensor([0, 4, 2, 6])), ValueError, r"do not decrease, got 2 after 4",
    ),
    "short": (lambda i, o: (i, o.clamp(max=5)), ValueError, r"^support\[1\]: .*end at 6.*got 5"),
    "outside": (
        lambda i, o: (torch.where(i == 3, 9, i), o), ValueError, r"^support\[0\]: .*0, 5\).*got 9",
    ),
    "negative": (
        lambda i, o: (torch.where(i == 3, -1, i), o), ValueError, r"^support\[0\]: .*got -1"
    ),
    "without the target": (
        lambda i, o: (torch.tensor([0, 1, 2, 3, 4, 0]), o), ValueError,
        r"^support: .*target 4 of token 1 \(as if flat\), which keeps 2 others",
    ),
    "twice": (
        lambda i, o: (torch.tensor([0, 0, 4, 3, 1, 0]), o), ValueError,
        r"^support\[0\]: .*once, got 0 twice for token 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_support_that_does_not_fit_is_named(case) -> None:
    wrong, error, message = BAD[case]
    ids, offsets = torch.tensor([0, 1, 4, 3, 1, 0]), torch.tensor([0, 2, 4, 6])
    targets = torch.tensor([0, 4, 1])
    token_stats(torch.zeros(3, 5), targets, support=(ids, offsets))
    with pytest.raises(error, match=message):
        token_stats(torch.zeros(3, 5), targets, support=wrong(ids, offsets))
    with pytest.raises(error, match=message):
        fastrlhf.linear_token_stats(
            torch.zeros(3, 2), torch.zeros(5, 2), targets, support=wrong(ids, offsets)
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_support_of_any_shape(data) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    vocab = data.draw(st.integers(1, 30))
    seed = data.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    impl = data.draw(st.sampled_from(IMPLS))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    targets = torch.randint(-1, vocab, shape)
    targets[targets < 0] = -100
    support = random_support(targets, vocab, most=vocab, alone=data.draw(st.floats(0, 1)))
    logits = (3 * torch.randn(*shape, vocab)).to(dtype)
    logits[targets < 0] = torch.nan
    g, h = torch.randn(2, *shape, dtype=dtype)
    options = {"temperature": 0.6, "softcap": data.draw(st.sampled_from([None, 5.0]))}
    x = logits.clone().requires_grad_()
    stats = token_stats(x, targets, support=support, entropy=True, impl=impl, **options)
    y = logits.nan_to_num().double().requires_grad_()
    defined = reference.kept_token_stats(y, targets, support, entropy=True, **options)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    for a, b in zip(stats, defined, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **tolerance)
    (found,) = autograd.grad((stats.logprob, stats.entropy), x, (g, h))
    upstream = g.double(), h.double()
    (expected,) = autograd.grad((defined.logprob, defined.entropy), y, upstream)
    torch.testing.assert_close(found, expected, check_dtype=False, **tolerance)
