"""Tokens that share hidden states, against hidden states that are written out for each token."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate, assert_gradients_as_accurate
from support.kept import random_support
from support.matmuls import MatmulAudit
from support.oracle import options_of
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import ChunkStats, linear_loss, linear_token_stats
from fastrlhf.ops import QuantizedWeight
from fastrlhf.ops.scorer import LinearScorer

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
NAMES = ("is_top1", "mean_logit", "log_sum_sq_probs")
SHAPE, STATES, WIDTH, VOCAB = (4, 6), 9, 8, 41


class Problem:
    """Hidden states of which some predict several targets, some one, some none, with garbage where
    nothing is predicted; and twice the same target of one.
    """

    def __init__(self, dtype=torch.float64, device="cpu", trained=True):
        self.targets = torch.randint(VOCAB, SHAPE)
        self.rows = torch.randint(STATES - 2, SHAPE)
        self.rows[0, :3], self.targets[0, :2] = 1, 7
        self.targets[1, 2], self.rows[1, 2] = -100, 2**40
        hidden = torch.randn(STATES, WIDTH)
        hidden[STATES - 2] = torch.nan
        tensors = hidden, torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)
        self.head = [
            x.to(dtype).to(device).requires_grad_(need)
            for x, need in zip(tensors, (True, trained, trained), strict=True)
        ]
        self.targets, self.rows = self.targets.to(device), self.rows.to(device)
        self.wanted = [x for x in self.head if x.requires_grad]

    def stats(self, **options):
        hidden, weight, bias = self.head
        return linear_token_stats(
            hidden, weight, self.targets, bias=bias, rows=self.rows, **options
        )

    def exact(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Hidden states of each token, weight and bias in fp64, and what they are made of."""
        leaves = [x.detach().cpu().double().nan_to_num() for x in self.head]
        for x, of in zip(leaves, self.head, strict=True):
            x.requires_grad_(of.requires_grad)
        rows = torch.where(self.targets >= 0, self.rows, 0).cpu()
        return leaves[0][rows], *leaves[1:], [x for x in leaves if x.requires_grad]


