"""Further statistics of tokens, and an entropy without gradient: by kernels, by the eager backend,
from hidden states and under transforms, against an oracle in NumPy's fp64.
"""

import sys
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from support.compare import assert_as_accurate
from support.oracle import options_of
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import linear_token_stats, reference, token_stats

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("is_top1", "mean_logit", "log_sum_sq_probs")
NUMBERS = NAMES[1:]
SUBSETS = list(chain.from_iterable(combinations(NAMES, n) for n in range(4)))
MANY_SPLITS = 40000  # five of fp32 logits, three of bf16 ones


def row_oracle(z: np.ndarray, target: int) -> tuple[bool, float, float]:
    """The further statistics of one row of effective logits."""
    top = int(z.argmax())
    if z[top] == -np.inf:
        return False, -np.inf, 0.0
    weight = np.exp(np.delete(z, top) - z[top])
    return top == target, z.mean(), np.log1p((weight**2).sum()) - 2 * np.log1p(weight.sum())


def effective(logits: Tensor, *, temperature=1.0, softcap=None, scale=1.0) -> Tensor:
    """Effective logits (N, V) in the dtype of the logits given."""
    z = logits * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None].to(z) if isinstance(temperature, Tensor) else temperature)


def oracle(logits: Tensor, targets: Tensor, **options) -> dict[str, Tensor]:
    """The further statistics of (N, V) logits; those of ignored rows are 0."""
    z = effective(logits.double(), **options).cpu().numpy()
    rows = [
        row_oracle(z[i], int(target)) if target != -100 else (False, 0.0, 0.0)
        for i, target in enumerate(targets)
    ]
    found = zip(NAMES, zip(*rows, strict=True), strict=True)
    return {name: torch.from_numpy(np.array(column)) for name, column in found}


def plain(logits: Tensor, targets: Tensor, **options) -> dict[str, Tensor]:
    """The numbers by the formulas that people write, in fp32 at least."""
    z = effective(logits.to(torch.promote_types(logits.dtype, torch.float32)), **options)
    squares = (2 * z.log_softmax(-1)).logsumexp(-1)
    found = dict(zip(NUMBERS, (z.mean(-1), squares), strict=True))
    return {name: torch.where(targets != -100, x, 0.0) for name, x in found.items()}


def assert_right(stats, logits: Tensor, targets: Tensor, **options) -> None:
    """Compare with the oracle, by what the plain formulas are off."""
    expected, by_plain = oracle(logits, targets, **options), plain(logits, targets, **options)
    assert stats.is_top1.dtype == torch.bool
    assert torch.equal(stats.is_top1.cpu(), expected["is_top1"])
    z = effective(logits.double(), **options)[targets != -100].abs()
    sizes = float(z[z.isfinite()].mean()) if z.isfinite().any() else 1.0, 1.0
    for name, size in zip(NUMBERS, sizes, strict=True):
        found, exact = getattr(stats, name), expected[name]
        assert found.dtype == torch.promote_types(logits.dtype, torch.float32)
        finite = exact[exact.isfinite()].abs()
        size = max(size, float(finite.max())) if finite.numel() else size
        assert_as_accurate(found, by_plain[name], exact, size=size, of=name)


def random_rows(rows: int, vocab: int, device, dtype=torch.float32, spread: float = 4.0):
    """Logits, and targets: likely ones, others, and an ignored row of NaN."""
    logits = torch.randn(rows, vocab, device=device).mul(spread).to(dtype)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[::3] = logits[::3].argmax(-1)
    if rows > 2:
        targets[2], logits[2] = -100, torch.nan
    return logits, targets


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 5003])
@pytest.mark.parametrize("kind", ["plain", "scaled", "capped", "all"])
def test_values_match_the_oracle(impl, dtype, vocab, kind, device) -> None:
    logits, targets = random_rows(7, vocab, device, dtype)
    options = options_of(kind, 7, device)
    stats = token_stats(logits, targets, with_stats=NAMES, impl=impl, **options)
    assert_right(stats, logits, targets, **options)
    assert stats.is_top1[0] and stats.is_top1[3] and not stats.is_top1[2]
    assert stats.mean_logit[2] == 0 and stats.log_sum_sq_probs[2] == 0


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_values_of_several_splits_match_the_oracle(impl, dtype, kind, device) -> None:
    logits, targets = random_rows(7, MANY_SPLITS, device, dtype, spread=1.0)
    # The largest logit in the first split, in the last, and in another than the target's.
    logits[3, 5], logits[4, -1], logits[5, 20000] = 9.0, 9.0, 9.0
    targets[3], targets[4], targets[5] = 5, MANY_SPLITS - 1, 100
    logits[5, 100] = 8.0
    options = options_of(kind, 7, device)
    stats = token_stats(logits, targets, with_stats=NAMES, impl=impl, **options)
    assert_right(stats, logits, targets, **options)
    assert stats.is_top1[[3, 4, 5]].tolist() == [True, True, False]


