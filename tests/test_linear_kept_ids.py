"""Statistics and losses over kept ids from hidden states, against the logits of all ids."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate, assert_gradients_as_accurate
from support.kept import everything, ids_of, random_support, support_of
from support.matmuls import MatmulAudit
from support.oracle import options_of
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import ChunkStats, linear_loss, linear_token_stats, reference
from fastrlhf.hf.logit_map import LogitMap
from fastrlhf.hf.own_module import ModuleScorer
from fastrlhf.ops import QuantizedWeight, weighted_rows
from fastrlhf.ops.scorer import LinearScorer

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
NAMES = ("is_top1", "mean_logit", "log_sum_sq_probs")
SEQUENCES, TOKENS, WIDTH, VOCAB = 3, 5, 24, 37
SHAPE = (SEQUENCES, TOKENS)


class Problem:
    """Hidden states with garbage in an ignored row, a head, targets and their support."""

    def __init__(self, dtype=torch.float64, device="cpu", trained=True, **options):
        self.targets = torch.randint(VOCAB, SHAPE)
        self.targets[0, 2] = -100
        self.support = random_support(self.targets, VOCAB, **options)
        hidden = torch.randn(*SHAPE, WIDTH)
        hidden[0, 2] = torch.nan
        tensors = hidden, torch.randn(VOCAB, WIDTH) / 3, torch.randn(VOCAB)
        needs = True, trained, trained
        leaves = [
            x.to(dtype).to(device).requires_grad_(need)
            for x, need in zip(tensors, needs, strict=True)
        ]
        self.hidden, self.weight, self.bias = leaves
        self.wanted = [x for x in leaves if x.requires_grad]
        self.targets = self.targets.to(device)
        self.support = tuple(x.to(device) for x in self.support)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """Logits in fp64, and what they are made of."""
        inputs = [x.detach().cpu().double().nan_to_num() for x in self.head]
        for x, of in zip(inputs, self.head, strict=True):
            x.requires_grad_(of.requires_grad)
        return F.linear(*inputs), [x for x in inputs if x.requires_grad]

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def stats(self, **options):
        return linear_token_stats(
            self.hidden, self.weight, self.targets, bias=self.bias, support=self.support, **options
        )

    def defined(self, logits: Tensor, **options):
        support = tuple(x.cpu() for x in self.support)
        own = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
        return reference.kept_token_stats(logits, self.targets.cpu(), support, **own)


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


def of_chunk(stats: ChunkStats, coefficient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    losses = coefficient * (stats.logprob + 0.3 * stats.entropy) + 0.01 * stats.lse.square()
    return losses.sum(), {"tokens": coefficient, "loss": losses.sum()}


@BACKENDS
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_loss_of_ones_own(impl, chunk, grouped, device) -> None:
    problem = Problem(torch.float64, device)
    coefficient = torch.randn(SHAPE, dtype=torch.float64, device=device, requires_grad=True)
    groups = torch.randint(3, SHAPE, device=device) if grouped else None
    calls = []

    def loss_fn(stats, coefficient):
        calls.append(len(stats.logprob))
        assert (stats.groups is not None) == grouped
        return of_chunk(stats, coefficient)

    loss, aux = linear_loss(
        loss_fn, problem.hidden, problem.weight, problem.targets, coefficient, groups=groups,
        bias=problem.bias, entropy=True, chunk_size=chunk, support=problem.support, impl=impl,
    )  # fmt: skip
    live = problem.targets >= 0
    assert sum(calls) == int(live.sum()) and (len(calls) == 1 or chunk is not None or grouped)
    found = autograd.grad(3 * loss, (*problem.wanted, coefficient))
    logits, leaves = problem.exact()
    stats = problem.defined(logits, entropy=True)
    lse = lse_of(problem, logits)
    c = coefficient.detach().cpu().requires_grad_()
    exact = torch.where(live.cpu(), c * (stats.logprob + 0.3 * stats.entropy) + 0.01 * lse**2, 0.0)
    torch.testing.assert_close(loss.cpu(), exact.sum())
    expected = autograd.grad(3 * exact.sum(), (*leaves, c))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)
    assert aux["tokens"].shape == (int(live.sum()),)
    torch.testing.assert_close(aux["loss"].cpu(), exact.sum())


def lse_of(problem: Problem, logits: Tensor) -> Tensor:
    """The log-sum-exp of kept logits, differentiable; 0 for ignored tokens."""
    rows, live = logits.view(-1, VOCAB), (problem.targets >= 0).view(-1).tolist()
    values = [
        rows[i, ids_of(problem.support, i).cpu()].logsumexp(0) if live[i] else rows.new_zeros(())
        for i in range(len(rows))
    ]
    return torch.stack(values).view(SHAPE)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@BACKENDS
def test_policy_losses(impl, ratio_level, device) -> None:
    problem = Problem(torch.float64, device)
    mask = (problem.targets >= 0).double()
    old, ref, gain = (torch.randn(SHAPE, dtype=torch.float64, device=device) - 2 for _ in range(3))
    options = {
        "ratio_level": ratio_level,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "ref_logprobs": ref,
    }
    tensors = problem.targets, old, gain + 2, mask
    loss, metrics = fastrlhf.linear_policy_loss(
        problem.hidden, problem.weight, *tensors, bias=problem.bias, support=problem.support,
        impl=impl, temperature=0.8, **options,
    )  # fmt: skip
    logits, leaves = problem.exact()
    stats = problem.defined(logits, entropy=True, temperature=0.8)
    old, gain, mask, options["ref_logprobs"] = (x.cpu() for x in (*tensors[1:], ref))
    exact, expected = fastrlhf.policy_loss(
        stats.logprob, old, gain, mask, entropy=stats.entropy, **options
    )
    torch.testing.assert_close(loss.cpu(), exact)
    assert metrics.keys() == expected.keys()
    for name in metrics:
        torch.testing.assert_close(metrics[name].cpu(), expected[name], msg=name)
    found = autograd.grad(loss, problem.wanted)
    for a, b in zip(found, autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    # From logits too.
    on_device = logits.detach().to(device).requires_grad_()
    again, _ = fastrlhf.logits_policy_loss(
        on_device, *tensors, support=problem.support, impl=impl, temperature=0.8,
        **options | {"ref_logprobs": ref},
    )  # fmt: skip
    torch.testing.assert_close(again, loss)
    (d_logits,) = autograd.grad(again, on_device)
    torch.testing.assert_close(
        torch.einsum("btv,vh->bth", d_logits, problem.weight), found[0].nan_to_num()
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo", "aot"])
@BACKENDS
def test_preference_losses(impl, loss_type, device) -> None:
    problem = Problem(torch.float64, device)
    pairs = torch.tensor([0, 2], device=device), torch.tensor([1, 1], device=device)
    ref = None
    if loss_type != "simpo":
        ref = torch.randn(SEQUENCES, dtype=torch.float64, device=device)
    losses, rewards = fastrlhf.linear_dpo_loss(
        problem.hidden, problem.weight, problem.targets, ref, *pairs, bias=problem.bias,
        support=problem.support, loss_type=loss_type, impl=impl,
    )  # fmt: skip
    logits, leaves = problem.exact()
    logprobs, mask = problem.defined(logits).logprob, (problem.targets >= 0).cpu()
    pairs = [x.cpu() for x in pairs]
    if ref is None:
        exact, of = fastrlhf.simpo_loss(logprobs.sum(1), mask.sum(1), *pairs, 0.1, 0.5)
    else:
        exact, of = fastrlhf.dpo_loss(logprobs, ref.cpu(), *pairs, mask=mask, loss_type=loss_type)
    torch.testing.assert_close(losses.cpu(), exact)
    torch.testing.assert_close(rewards.cpu(), of)
    weights = torch.tensor([0.3, 1.7], dtype=torch.float64)
    found = autograd.grad((losses * weights.to(device)).sum(), problem.wanted)
    for a, b in zip(found, autograd.grad((exact * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}])
def test_cross_entropy(options, reduction) -> None:
    problem = Problem()
    loss = fastrlhf.linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias,
        support=problem.support, reduction=reduction, **options,
    )  # fmt: skip
    logits, leaves = problem.exact()
    rows, losses = logits.view(-1, VOCAB), []
    for i, target in enumerate(problem.targets.view(-1).tolist()):
        if target < 0:
            losses.append(rows.new_zeros(()))
            continue
        ids = ids_of(problem.support, i)
        kept, place = rows[i : i + 1, ids], (ids == target).nonzero()[0]
        smoothing = options.get("label_smoothing", 0.0)
        own = F.cross_entropy(kept, place, label_smoothing=smoothing)
        losses.append(own + options.get("z_loss", 0.0) * kept.logsumexp(1)[0].square())
    exact = torch.stack(losses).view(SHAPE)
    exact = {"mean": exact.sum() / (problem.targets >= 0).sum(), "sum": exact.sum(), "none": exact}
    torch.testing.assert_close(loss, exact[reduction])
    for weigh in (torch.ones_like(loss), torch.rand(SHAPE).double()):
        if weigh.shape != loss.shape:
            continue
        found = autograd.grad((loss * weigh).sum(), problem.wanted, retain_graph=True)
        expected = autograd.grad((exact[reduction] * weigh).sum(), leaves, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_head_of_a_module_of_its_own() -> None:
    problem = Problem()
    weight, bias = problem.weight, problem.bias
    rows = torch.arange(SEQUENCES * TOKENS).view(SHAPE).flip(0)

    def own(hidden: Tensor) -> Tensor:
        return F.linear(hidden, weight, bias)

    for shared in (None, rows):
        scorer = ModuleScorer(
            problem.hidden,
            own,
            LogitMap(softcap=3.0),
            VOCAB,
            0.7,
            4,
            "auto",
            problem.support,
            shared,
        )
        targets = problem.targets.clone()
        if shared is not None:
            targets[2, 2] = -100  # whose hidden state is NaN
        stats = scorer.stats(targets, ignore_index=-100, entropy=True, with_stats=NAMES)
        hidden = problem.hidden if shared is None else problem.hidden.flip(0)
        whole = linear_token_stats(
            hidden, weight, targets, bias=bias, entropy=True, with_stats=NAMES, temperature=0.7,
            softcap=3.0, support=problem.support,
        )  # fmt: skip
        for a, b in zip(stats, whole, strict=True):
            torch.testing.assert_close(a, b)
        c = torch.randn(SHAPE, dtype=torch.float64)
        loss, _ = scorer.loss(of_chunk, targets, c, ignore_index=-100, entropy=True)
        ours, _ = linear_loss(
            of_chunk, hidden, weight, targets, c, bias=bias, entropy=True, temperature=0.7,
            softcap=3.0, support=problem.support,
        )  # fmt: skip
        torch.testing.assert_close(loss, ours)
        for a, b in zip(
            autograd.grad(loss, problem.wanted), autograd.grad(ours, problem.wanted), strict=True
        ):
            torch.testing.assert_close(a.nan_to_num(), b.nan_to_num())


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


def test_a_loss_runs_without_autocast_and_must_be_one() -> None:
    problem, seen = Problem(torch.float32), []

    def loss_fn(stats: ChunkStats) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return stats.logprob.sum()

    given = problem.hidden, problem.weight, problem.targets
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_loss(loss_fn, *given, support=problem.support)
    assert seen == [False]
    with pytest.raises(TypeError, match=r"^loss_fn: expected a function, got int"):
        linear_loss(3, *given, support=problem.support)


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


@pytest.mark.parametrize("loss", ["policy", "dpo"])
def test_packed_sequences_are_those_in_rows(loss) -> None:
    problem = Problem(garbage=False)
    live = problem.targets >= 0
    borders = F.pad(live.sum(1).cumsum(0), (1, 0))
    old = torch.randn(SHAPE, dtype=torch.float64) - 3
    gain, pairs = torch.tensor([1.0, -2.0, 0.0]), (torch.tensor([0, 2]), torch.tensor([1, 1]))
    ref = torch.randn(SEQUENCES, dtype=torch.float64)

    def value(hidden, targets, old, rows=None, **layout) -> Tensor:
        head = {"bias": problem.bias, "support": problem.support, "rows": rows, **layout}
        if loss == "dpo":
            return fastrlhf.linear_dpo_loss(
                hidden, problem.weight, targets, ref, *pairs, **head
            )[0].sum()  # fmt: skip
        return fastrlhf.linear_policy_loss(
            hidden, problem.weight, targets, old, gain, targets >= 0, **head
        )[0]

    in_rows = value(problem.hidden, problem.targets, old)
    expected = autograd.grad(in_rows, problem.wanted)
    # The ignored token, which keeps none, is left out; hidden states are numbered or in order.
    ids, offsets = problem.support
    problem.support = ids, torch.cat((offsets[:-1][live.view(-1)], offsets[-1:]))
    given = problem.targets[live], old[live]
    for hidden, rows in (
        (problem.hidden[live], None),
        (problem.hidden.flatten(0, 1), live.view(-1).nonzero()[:, 0]),
    ):
        packed = value(hidden, *given, rows, cu_seqlens=borders)
        torch.testing.assert_close(packed, in_rows)
        for a, b in zip(autograd.grad(packed, problem.wanted), expected, strict=True):
            torch.testing.assert_close(a.nan_to_num(), b.nan_to_num())