def upstream(like: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(SHAPE).to(like) for _ in range(2))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["plain", "capped", "all"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_it_is_as_if_each_token_had_its_own(impl, dtype, trained, kind, chunk, device) -> None:
    problem = Problem(dtype, device, trained)
    options = options_of(kind, SHAPE[0] * SHAPE[1], device)
    if isinstance(options.get("temperature"), Tensor):
        # Of three kinds, so that some tokens of a state have one temperature, others another.
        options["temperature"] = options["temperature"].view(SHAPE)[:, :1].expand(SHAPE)
    asked = {"entropy": True, "with_stats": NAMES}
    stats = problem.stats(impl=impl, chunk_size=chunk, **asked, **options)
    hidden, weight, bias, leaves = problem.exact()
    own = {k: x.cpu().double() if isinstance(x, Tensor) else x for k, x in options.items()}
    targets = problem.targets.cpu()
    exact = fastrlhf.token_stats(F.linear(hidden, weight, bias), targets, **asked, **own)
    sums = torch.promote_types(dtype, torch.float32)
    inputs = [x.detach().cpu().to(sums).nan_to_num() for x in problem.head]
    of_plain = [x.requires_grad_() for x in inputs[: len(problem.wanted)]]
    rows = torch.where(targets >= 0, problem.rows.cpu(), 0)
    logits = F.linear(inputs[0][rows], *inputs[1:])
    plain = fastrlhf.token_stats(logits, targets, impl="eager", **asked, **own)
    assert torch.equal(stats.is_top1.cpu(), exact.is_top1)
    for name, x, y, z in zip(stats._fields, stats, plain, exact, strict=True):
        if name != "is_top1":
            assert_as_accurate(x, y, z, size=float(logits.detach().abs().max()), of=name)
    g, h = upstream(stats.logprob)
    found = autograd.grad((stats.logprob, stats.entropy), problem.wanted, (g, h))
    slopes = [x.cpu().double() for x in (g, h)]
    expected = autograd.grad((exact.logprob, exact.entropy), leaves, slopes)
    slopes = [x.to(sums) for x in slopes]
    by_plain = autograd.grad((plain.logprob, plain.entropy), of_plain, slopes)
    assert [x.dtype for x in found] == [x.dtype for x in problem.wanted]
    assert_gradients_as_accurate([x.cpu() for x in found], by_plain, expected)
    assert not found[0][STATES - 2 :].any()


def of_chunk(stats: ChunkStats, c: Tensor, token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    losses = c * (stats.logprob + 0.3 * stats.entropy) + 0.01 * stats.lse.square()
    return losses.sum(), {"token": token, "loss": losses}


@BACKENDS
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_of_ones_own(impl, chunk, grouped, trained, device) -> None:
    problem = Problem(torch.float64, device, trained)
    c = torch.randn(SHAPE, dtype=torch.float64, device=device)
    token = torch.arange(c.numel(), device=device).view(SHAPE)
    groups = torch.randint(3, SHAPE, device=device) if grouped else None
    hidden, weight, bias = problem.head
    loss, aux = linear_loss(
        of_chunk, hidden, weight, problem.targets, c, token, groups=groups, bias=bias,
        entropy=True, chunk_size=chunk, rows=problem.rows, impl=impl, temperature=0.7,
    )  # fmt: skip
    found = autograd.grad(loss, problem.wanted)
    hidden, weight, bias, leaves = problem.exact()
    exact, of_exact = linear_loss(
        of_chunk, hidden, weight, problem.targets.cpu(), c.cpu(), token.cpu(), bias=bias,
        entropy=True, temperature=0.7,
    )  # fmt: skip
    torch.testing.assert_close(loss.cpu(), exact)
    for a, b in zip(found, autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    order = aux["token"].cpu().argsort()
    torch.testing.assert_close(aux["loss"].cpu()[order], of_exact["loss"])


def test_it_costs_what_the_states_cost() -> None:
    tokens, states, vocab, width = 120, 40, 53, 7
    hidden = torch.randn(states, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    rows = torch.arange(tokens) % states
    some = torch.where(rows % 2 == 0, 1.0, 0.0)  # of half of the states
    unit = 2 * states * vocab * width

    def cost(run) -> float:
        with MatmulAudit(vocab) as audit:
            run()
        return audit.operations / unit

    def stats(**options):
        return linear_token_stats(hidden, weight, targets, rows=rows, chunk_size=16, **options)

    def loss(coefficient, groups=None):
        return linear_loss(
            lambda stats, c: (c * stats.logprob).sum(), hidden, weight, targets, coefficient,
            rows=rows, chunk_size=20, groups=groups,
        )[0]  # fmt: skip

    assert cost(lambda: stats()) == 1
    assert cost(lambda: stats().logprob.sum().backward()) == 4
    assert cost(lambda: loss(torch.ones(tokens)).backward()) == 3
    # Half of the states have a gradient: the plans WITH_LOSS, and then RECOMPUTE.
    assert cost(lambda: loss(some).backward()) == 1 + 2 / 2
    assert cost(lambda: (some * stats().logprob).sum().backward()) == 1 + 3 / 2
    weight.requires_grad_(False)
    assert cost(lambda: stats().logprob.sum().backward()) == 2
    assert cost(lambda: stats(entropy=True).entropy.sum().backward()) == 3
    assert cost(lambda: loss(torch.ones(tokens)).backward()) == 2
    # A group reaches the loss at once: one of as many states as a chunk has fits into one.
    weight.requires_grad_()
    assert cost(lambda: loss(torch.ones(tokens), groups=rows // 20).backward()) == 3
    assert cost(lambda: loss(torch.ones(tokens), groups=rows // 5).backward()) == 3


@BACKENDS
@pytest.mark.parametrize("trained", [False, True])
def test_a_probability_of_nearly_one_keeps_its_relative_accuracy(impl, trained, device) -> None:
    """Of the gradient of the target that leads, beside one that hardly has a probability."""
    hidden = torch.tensor([[1.0, 0.5]], device=device, requires_grad=True)
    weight = torch.tensor([[40.0, 3.0], [18.0, -2.0], [1.0, 1.0], [20.0, 7.0]], device=device)
    weight.requires_grad_(trained)
    targets = torch.tensor([0, 0, 2], device=device)
    rows = torch.zeros_like(targets)
    g = torch.tensor([1.0, 2.0, 0.0], device=device)
    stats = linear_token_stats(hidden, weight, targets, rows=rows, impl=impl)
    wanted = [hidden, weight] if trained else [hidden]
    found = autograd.grad(stats.logprob, wanted, g)
    exact = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight)]
    defined = fastrlhf.token_stats((exact[0] @ exact[1].T)[[0, 0, 0]], targets.cpu())
    expected = autograd.grad(defined.logprob, exact, g.cpu().double())
    torch.testing.assert_close(stats.logprob.cpu().double(), defined.logprob, rtol=1e-5, atol=0.0)
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=0.0)


@BACKENDS
def test_opposite_gradients_of_one_state(impl, device) -> None:
    """Their sum is 0, and so is what the softmax adds; what is left is of their targets."""
    problem = Problem(torch.float64, device)
    stats = problem.stats(impl=impl)
    g = torch.zeros(SHAPE, dtype=torch.float64, device=device)
    g[0, 0], g[0, 2] = 1.0, -1.0
    hidden, weight, bias = autograd.grad(stats.logprob, problem.wanted, g)
    first, second = (int(x) for x in problem.targets[0, [0, 2]])
    of_weight = problem.head[1].detach()
    torch.testing.assert_close(hidden[1], of_weight[first] - of_weight[second])
    torch.testing.assert_close(weight[first], problem.head[0].detach()[1])
    torch.testing.assert_close(bias[second].item(), -1.0)


@BACKENDS
def test_masked_logits_and_states_without_a_distribution(impl, device) -> None:
    hidden = torch.ones(2, 1, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.arange(1.0, 5.0, dtype=torch.float64, device=device).view(4, 1)
    bias = torch.tensor([0.0, -torch.inf, 1.0, 2.0], dtype=torch.float64, device=device)
    targets = torch.tensor([1, 0, 3, 2], device=device)
    rows = torch.tensor([0, 0, 0, 1], device=device)
    stats = linear_token_stats(
        hidden, weight, targets, bias=bias, rows=rows, entropy=True, impl=impl
    )
    logits = (hidden @ weight.T + bias)[rows]
    expected = fastrlhf.token_stats(logits, targets, entropy=True)
    torch.testing.assert_close(tuple(stats)[:3], tuple(expected)[:3])
    g = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    torch.testing.assert_close(
        autograd.grad(stats.logprob, hidden, g), autograd.grad(expected.logprob, hidden, g)
    )
    nothing = torch.full_like(bias, -torch.inf)
    stats = linear_token_stats(hidden, weight, targets, bias=nothing, rows=rows, impl=impl)
    assert (stats.logprob == -torch.inf).all()
    assert not autograd.grad(stats.logprob, hidden, g)[0].any()


@pytest.mark.parametrize("name", ["lora", "quantized"])
def test_frozen_heads_of_other_kinds(name) -> None:
    """What is kept of a state is its leader's; other targets look up rows of the weight."""
    problem = Problem(torch.float32, trained=False)
    hidden, weight, bias = problem.head
    if name == "lora":
        weights = [weight[:, :3].contiguous(), weight[:, 3:].contiguous()]
    else:
        codes = torch.randint(-9, 9, (VOCAB, WIDTH), dtype=torch.int8)
        weights = [QuantizedWeight(codes, torch.rand(VOCAB), WIDTH, None, torch.float32)]
        problem.head[1] = weights[0][0:VOCAB]
    scorer = LinearScorer(hidden, weights, bias, 0.7, chunk_size=5, rows=problem.rows)
    stats = scorer.stats(problem.targets, ignore_index=-100, entropy=True)
    written_out, weight, bias, (leaf,) = problem.exact()
    exact = fastrlhf.token_stats(
        F.linear(written_out, weight, bias), problem.targets, entropy=True, temperature=0.7
    )
    g, h = upstream(stats.logprob)
    (found,) = autograd.grad((stats.logprob, stats.entropy), hidden, (g, h))
    (expected,) = autograd.grad((exact.logprob, exact.entropy), leaf, (g.double(), h.double()))
    assert (found - expected).norm() / expected.norm() < 1e-5


@BACKENDS
def test_the_leader_of_equal_logits_is_the_first(impl, device) -> None:
    """So that it alone is on top, as it is where the tokens do not share their row."""
    hidden = torch.ones(1, 1, device=device)
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]], device=device)
    targets, rows = torch.tensor([2, 1, 0, 1], device=device), torch.zeros(4, dtype=torch.int64)
    stats = linear_token_stats(
        hidden, weight, targets, rows=rows.to(device), with_stats=NAMES, impl=impl
    )
    assert stats.is_top1.tolist() == [False, True, False, True]


@BACKENDS
def test_the_same_bits_at_each_run(impl, device) -> None:
    problem = Problem(torch.float32, device)
    runs = []
    for _ in range(2):
        stats = problem.stats(entropy=True, impl=impl)
        total = (stats.logprob + stats.entropy).sum()
        runs.append((*stats[:3], *autograd.grad(total, problem.wanted)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["policy", "dpo", "cross-entropy", "logprobs"])
@pytest.mark.parametrize("with_support", [False, True])
def test_losses(kind, with_support) -> None:
    problem = Problem()
    support = random_support(problem.targets, VOCAB) if with_support else None
    mask = (problem.targets >= 0).double()
    old = torch.randn(SHAPE, dtype=torch.float64) - 3
    gain, pairs = torch.tensor([0.0, 1.0, -1.0, 0.5]), (torch.tensor([0, 2]), torch.tensor([1, 3]))
    ref = torch.randn(SHAPE[0], dtype=torch.float64)
    losses = {
        "policy": lambda h, w, b, **o: fastrlhf.linear_policy_loss(
            h, w, problem.targets, old, gain, mask, ref_logprobs=old, bias=b, **o
        )[0],
        "dpo": lambda h, w, b, **o: fastrlhf.linear_dpo_loss(
            h, w, problem.targets, ref, *pairs, bias=b, **o
        )[0].mean(),
        "cross-entropy": lambda h, w, b, **o: fastrlhf.linear_cross_entropy(
            h, w, problem.targets, bias=b, label_smoothing=0.1, z_loss=0.1, **o
        ),
        "logprobs": lambda h, w, b, **o: fastrlhf.linear_token_logprobs(
            h, w, problem.targets, bias=b, **o
        ).sum(),
    }
    loss = losses[kind](*problem.head, rows=problem.rows, support=support)
    hidden, weight, bias, leaves = problem.exact()
    exact = losses[kind](hidden, weight, bias, support=support)
    torch.testing.assert_close(loss, exact)
    found = autograd.grad(loss, problem.wanted)
    torch.testing.assert_close(found, autograd.grad(exact, leaves))


def test_derivatives_of_every_order() -> None:
    problem = Problem()
    hidden, weight, bias = (x.detach().nan_to_num().requires_grad_() for x in problem.head)

    def both(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, problem.targets, bias=bias, rows=problem.rows, entropy=True
        )
        return stats.logprob, stats.entropy

    assert autograd.gradcheck(both, (hidden, weight, bias))
    frozen = weight.detach(), bias.detach()
    assert autograd.gradcheck(lambda x: both(x, *frozen), hidden)
    small = hidden.detach()[:, :3].requires_grad_(), weight.detach()[:, :3].requires_grad_()
    assert autograd.gradgradcheck(lambda x, w: both(x, w, bias.detach()), small)


def test_transforms_of_functions() -> None:
    problem = Problem()
    inputs = [x.detach().nan_to_num() for x in problem.head]

    def total(hidden, weight, bias):
        stats = linear_token_stats(
            hidden, weight, problem.targets, bias=bias, rows=problem.rows, entropy=True
        )
        return (stats.logprob + stats.entropy).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(total, (0, 1, 2))(*inputs), expected)
    _, derivative = torch.func.jvp(total, tuple(inputs), expected)
    torch.testing.assert_close(derivative, sum(x.square().sum() for x in expected))


def test_no_tokens_and_no_states() -> None:
    weight, nothing = torch.randn(9, 4), torch.zeros(2, 0, dtype=torch.int64)
    ignored, zeros = torch.full((3,), -100), torch.zeros(3, dtype=torch.int64)
    for hidden, targets, rows in (
        (torch.randn(3, 4), nothing, nothing),
        (torch.randn(0, 4), nothing, nothing),
        (torch.randn(0, 4), ignored, zeros),
    ):

        def total(x, targets=targets, rows=rows):
            return fastrlhf.linear_token_logprobs(x, weight, targets, rows=rows).sum()

        x = hidden.clone().requires_grad_()
        for found in (
            *autograd.grad(total(x), x), *autograd.grad(total(x), x, create_graph=True),
            torch.func.grad(total)(hidden),
        ):  # fmt: skip
            assert found.shape == hidden.shape and not found.any()


def test_targets_that_are_batched() -> None:
    problem = Problem()
    hidden, weight, bias = (x.detach().nan_to_num() for x in problem.head)
    targets = torch.stack((problem.targets, problem.targets.flip(0)))
    rows = torch.where(problem.targets < 0, 0, problem.rows)

    def stats(targets):
        return fastrlhf.linear_token_logprobs(hidden, weight, targets, bias=bias, rows=rows)

    both = torch.func.vmap(stats)(targets)
    torch.testing.assert_close(both[1], stats(targets[1]))


def test_ignored_tokens_make_no_states() -> None:
    """Whatever their temperatures are."""
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    targets = torch.randint(7, (50,))
    targets[10:] = -100
    temperature = torch.where(targets < 0, torch.rand(50), 1.0)
    temperature[20:30] = torch.nan
    with MatmulAudit() as audit:
        stats = linear_token_stats(
            hidden, weight, targets, rows=torch.arange(50) % 4, temperature=temperature
        )
        (gradient,) = autograd.grad(stats.logprob.sum(), hidden)
    assert gradient.isfinite().all()
    assert audit.operations == 2 * 2 * 4 * 3 * 7


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_under_the_compiler_it_runs_as_it_is() -> None:
    problem = Problem(torch.float32)
    hidden, weight, bias = (x.detach().nan_to_num().requires_grad_() for x in problem.head)

    def step(hidden, weight, bias):
        return (
            2
            * fastrlhf.linear_token_logprobs(
                1.0 * hidden, weight, problem.targets, bias=bias, rows=problem.rows
            ).sum()
        )

    compiled = torch.compile(step, backend="aot_eager")
    inputs = hidden, weight, bias
    found, expected = (autograd.grad(f(*inputs), inputs) for f in (compiled, step))
    torch.testing.assert_close(found, expected)


BAD = {
    "floats": (lambda r, h: (r.float(), h), TypeError, r"^rows: expected a integer tensor"),
    "shape": (lambda r, h: (r[:-1], h), ValueError, r"^rows: expected shape \(3,\)"),
    "hidden": (lambda r, h: (r, h[None]), ValueError, r"^hidden: expected shape \(U, H\)"),
    "negative": (
        lambda r, h: (r - 1, h),
        ValueError,
        r"^rows: expected indices in \[0, 2\).*got -1",
    ),
    "beyond": (lambda r, h: (r + 1, h), ValueError, r"^rows: expected indices in \[0, 2\).*got 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_fit_are_named(case) -> None:
    wrong, error, message = BAD[case]
    rows, hidden = torch.tensor([0, 1, 1]), torch.zeros(2, 3)
    rows, hidden = wrong(rows, hidden)
    with pytest.raises(error, match=message):
        linear_token_stats(hidden, torch.zeros(5, 3), torch.tensor([0, 4, 1]), rows=rows)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tree_of_any_shape(data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tokens, states = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 8))
    vocab, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    trained, chunk = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1, 3]))
    impl = data.draw(st.sampled_from(["eager", "triton"]))
    targets = torch.randint(-1, vocab, (tokens,))
    targets[targets < 0] = -100
    rows = torch.randint(states, (tokens,))
    hidden = torch.randn(states, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=torch.float64, requires_grad=trained)
    temperature = data.draw(st.sampled_from([1.0, 0.6, "tokens"]))
    if temperature == "tokens":
        temperature = torch.randint(1, 3, (tokens,)).double()
    options = {"entropy": True, "temperature": temperature, "with_stats": NAMES}
    stats = linear_token_stats(
        hidden, weight, targets, rows=rows, chunk_size=chunk, impl=impl, **options
    )
    exact = linear_token_stats(hidden[rows], weight, targets, impl="eager", **options)
    torch.testing.assert_close(tuple(stats), tuple(exact))
    # Of some tokens nothing comes.
    g, h = torch.randn(2, tokens, dtype=torch.float64) * (torch.rand(tokens) < 0.6)
    wanted = [hidden, weight] if trained else [hidden]
    torch.testing.assert_close(
        autograd.grad((stats.logprob, stats.entropy), wanted, (g, h)),
        autograd.grad((exact.logprob, exact.entropy), wanted, (g, h)),
    )