@BACKENDS
@pytest.mark.parametrize("entropy", [False, True])
def test_any_of_them_have_the_bits_of_all_and_leave_the_others_theirs(
    impl, entropy, device
) -> None:
    logits, targets = random_rows(5, 20011, device)
    options = {"entropy": entropy, "impl": impl, "temperature": 0.7, "softcap": 9.0}
    without = token_stats(logits, targets, **options)
    everything = token_stats(logits, targets, with_stats=NAMES, **options)
    assert without.is_top1 is without.mean_logit is without.log_sum_sq_probs is None
    for name in ("logprob", "entropy", "lse")[:: 1 if entropy else 2]:
        assert torch.equal(getattr(everything, name), getattr(without, name)), name
    for names in SUBSETS:
        stats = token_stats(logits, targets, with_stats=iter(names), **options)
        for name, value in stats._asdict().items():
            asked = name in ("logprob", "lse", *names) or (name == "entropy" and entropy)
            assert torch.equal(value, getattr(everything, name)) if asked else value is None, name


TIES = {
    "before": ([3], 40, False),
    "after": ([60], 40, True),
    "both": ([3, 60], 40, False),
    "the first of all": ([1, 99], 0, True),
    "the last of all": ([98], 99, False),
    "all alike": (range(100), 0, True),
    "all alike, another target": (range(100), 1, False),
}


@BACKENDS
@pytest.mark.parametrize("vocab", [100, MANY_SPLITS])
@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_of_equal_logits_the_first_is_on_top(impl, vocab, case, softcap, device) -> None:
    equals, target, expected = TIES[case]
    # In a larger vocabulary, the places of a hundred tokens lie in all splits.
    step = vocab // 100
    logits = torch.full((1, vocab), -1.0, device=device)
    for place in (*equals, target):
        # Beyond a cap, different logits are equal ones.
        logits[0, place * step] = 200.0 if softcap is None else 200.0 + place
    targets = torch.tensor([target * step], device=device)
    stats = token_stats(logits, targets, softcap=softcap, with_stats=NAMES, impl=impl)
    assert stats.is_top1.item() is expected
    assert_right(stats, logits, targets, softcap=softcap)


