"""Statistics over kept ids from hidden states, against the logits of all ids."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate, assert_gradients_as_accurate
from support.kept import everything, ids_of, random_support, support_of
from support.kept_head_problems import (
    BACKENDS,
    IMPLS,
    NAMES,
    SEQUENCES,
    SHAPE,
    TOKENS,
    VOCAB,
    WIDTH,
    Problem,
)
from support.matmuls import MatmulAudit
from support.oracle import options_of
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import linear_token_stats, reference
from fastrlhf.ops import QuantizedWeight, weighted_rows
from fastrlhf.ops.scorer import LinearScorer


def upstream(like: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(SHAPE).to(like) for _ in range(2))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_it_is_that_of_the_logits(impl, dtype, trained, kind, device) -> None:
    problem = Problem(dtype, device, trained)
    options = options_of(kind, SEQUENCES * TOKENS, device)
    if "temperature" in options:
        options["temperature"] = options["temperature"].view(SHAPE)
    stats = problem.stats(entropy=True, with_stats=NAMES, impl=impl, **options)
    logits, leaves = problem.exact()
    defined = problem.defined(logits, entropy=True, with_stats=NAMES, **options)
    # What a loop would do in this precision: the products of each token with its ids.
    sums = torch.promote_types(dtype, torch.float32)
    inputs = [x.detach().cpu().to(sums).nan_to_num() for x in problem.head]
    of_plain = [x.requires_grad_() for x in inputs[: len(problem.wanted)]]
    in_sums = F.linear(*inputs)
    plain = problem.defined(in_sums, entropy=True, with_stats=NAMES, **options)
    assert torch.equal(stats.is_top1.cpu(), defined.is_top1)
    for name, x, y, z in zip(stats._fields, stats, plain, defined, strict=True):
        if name != "is_top1":
            assert_as_accurate(x, y, z, size=float(in_sums.detach().abs().max()), of=name)
    g, h = upstream(stats.logprob)
    found = autograd.grad((stats.logprob, stats.entropy), problem.wanted, (g, h))
    slopes = [x.cpu().double() for x in (g, h)]
    exact = autograd.grad((defined.logprob, defined.entropy), leaves, slopes)
    slopes = [x.to(sums) for x in slopes]
    by_plain = autograd.grad((plain.logprob, plain.entropy), of_plain, slopes)
    assert [x.dtype for x in found] == [x.dtype for x in problem.wanted]
    assert_gradients_as_accurate([x.cpu() for x in found], by_plain, exact)
    assert not found[0][0, 2].any()


@BACKENDS
def test_of_all_ids_it_is_the_dense_result(impl, device) -> None:
    problem = Problem(torch.float32, device)
    problem.support = everything(SEQUENCES * TOKENS, VOCAB, device)
    found = problem.stats(entropy=True, impl=impl)
    whole = linear_token_stats(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, entropy=True, impl=impl
    )
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    g, h = upstream(found.logprob)
    gradients = (
        autograd.grad((s.logprob, s.entropy), problem.wanted, (g, h)) for s in (found, whole)
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("width", [127, 129, 1024, 2500])
def test_wide_hidden_states(impl, width, device) -> None:
    hidden = torch.randn(6, width, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(9, width, dtype=torch.float64, device=device, requires_grad=True)
    targets = torch.randint(9, (6,), device=device)
    support = tuple(x.to(device) for x in random_support(targets, 9, alone=0.0))
    stats = linear_token_stats(hidden, weight, targets, support=support, impl=impl)
    defined = fastrlhf.token_stats(hidden @ weight.T, targets, support=support)
    torch.testing.assert_close(tuple(stats)[::2], tuple(defined)[::2])
    g = torch.randn(6, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        autograd.grad(stats.logprob, (hidden, weight), g),
        autograd.grad(defined.logprob, (hidden, weight), g),
    )


@BACKENDS
def test_column_blocks_of_a_head(impl, device) -> None:
    """As with a low-rank adapter, whose weight is another block; one of them is frozen."""
    problem = Problem(torch.float32, device)
    cuts = 0, 7, WIDTH
    weights = [problem.weight.detach()[:, a:b].contiguous() for a, b in pairwise(cuts)]
    weights[1].requires_grad_()
    scorer = LinearScorer(
        problem.hidden, weights, problem.bias, 0.7, None, 1.3, impl=impl, support=problem.support
    )
    stats = scorer.stats(problem.targets, ignore_index=-100, entropy=True)
    whole = problem.stats(entropy=True, temperature=0.7, scale=1.3, impl="eager")
    torch.testing.assert_close(stats[:3], whole[:3])
    g, h = upstream(stats.logprob)
    found = autograd.grad(
        (stats.logprob, stats.entropy), (problem.hidden, weights[1], problem.bias), (g, h)
    )
    expected = autograd.grad((whole.logprob, whole.entropy), problem.wanted, (g, h))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1][:, 7:])
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("table", [False, True])
@BACKENDS
def test_a_quantized_weight(impl, table, device, monkeypatch) -> None:
    problem = Problem(torch.float32, device, trained=False)
    width = WIDTH // 2 if table else WIDTH
    codes = torch.randint(0, 255 if table else 100, (VOCAB, width), device=device)
    codes = codes.to(torch.uint8 if table else torch.int8)
    values = torch.randn(16, device=device) if table else None
    run = 16
    scales = torch.rand(math.ceil(VOCAB * WIDTH / run), device=device)
    quantized = QuantizedWeight(codes, scales, run, values, torch.float32)
    problem.weight = quantized
    with monkeypatch.context() as few_at_a_time:
        few_at_a_time.setitem(weighted_rows._GATHERED, "cpu", 5 * WIDTH)
        found = problem.stats(entropy=True, impl=impl)
        (d_found,) = autograd.grad((found.logprob + found.entropy).sum(), problem.hidden)
    problem.weight = quantized[0:VOCAB]
    plain = problem.stats(entropy=True, impl="eager")
    torch.testing.assert_close(found[:3], plain[:3])
    (d_plain,) = autograd.grad((plain.logprob + plain.entropy).sum(), problem.hidden)
    torch.testing.assert_close(d_found, d_plain)


@BACKENDS
def test_a_lone_id_is_not_read(impl, device) -> None:
    problem = Problem(torch.float32, device, alone=1.0)
    counts = problem.support[1].diff()
    with torch.no_grad():
        problem.hidden[:] = torch.nan
        problem.weight[:] = torch.nan
    logprob = fastrlhf.linear_token_logprobs(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias,
        support=problem.support, impl=impl,
    )  # fmt: skip
    assert (counts[(problem.targets >= 0).view(-1)] == 1).all() and not logprob.any()
    for gradient in autograd.grad(logprob.sum(), problem.wanted):
        assert not gradient.any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(impl, dtype, device) -> None:
    problem = Problem(dtype, device, trained=True, alone=0.1)
    options = {"entropy": True, "impl": impl}
    stats = problem.stats(**options)
    total = (stats.logprob + stats.entropy).sum()
    first = autograd.grad(total, problem.wanted, retain_graph=True)
    again = problem.stats(**options)
    second = autograd.grad((again.logprob + again.entropy).sum(), problem.wanted)
    for a, b in zip((*stats[:3], *first), (*again[:3], *second), strict=True):
        assert torch.equal(a, b)
    for token in (0, 1, 4):
        own = support_of([ids_of(problem.support, token).cpu()], device)
        hidden = problem.hidden.detach()[0, token : token + 1].requires_grad_()
        alone = linear_token_stats(
            hidden, problem.weight, problem.targets[0, token : token + 1], bias=problem.bias,
            support=own, **options,
        )  # fmt: skip
        for a, b in zip(alone[:3], stats[:3], strict=True):
            assert torch.equal(a[0], b[0, token])
        (of_hidden,) = autograd.grad((alone.logprob + alone.entropy).sum(), hidden)
        assert torch.equal(of_hidden[0], first[0][0, token])


def test_there_is_no_matmul_and_no_tensor_of_the_vocabulary() -> None:
    tokens, vocab, width = 300, 5000, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    support = random_support(targets, vocab, most=10)
    for loss in (
        lambda: -fastrlhf.linear_token_logprobs(hidden, weight, targets, support=support).sum(),
        lambda: fastrlhf.linear_cross_entropy(hidden, weight, targets, support=support),
    ):
        with MatmulAudit() as audit:
            loss().backward()
        assert audit.operations == 0
        assert audit.largest <= weight.numel()  # its gradient


def test_derivatives_of_every_order() -> None:
    problem = Problem(most=4)
    with torch.no_grad():
        problem.hidden.nan_to_num_()

    def both(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, problem.targets, bias=bias, support=problem.support, entropy=True,
            softcap=3.0,
        )  # fmt: skip
        return stats.logprob, stats.entropy

    hidden = problem.hidden.detach()[..., :4].contiguous().requires_grad_()
    weight = problem.weight.detach()[:, :4].contiguous().requires_grad_()
    assert autograd.gradcheck(both, (hidden, weight, problem.bias))
    assert autograd.gradgradcheck(both, (hidden, weight, problem.bias))


def test_transforms_of_functions() -> None:
    problem = Problem()
    inputs = problem.hidden.detach().nan_to_num(), problem.weight.detach(), problem.bias.detach()

    def total(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, problem.targets, bias=bias, support=problem.support, entropy=True
        )
        return (stats.logprob + stats.entropy).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(total, (0, 1, 2))(*inputs), expected)
    batch = torch.stack((inputs[0], inputs[0] / 2))
    of_batch = torch.func.vmap(torch.func.grad(total), (0, None, None))(batch, *inputs[1:])
    torch.testing.assert_close(of_batch[0], expected[0])
    _, derivative = torch.func.jvp(total, inputs, expected)
    torch.testing.assert_close(derivative, sum(x.square().sum() for x in expected))


@pytest.mark.parametrize("impl", ["eager", "compiled"])
def test_autocast_rounds_hidden_states_and_weight_alike(impl) -> None:
    problem = Problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = problem.stats(impl=impl)
    of_found = autograd.grad(found.logprob.sum(), problem.wanted)
    for x in (problem.hidden, problem.weight):
        x.data = x.data.bfloat16().float()
    rounded = problem.stats(impl=impl)
    assert torch.equal(found.logprob, rounded.logprob)
    of_rounded = autograd.grad(rounded.logprob.sum(), problem.wanted)
    for a, b in zip(of_found, of_rounded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert a.dtype == torch.float32


def test_tokens_that_are_batched_too() -> None:
    problem = Problem(alone=0.0, garbage=False)
    problem.targets[0, 2] = int(problem.targets[0, 1])
    targets = torch.stack((problem.targets, (problem.targets + 1) % VOCAB))
    support = everything(SEQUENCES * TOKENS, VOCAB)
    hidden = torch.stack((problem.hidden, 2 * problem.hidden)).detach().nan_to_num()
    ids = torch.stack((support[0], support[0].flip(0)))

    def stats(hidden, targets, ids):
        return linear_token_stats(
            hidden, problem.weight, targets, bias=problem.bias, support=(ids, support[1]),
            entropy=True,
        )  # fmt: skip

    both = torch.func.vmap(stats)(hidden, targets, ids)
    logits = F.linear(hidden, problem.weight, problem.bias)
    of_logits = torch.func.vmap(
        lambda x, t, i: fastrlhf.token_stats(x, t, support=(i, support[1]), entropy=True)
    )(logits, targets, ids)
    for i in (0, 1):
        one = stats(hidden[i], targets[i], ids[i])
        for a, b, c in zip(both, of_logits, one, strict=True):
            torch.testing.assert_close(a[i], c)
            torch.testing.assert_close(b[i], c)
    with pytest.raises(ValueError, match=r"^support\[1\]: expected offsets that are the same"):
        torch.func.vmap(
            lambda o: linear_token_stats(hidden[0], problem.weight, targets[0], support=(ids[0], o))
        )(torch.stack((support[1], support[1])))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_support_of_any_shape(data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tokens, vocab = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 20))
    width, states = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    impl = data.draw(st.sampled_from(IMPLS))
    shared = data.draw(st.booleans())
    targets = torch.randint(-1, vocab, (tokens,))
    targets[targets < 0] = -100
    support = random_support(targets, vocab, most=vocab, alone=data.draw(st.floats(0, 1)))
    rows = torch.randint(states, (tokens,)) if shared else None
    hidden = torch.randn(states if shared else tokens, width, dtype=torch.float64)
    weight = torch.randn(vocab, width, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    stats = linear_token_stats(
        hidden, weight, targets, support=support, rows=rows, entropy=True, impl=impl
    )
    logits = (hidden[rows] if shared else hidden) @ weight.T
    defined = reference.kept_token_stats(logits, targets, support, entropy=True)
    torch.testing.assert_close(tuple(stats), tuple(defined))
    g, h = torch.randn(2, tokens, dtype=torch.float64)
    torch.testing.assert_close(
        autograd.grad((stats.logprob, stats.entropy), leaves, (g, h)),
        autograd.grad((defined.logprob, defined.entropy), leaves, (g, h)),
    )
