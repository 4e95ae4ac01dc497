"""Statistics whose gradient is foreseen: the gradient of `linear_token_stats`, whatever is guessed,
and the fewest matmuls where the guess comes true.
"""

import pytest
import torch
from support.matmuls import MatmulAudit
from torch import Tensor, autograd

from fastrlhf import QuantizedWeight, linear_token_stats
from fastrlhf.ops.foreseen_stats import foreseen_stats
from fastrlhf.ops.scorer import LinearScorer

TOKENS, WIDTH, VOCAB = 24, 6, 41
NEEDS = {
    "head": (True, True, True),
    "weight": (False, True, False),
    "hidden": (True, False, False),
    "bias": (False, False, True),
    "nothing": (False, False, False),
}
GUESSES = {
    "none": None,
    "equal": lambda stats, place: torch.ones_like(stats.logprob),
    "probability": lambda stats, place: stats.logprob.exp(),
    "zeros": lambda stats, place: torch.zeros_like(stats.logprob),
    "nan": lambda stats, place: torch.full_like(stats.logprob, torch.nan),
    "huge": lambda stats, place: torch.full_like(stats.logprob, 3e38),
    "by place": lambda stats, place: 1.0 + place.to(stats.logprob),
}


def inputs(needs, dtype=torch.float64) -> tuple[list[Tensor], Tensor]:
    """Hidden states with garbage in ignored rows, weight, bias; targets."""
    targets = torch.randint(VOCAB, (2, TOKENS // 2))
    targets[0, :4] = targets[1, -1] = -100
    tensors = [
        torch.randn(*shape, dtype=dtype)
        for shape in ((2, TOKENS // 2, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    ]
    tensors[0][0, 0] = torch.nan
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    return tensors, targets


def slopes(name: str, logprob: Tensor) -> Tensor:
    """What a loss asks of its log-probs, (B, T)."""
    place = torch.arange(logprob.numel()).view(logprob.shape).to(logprob)
    some = torch.where(place % 3 == 0, 0.7, -2.0)
    return {
        "equal": torch.full_like(logprob, -0.25),
        "probability": 3.0 * logprob.detach().exp(),
        "all but three": torch.where((place == 1) | (place == 5) | (place == 17), 0.5, -0.25).to(
            logprob
        ),
        "other": some.to(logprob),
        "zeros": torch.zeros_like(logprob),
        "by place": -1e-9 * (1.0 + place),
    }[name]


def foreseen(tensors, targets, guess, *, entropy=False, chunk_size=5, **options):
    hidden, weight, bias = tensors
    scorer = LinearScorer(hidden, [weight], bias, chunk_size=chunk_size, **options)
    problem = scorer.problem(targets, ignore_index=-100, entropy=entropy)
    return foreseen_stats(problem, GUESSES[guess])


@pytest.mark.parametrize("entropy_too", [False, True])
@pytest.mark.parametrize("came", ["equal", "probability", "all but three", "other", "zeros"])
@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("needs", NEEDS)
def test_the_gradient_is_right_whatever_is_guessed(needs, guess, came, entropy_too) -> None:
    tensors, targets = inputs(NEEDS[needs])
    wanted = [x for x in tensors if x.requires_grad]

    def loss(stats):
        total = (slopes(came, stats.logprob) * stats.logprob).sum()
        return total + (0.3 * stats.entropy[1, 2:7]).sum() if entropy_too else total

    transform = {"softcap": 3.0, "scale": 0.7, "temperature": 1.3}
    stats = foreseen(tensors, targets, guess, entropy=entropy_too, **transform)
    expected = linear_token_stats(
        *tensors[:2], targets, bias=tensors[2], entropy=entropy_too, **transform
    )
    for ours, theirs in zip(stats[:3], expected[:3], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert stats.logprob.requires_grad == bool(wanted)
    if wanted:
        found = autograd.grad(loss(stats), wanted)
        for ours, theirs in zip(found, autograd.grad(loss(expected), wanted), strict=True):
            assert (ours - theirs).abs().max() <= 1e-12 * (1e-3 + theirs.abs().max())


def matmuls(
    needs: str, guess: str, came: str, *, entropy=False, asked=False, chunk_size=8
) -> float:
    """Matmuls of forward and backward in units of G, a quarter of the tokens ignored."""
    tensors = torch.randn(1, 64, 32), torch.randn(1000, 32), torch.randn(1000)
    for tensor, need in zip(tensors, NEEDS[needs], strict=True):
        tensor.requires_grad_(need)
    targets = torch.randint(1000, (1, 64))
    targets[0, ::4] = -100
    with MatmulAudit() as audit:
        stats = foreseen(tensors, targets, guess, entropy=entropy, chunk_size=chunk_size)
        loss = (slopes(came, stats.logprob) * stats.logprob).sum()
        if asked:
            loss = loss + stats.entropy.sum()
        loss.backward()
    assert audit.largest <= 1000 * max(32, chunk_size)  # a gradient of the weight, or some logits
    return audit.operations / (2 * 48 * 1000 * 32)


def test_as_many_matmuls_as_the_guess_is_worth() -> None:
    assert matmuls("head", "equal", "equal") == pytest.approx(3, rel=0.01)
    assert matmuls("head", "by place", "by place") == pytest.approx(3, rel=0.01)
    assert matmuls("head", "probability", "probability") == pytest.approx(3, rel=0.01)
    assert matmuls("head", "equal", "zeros") == pytest.approx(3, rel=0.01)
    # The last of six blocks of eight is not made again.
    assert matmuls("head", "none", "equal") == pytest.approx(4 - 1 / 6, rel=0.01)
    assert matmuls("head", "none", "other", chunk_size=48) == pytest.approx(3, rel=0.01)
    assert matmuls("head", "none", "other", entropy=True, asked=True, chunk_size=48) == (
        pytest.approx(3, rel=0.01)
    )
    # Three tokens of 48 more, at 3G.
    assert matmuls("head", "equal", "all but three") == pytest.approx(3 + 3 * 3 / 48, rel=0.01)
    assert matmuls("weight", "equal", "equal") == pytest.approx(2, rel=0.01)
    assert matmuls("hidden", "equal", "other") == pytest.approx(2, rel=0.01)
    # An entropy for the log costs nothing; one that a loss depends on makes the logits again.
    assert matmuls("hidden", "equal", "other", entropy=True) == pytest.approx(2, rel=0.01)
    assert matmuls("head", "equal", "equal", entropy=True) == pytest.approx(3, rel=0.01)
    assert matmuls("hidden", "equal", "other", entropy=True, asked=True) == pytest.approx(
        4, rel=0.01
    )


@pytest.mark.parametrize("guess", ["none", "equal"])
def test_second_derivatives(guess) -> None:
    tensors, targets = inputs(NEEDS["head"])
    with torch.no_grad():
        tensors[0][0] = 0.0

    def logprobs(*given):
        return foreseen(given, targets, guess, entropy=True)[:2]

    # A second backward adds up in another order.
    assert autograd.gradcheck(logprobs, tensors, fast_mode=True, nondet_tol=1e-10)
    assert autograd.gradgradcheck(logprobs, tensors, fast_mode=True)


@pytest.mark.parametrize("guess", ["none", "equal"])
def test_without_any_token_the_gradient_is_zero(guess) -> None:
    tensors, targets = inputs(NEEDS["head"])
    stats = foreseen(tensors, torch.full_like(targets, -100), guess)
    stats.logprob.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in tensors)


@pytest.mark.parametrize("guess", ["none", "equal"])
def test_backward_twice(guess) -> None:
    """The second time without what was left for the first."""
    tensors, targets = inputs(NEEDS["head"])
    loss = foreseen(tensors, targets, guess).logprob[1].square().sum()
    first = autograd.grad(loss, tensors, retain_graph=True)
    for ours, again in zip(first, autograd.grad(loss, tensors), strict=True):
        assert torch.allclose(ours, again, rtol=1e-12, atol=1e-12)


HOSTILE = {
    "a small one": lambda n: torch.ones(n).index_fill_(0, torch.tensor([5]), 1e-6),
    "a zero": lambda n: torch.ones(n).index_fill_(0, torch.tensor([5]), 0.0),
    "many sizes": lambda n: (5 * torch.randn(n)).exp(),
    "noise beside ones": lambda n: torch.where(torch.arange(n) % 4 == 0, 1e-5 * torch.randn(n), 1),
    "two halves": lambda n: torch.where(torch.arange(n) % 2 == 0, 1.0, -3.0),
    "both signs": lambda n: torch.where(torch.randn(n) < 0, -1.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HOSTILE)
def test_slopes_that_nobody_foresaw_lose_no_accuracy(kind, dtype) -> None:
    """The gradient of each token, and of the weight, is as near to fp64 as without a guess."""
    tensors, targets = inputs((True, True, True), dtype)
    upstream = HOSTILE[kind](targets.numel()).view(targets.shape)

    def gradients(given, stats):
        hidden, weight, bias = autograd.grad(
            (upstream.to(stats.logprob) * stats.logprob).sum(), given
        )
        return [*hidden[targets >= 0].double(), weight.double(), bias.double()]

    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = gradients(exact, foreseen(exact, targets, "none"))
    plain = gradients(tensors, linear_token_stats(*tensors[:2], targets, bias=tensors[2]))
    found = gradients(tensors, foreseen(tensors, targets, "equal"))
    for ours, theirs, right in zip(found, plain, wanted, strict=True):
        allowed = 4 * (theirs - right).norm() + 4 * torch.finfo(dtype).eps * right.norm()
        assert (ours - right).norm() <= allowed


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("everywhere", [True, False])
def test_slopes_that_are_not_finite_are_seen(value, everywhere) -> None:
    tensors, targets = inputs(NEEDS["head"], torch.float32)
    stats = foreseen(tensors, targets, "equal")
    upstream = torch.full_like(stats.logprob, value if everywhere else 1.0)
    upstream[1, 3] = value
    hidden, weight, _ = autograd.grad(stats.logprob, tensors, upstream)
    assert not hidden[1, 3].isfinite().all() and not weight.isfinite().all()
    assert everywhere or hidden[1, 4].isfinite().all()


def test_a_guess_that_is_too_large_is_none() -> None:
    tensors, targets = inputs(NEEDS["head"], torch.float32)
    found = autograd.grad(foreseen(tensors, targets, "huge").logprob.sum(), tensors)
    assert all(x.isfinite().all() for x in found)


def test_a_loss_of_nan_has_a_gradient_of_nan() -> None:
    tensors, targets = inputs(NEEDS["head"])
    (foreseen(tensors, targets, "equal").logprob.sum() * torch.nan).backward()
    assert all(x.grad.isnan().any() for x in tensors)


def test_a_quantized_weight() -> None:
    codes = torch.randint(-127, 128, (VOCAB, WIDTH), dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.rand(VOCAB), WIDTH, None, torch.float64)
    (hidden, _, bias), targets = inputs(NEEDS["head"])
    stats = foreseen((hidden, weight, bias), targets, "equal")
    found = autograd.grad(stats.logprob.sum(), (hidden, bias))
    expected = linear_token_stats(hidden, weight, targets, bias=bias).logprob.sum()
    for ours, theirs in zip(found, autograd.grad(expected, (hidden, bias)), strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_weights_are_converted_to_the_dtype_of_the_matmuls(dtypes) -> None:
    of_hidden, of_weight = dtypes
    (hidden, weight, _), targets = inputs(NEEDS["nothing"], torch.float32)
    hidden = hidden.to(of_hidden).requires_grad_()
    weight = weight.to(of_weight).requires_grad_()
    scorer = LinearScorer(hidden, [weight], None, dtype=of_hidden)
    stats = foreseen_stats(scorer.problem(targets, ignore_index=-100, entropy=False), None)
    found = autograd.grad(stats.logprob.sum(), (hidden, weight))
    expected = linear_token_stats(hidden, weight.to(of_hidden), targets).logprob
    assert torch.equal(stats.logprob, expected)
    for ours, theirs in zip(found, autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        assert ours.dtype == theirs.dtype
        # Sums in fp32, rounded to bf16 at one end or the other: by a place at most apart.
        allowed = torch.finfo(torch.bfloat16).eps * theirs.float().norm()
        assert (ours - theirs).float().norm() <= allowed