@BACKENDS
@pytest.mark.parametrize("vocab", [1, 60, MANY_SPLITS])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_masked_vocabulary_makes_no_nan(impl, vocab, softcap, device) -> None:
    logits = torch.randn(6, vocab, device=device)
    targets = torch.randint(vocab, (6,), device=device)
    logits[0, : vocab // 2] = -torch.inf
    logits[1, vocab // 2 :] = -torch.inf
    logits[2, targets[2]] = -torch.inf  # the target itself
    logits[3] = -torch.inf
    logits[3, targets[3]] = 3.0  # nothing but the target
    logits[4] = -torch.inf  # nothing at all
    targets[4] = 0
    stats = token_stats(logits, targets, softcap=softcap, with_stats=NAMES, impl=impl)
    if softcap is None:
        assert stats.mean_logit[4] == -torch.inf and not stats.is_top1[4]
        assert stats.log_sum_sq_probs[4] == stats.log_sum_sq_probs[3] == 0
    assert_right(stats, logits, targets, softcap=softcap)


@BACKENDS
@pytest.mark.parametrize("vocab", [33, 5003])
def test_where_all_logits_are_as_low_as_the_cap_none_is_beside_them(impl, vocab, device) -> None:
    # What is past the end of a row would be as likely as any of its tokens.
    logits = torch.full((2, vocab), -100.0, device=device)
    targets = torch.tensor([0, vocab - 1], device=device)
    stats = token_stats(logits, targets, softcap=2.0, with_stats=NAMES, impl=impl)
    assert stats.is_top1.tolist() == [True, False]
    assert_right(stats, logits, targets, softcap=2.0)


@BACKENDS
@pytest.mark.parametrize("vocab", [2, 60, 20000])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_without_a_distribution_says_so(impl, vocab, wrong, device) -> None:
    logits = torch.randn(4, vocab, device=device)
    targets = torch.tensor([0, vocab - 1, 0, 1], device=device)
    logits[0, 0] = logits[1, 0] = logits[2, vocab - 1] = wrong
    logits[2, 0], logits[3, 1] = 50.0, 50.0
    for options in ({}, {"entropy": True}):
        stats = token_stats(logits, targets, with_stats=NAMES, impl=impl, **options)
        assert stats.is_top1.tolist() == [False, False, False, True]
        assert stats.log_sum_sq_probs[:3].isnan().all()
        assert stats.mean_logit[:3].equal(logits[:3].mean(-1)) or stats.mean_logit[:3].isnan().all()
        assert stats.mean_logit[3].isfinite() and stats.log_sum_sq_probs[3].isfinite()


@BACKENDS
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_ignored_rows_are_zeros_whatever_they_hold(impl, garbage, device) -> None:
    logits = torch.randn(4, 70, device=device)
    targets = torch.tensor([-100, 5, -100, 69], device=device)
    logits[0], logits[2] = garbage, garbage
    stats = token_stats(logits, targets, with_stats=NAMES, impl=impl)
    for name in NAMES:
        value = getattr(stats, name)
        assert not value[[0, 2]].any() and value[[1, 3]].isfinite().all(), name


@BACKENDS
@pytest.mark.parametrize("spread", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_large_logits_keep_the_accuracy_of_fp32(impl, spread, temperature, device) -> None:
    logits, targets = random_rows(9, 20011, device, spread=spread)
    # Near the largest, so that several tokens have a share.
    peak = logits.max(-1, keepdim=True).values
    logits[:, 7:17] = peak * (1 - 1e-7 * torch.arange(10, device=device))
    stats = token_stats(
        logits, targets, temperature=temperature, with_stats=("log_sum_sq_probs",), impl=impl
    )
    exact = oracle(logits, targets, temperature=temperature)["log_sum_sq_probs"]
    error = (stats.log_sum_sq_probs.cpu().double() - exact).abs().max()
    # Of two logarithms of up to ln V = 10.
    assert error <= 20 * torch.finfo(torch.float32).eps, error


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("others", [0.0, -1.0])
def test_a_target_of_nearly_all_probability_keeps_its_relative_accuracy(
    impl, dtype, others, device
) -> None:
    logits = torch.full((30, 50), others, dtype=dtype, device=device)
    logits[:, 7] = torch.linspace(4.0, 80.0, 30, dtype=dtype)
    logits[:, 8] = 1.0
    targets = torch.full((30,), 7, device=device)
    stats = token_stats(logits, targets, with_stats=("log_sum_sq_probs",), impl=impl)
    exact = oracle(logits, targets)["log_sum_sq_probs"]
    assert (exact < 0).all() and (stats.log_sum_sq_probs < 0).all()
    torch.testing.assert_close(
        stats.log_sum_sq_probs.cpu().double(), exact, rtol=100 * torch.finfo(dtype).eps, atol=0
    )


@BACKENDS
def test_an_unlikely_target_does_not_cost_accuracy(impl, device) -> None:
    # Its weight has a square of nothing; then one near the bound between the two formulas.
    logits = torch.randn(40, 300, device=device)
    targets = torch.zeros(40, dtype=torch.long, device=device)
    logits[:, 0] = logits[:, 1:].max(-1).values - torch.linspace(0.0, 2.0, 40, device=device)
    logits[:3, 0] = torch.tensor([-60.0, -150.0, -torch.inf])
    stats = token_stats(logits, targets, with_stats=NAMES, impl=impl)
    assert_right(stats, logits, targets)


@BACKENDS
@pytest.mark.parametrize("vocab", [1000, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, vocab, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 12
    logits, targets = random_rows(rows, vocab, device, dtype)
    options = {"impl": impl, "temperature": 0.7, "with_stats": NAMES}
    stats = token_stats(logits, targets, **options)
    for row in (0, 1, 2, rows - 1):
        one = slice(row, row + 1)
        alone = token_stats(logits[one], targets[one], **options)
        for name in NAMES:
            assert torch.equal(getattr(alone, name), getattr(stats, name)[one]), name


@BACKENDS
def test_layouts_and_small_targets_do_not_matter(impl, device) -> None:
    content = torch.randn(2, 3, 65, device=device)
    targets = content.argmax(-1)
    targets[0, 1], targets[1, 2] = -100, 3
    expected = token_stats(content, targets, with_stats=NAMES, impl=impl)
    views = (
        torch.cat([content, content], dim=1)[:, :3],
        torch.cat([content, content], dim=2)[..., :65],
        content.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.stack([content, content], dim=-1)[..., 0],
    )
    for view in views:
        stats = token_stats(view, targets.to(torch.int8), with_stats=NAMES, impl=impl)
        for name in NAMES:
            # The order of a sum may differ, so the last bits of it.
            torch.testing.assert_close(
                getattr(stats, name), getattr(expected, name), rtol=1e-6, atol=1e-6
            )
    nothing = token_stats(content[:0], targets[:0], with_stats=NAMES, impl=impl)
    assert all(getattr(nothing, name).shape == (0, 3) for name in NAMES)
    one = token_stats(content[0, 0], targets[0, 0], with_stats=NAMES, impl=impl)
    assert all(getattr(one, name).shape == () for name in NAMES) and one.is_top1


@pytest.mark.parametrize("logits_at_once", [10, 100])
def test_the_size_of_the_eager_chunks_does_not_matter(logits_at_once, monkeypatch, device) -> None:
    logits, targets = random_rows(6, 33, device)
    module = sys.modules["fastrlhf.ops.token_stats"]  # whose name in the package is the function's
    monkeypatch.setattr(module, "_EAGER_CHUNK_LOGITS", logits_at_once)
    own = torch.linspace(0.5, 2.0, 6, device=device)
    stats = token_stats(logits, targets, temperature=own, with_stats=NAMES, impl="eager")
    assert_right(stats, logits, targets, temperature=own)


def everything(function, *arguments, **options):
    return function(*arguments, entropy=True, with_stats=NAMES, **options)


@BACKENDS
def test_only_what_has_a_gradient_requires_one(impl, device) -> None:
    logits = torch.randn(3, 40, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 39], device=device)
    for entropy_grad in (True, False):
        stats = everything(token_stats, logits, targets, entropy_grad=entropy_grad, impl=impl)
        assert stats.logprob.requires_grad and stats.entropy.requires_grad == entropy_grad
        others = (stats.lse, *(getattr(stats, name) for name in NAMES))
        assert not any(x.requires_grad for x in others)


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_an_entropy_without_gradient_has_the_value_and_leaves_no_trace(
    impl, inplace, device
) -> None:
    leaf = torch.randn(4, 300, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 299, 0], device=device)
    g = torch.randn(4, device=device)
    found = []
    for options in ({}, {"entropy": True, "entropy_grad": False}, {"entropy_grad": False}):
        stats = token_stats(leaf * 1.0, targets, impl=impl, inplace_backward=inplace, **options)
        (gradient,) = autograd.grad(stats.logprob, leaf, g)
        found.append(gradient)
        if "entropy" in options:
            with_gradient = token_stats(leaf, targets, entropy=True, impl=impl)
            assert torch.equal(stats.entropy, with_gradient.entropy)
        else:
            assert stats.entropy is None
    assert torch.equal(found[0], found[2])
    if impl == "compiled":
        # The log-sum-exp beside the entropy is made by another loop, whose vectors may be shorter.
        assert_as_accurate(found[1], found[0], found[0].double(), size=1.0, of="gradient")
    else:
        assert torch.equal(found[0], found[1])


def test_the_backward_is_that_without_the_entropy(monkeypatch) -> None:
    seen, backward = [], reference.token_stats_backward

    def recorded(logits, targets, stats, d_logprob, d_entropy, *others, **options):
        seen.append(d_entropy)
        return backward(logits, targets, stats, d_logprob, d_entropy, *others, **options)

    monkeypatch.setattr(reference, "token_stats_backward", recorded)
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.tensor([0, 1, 8])
    for options in ({"entropy_grad": False}, {"entropy_grad": False, "with_stats": NAMES}, {}):
        stats = token_stats(logits, targets, entropy=True, impl="eager", **options)
        (stats.logprob.sum() + (0 if options else stats.entropy.sum())).backward()
    assert [d is None for d in seen] == [True, True, False]


@BACKENDS
def test_either_of_two_statistics_may_be_differentiated_alone(impl, device) -> None:
    logits = torch.randn(3, 40, device=device, requires_grad=True, dtype=torch.float64)
    targets = torch.tensor([1, -100, 39], device=device)
    for name in ("logprob", "entropy"):
        for again in (False, True):
            stats = everything(token_stats, logits, targets, impl=impl)
            expected = everything(reference.token_stats, logits, targets)
            own, exact = (
                autograd.grad(getattr(x, name).sum(), logits, create_graph=again)[0]
                for x in (stats, expected)
            )
            torch.testing.assert_close(own, exact)


@BACKENDS
def test_second_derivatives_do_not_see_them(impl, device) -> None:
    logits = torch.randn(2, 7, device=device, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 6], device=device)

    def loss(x: Tensor) -> Tensor:
        stats = everything(token_stats, x, targets, entropy_grad=False, impl=impl)
        assert not stats.entropy.requires_grad
        return stats.logprob

    assert autograd.gradcheck(loss, (logits,), fast_mode=True)
    assert autograd.gradgradcheck(loss, (logits,), fast_mode=True)


def linear_arguments(dtype=torch.float64, tokens: int = 6, vocab: int = 11):
    """Hidden states with garbage in an ignored row, weight, bias; targets."""
    hidden, weight = torch.randn(tokens, 5, dtype=dtype), torch.randn(vocab, 5, dtype=dtype)
    bias, targets = torch.randn(vocab, dtype=dtype), torch.randint(vocab, (tokens,))
    targets[0] = (hidden[0] @ weight.T + bias).argmax()
    targets[1], hidden[1] = -100, torch.nan
    return hidden, weight, bias, targets


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("needs", ["nothing", "hidden", "weight", "both"])
@pytest.mark.parametrize(("impl", "chunk_size"), [("eager", 1), ("eager", None), ("triton", 4)])
def test_from_hidden_states_they_are_those_of_the_logits(
    impl, chunk_size, needs, transform, device
) -> None:
    place = device if impl == "triton" else "cpu"
    hidden, weight, bias, targets = (x.to(place) for x in linear_arguments())
    hidden.requires_grad_(needs in ("hidden", "both"))
    weight.requires_grad_(needs in ("weight", "both"))
    options = options_of(transform, 6, place)
    for entropy_grad in (True, False):
        stats = everything(
            linear_token_stats, hidden, weight, targets, bias=bias, chunk_size=chunk_size,
            impl=impl, entropy_grad=entropy_grad, **options,
        )  # fmt: skip
        with torch.no_grad():
            logits = torch.where((targets >= 0)[:, None], hidden, 0.0) @ weight.T + bias
            expected = everything(reference.token_stats, logits, targets, **options)
        for name, value in stats._asdict().items():
            torch.testing.assert_close(value.detach(), getattr(expected, name))
        assert stats.is_top1[0] and not stats.is_top1[1]
        learning = needs != "nothing"
        assert stats.logprob.requires_grad == learning
        assert stats.entropy.requires_grad == (learning and entropy_grad)
        assert not any(x.requires_grad for x in (stats.lse, *stats[3:]))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("needs", ["hidden", "both"])
def test_from_hidden_states_the_gradient_is_that_without_the_entropy(needs, again) -> None:
    hidden, weight, bias, targets = linear_arguments()
    wanted = [hidden.requires_grad_()] + ([weight.requires_grad_()] if needs == "both" else [])
    found = []
    for options in ({}, {"entropy": True, "entropy_grad": False, "with_stats": NAMES}):
        stats = linear_token_stats(hidden, weight, targets, bias=bias, **options)
        found.append(autograd.grad(stats.logprob.sum(), wanted, create_graph=again))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def kept_for_backward(dtype: torch.dtype, **options) -> list[torch.dtype]:
    """The dtypes of the slopes that a frozen head keeps."""
    hidden, weight, bias, targets = linear_arguments(dtype)
    hidden.requires_grad_()
    kept = []

    def keep(x: Tensor) -> Tensor:
        if x.shape == hidden.shape and x.data_ptr() != hidden.data_ptr():
            kept.append(x.dtype)
        return x

    with autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        linear_token_stats(hidden, weight, targets, bias=bias, **options)
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_entropy_without_gradient_keeps_one_slope_alone(dtype) -> None:
    alone = torch.float32 if dtype == torch.float16 else dtype
    assert kept_for_backward(dtype) == [alone]
    assert kept_for_backward(dtype, entropy=True, entropy_grad=False) == [alone]
    assert kept_for_backward(dtype, entropy=True) == [torch.float32] * 2


CASES = {
    "token_stats": lambda x, targets, **options: token_stats(x, targets, **options),
    "linear_token_stats": lambda x, targets, **options: linear_token_stats(
        x, torch.linspace(-1, 1, 60, dtype=x.dtype).view(12, 5).sin(), targets, **options
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_under_transforms_they_are_the_same_and_have_no_derivative(case) -> None:
    x = torch.randn(4, 12 if case == "token_stats" else 5, dtype=torch.float64)
    targets = torch.tensor([3, -100, 0, 11])
    function = CASES[case]
    expected = everything(function, x, targets)

    def values(x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return everything(function, x, targets, entropy_grad=False)._asdict()

    under_vmap = torch.func.vmap(values)(x.unsqueeze(1), targets.unsqueeze(1))
    outputs, tangents = torch.func.jvp(
        lambda x: values(x, targets), (x,), (torch.ones_like(x).cumsum(-1),)
    )
    for name, exact in expected._asdict().items():
        for found in (under_vmap[name].flatten(), outputs[name]):
            torch.testing.assert_close(found, exact, msg=name)
        assert tangents[name].any() == (name == "logprob"), name
    for name in ("entropy", *NUMBERS):
        gradient = torch.func.grad(lambda x, name=name: values(x, targets)[name].sum())(x)
        twice = torch.func.hessian(lambda x, name=name: values(x, targets)[name].sum())(x)
        assert not gradient.any() and not twice.any(), name
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x).cumsum(-1))
        found = values(dual, targets)
        for name, value in found.items():
            tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
            assert (tangent is not None and bool(tangent.any())) == (name == "logprob"), name


# One worker compiles for all: what the compiler needs before its first kernel takes a while.
INDUCTOR = pytest.param("inductor", marks=pytest.mark.xdist_group("inductor"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_they_compile_whole(case, backend) -> None:
    torch.compiler.reset()
    x = torch.randn(4, 12 if case == "token_stats" else 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 11])

    def step(x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        stats = everything(CASES[case], x, targets, entropy_grad=False)
        return stats.logprob.sum(), *stats

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    plain_results, results = step(x, targets), compiled(x, targets)
    for found, expected in zip(results, plain_results, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == expected.requires_grad
    gradients = [autograd.grad(y[0], x)[0] for y in (results, plain_results)]
    torch.testing.assert_close(*gradients)


@BACKENDS
@pytest.mark.parametrize("names", SUBSETS)
def test_the_operator_passes_opcheck(impl, names, device) -> None:
    logits = torch.randn(3, 20, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 19], device=device)
    options = (None, 0.7, 5.0, 1.0, -100, True, False, impl)
    operator = torch.ops.fastrlhf.token_stats_with.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests = None if names == NAMES else tests
    checked = {} if tests is None else {"test_utils": tests}
    torch.library.opcheck(operator, (logits, targets, *options, list(names)), **checked)
    old = torch.ops.fastrlhf.token_stats(logits, targets, *options)
    found = operator(logits, targets, *options, list(names))
    assert len(old) == 5 and all(torch.equal(a, b) for a, b in zip(old, found, strict=False))
    assert [bool(x.numel()) for x in found[5:]] == [name in names for name in NAMES]


LOGITS, TARGETS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
BAD = {
    "a string": (TypeError, "with_stats: .*'mean_logit'.*got 'is_top1'", {"with_stats": "is_top1"}),
    "none": (TypeError, "with_stats: .*'is_top1'.*got None", {"with_stats": None}),
    "unknown": (
        ValueError,
        "with_stats: .*'is_top1', 'mean_logit', 'log_sum_sq_probs'.*got 'top1'",
        {"with_stats": ("is_top1", "top1")},
    ),
    "no name": (ValueError, "with_stats: .*got 3", {"with_stats": [3]}),
    "what has another option": (ValueError, "got 'entropy'", {"with_stats": ["entropy"]}),
    "no bool": (TypeError, "entropy_grad: .*bool, got int", {"entropy_grad": 0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case) -> None:
    error, message, options = BAD[case]
    with pytest.raises(error, match=message):
        token_stats(LOGITS, TARGETS, **options)
    with pytest.raises(error, match=message):
        linear_token_stats(torch.zeros(2, 3), torch.zeros(5, 3), TARGETS, **options)


def test_what_was_a_triple_stays_one() -> None:
    logprob, entropy, lse = fastrlhf.token_stats(LOGITS, TARGETS)
    assert entropy is None and logprob.shape == lse.shape
    assert reference.FURTHER_STATS == NAMES
    assert fastrlhf.FurtherTokenStats._fields == (*fastrlhf.TokenStats._fields, *NAMES)
    stats = fastrlhf.token_stats(LOGITS, TARGETS, with_stats=NAMES[:1])
    assert isinstance(stats, fastrlhf.FurtherTokenStats)
    assert stats.is_top1 is not None and stats[4:] == (None, None)
