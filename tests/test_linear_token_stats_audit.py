"""Statistics from hidden states: values, gradients, numerics and cost, against the fp64 oracle."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import relative_error
from support.flops import FlopAudit
from support.oracle import token_stats_oracle
from torch.utils.checkpoint import checkpoint

from fastrlhf import linear_token_logprobs, linear_token_stats
from fastrlhf.ops import linear_rows

ROWS, WIDTH, VOCAB = 9, 5, 37
NAMES = ("hidden", "weight", "bias")
PLANS = [  # which of them require a gradient
    ("hidden",),
    ("weight",),
    ("bias",),
    ("hidden", "weight"),
    ("hidden", "bias"),
    ("weight", "bias"),
    NAMES,
]
PLAN = pytest.mark.parametrize("wanted", PLANS, ids="-".join)


def options_of(kind: str, device="cpu") -> dict:
    own = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64, device=device)
    return {
        "plain": {},
        "scaled": {"scale": 0.3, "temperature": 0.7},
        "all": {"softcap": 4.0, "scale": 1.5, "temperature": own},
    }[kind]


def problem(device="cpu", dtype=torch.float64, garbage=float("nan")):
    """Hidden states, weight and bias; targets, of which two are ignored; g and h."""
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    bias, g, h = (torch.randn(n, dtype=torch.float64) for n in (VOCAB, ROWS, ROWS))
    targets = torch.randint(VOCAB, (ROWS,))
    targets[[2, 5]] = -100
    hidden[[2, 5]] = garbage
    head = [x.to(device, dtype) for x in (hidden, weight, bias)]
    return head, targets.to(device), g.to(device), h.to(device)


def expected_of(head, targets, g, h, **options):
    """The oracle's statistics, and its gradient chained through the head by hand."""
    targets = targets.cpu()
    hidden, weight, bias = (x.detach().cpu().double() for x in head)
    hidden = torch.where((targets == -100)[:, None], 0.0, hidden)
    found = token_stats_oracle(hidden @ weight.T + bias, targets, g=g, h=h, **options)
    dz = found.gradient
    return found, {"hidden": dz @ weight, "weight": dz.T @ hidden, "bias": dz.sum(0)}


def evaluate(head, targets, g, h, wanted=NAMES, **options):
    """Statistics, and the gradients of Σ g·logprob + h·entropy with respect to what is wanted."""
    leaves = dict(zip(NAMES, (x.detach().clone() for x in head), strict=True))
    for name in wanted:
        leaves[name].requires_grad_()
    stats = linear_token_stats(
        leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], entropy=h is not None,
        **options,
    )  # fmt: skip
    outputs, upstream = [stats.logprob], [g.to(stats.logprob)]
    if h is not None:
        outputs, upstream = [*outputs, stats.entropy], [*upstream, h.to(stats.entropy)]
    found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], upstream)
    return stats, dict(zip(wanted, found, strict=True))


def check(head, targets, g, h, wanted, tolerance=1e-11, **options) -> None:
    stats, gradients = evaluate(head, targets, g, h, wanted, **options)
    dropped = {"chunk_size", "impl"}
    transform = {name: value for name, value in options.items() if name not in dropped}
    expected, chained = expected_of(head, targets, g, h, **transform)
    for name in ("logprob", "lse") if h is None else ("logprob", "entropy", "lse"):
        assert relative_error(getattr(stats, name), getattr(expected, name)) <= tolerance, name
        assert not getattr(stats, name)[targets == -100].any()
    for name, gradient in gradients.items():
        assert gradient.dtype == head[NAMES.index(name)].dtype
        assert relative_error(gradient, chained[name]) <= tolerance, name
    if "hidden" in gradients:
        assert not gradients["hidden"][targets == -100].any()


@PLAN
@pytest.mark.parametrize("kind", ["plain", "scaled", "all"])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("entropy", [False, True])
def test_every_plan_matches_the_oracle(wanted, kind, chunk_size, entropy) -> None:
    head, targets, g, h = problem()
    options = options_of(kind)
    check(
        head, targets, g, h if entropy else None, wanted, chunk_size=chunk_size, impl="eager",
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [("hidden",), NAMES], ids="-".join)
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_match_the_oracle(wanted, kind, dtype, device) -> None:
    head, targets, g, h = problem(device, dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    check(
        head, targets, g, h, wanted, tolerance, chunk_size=4, impl="triton",
        **options_of(kind, device),
    )  # fmt: skip


@pytest.mark.parametrize("entropy", [False, True])
def test_the_comparison_rejects_a_gradient_without_softmax(entropy) -> None:
    head, targets, g, h = problem()
    _, chained = expected_of(head, targets, g, h if entropy else None)
    live = targets != -100
    wrong = torch.zeros(ROWS, WIDTH).double()
    wrong[live] = g[live, None] * head[1][targets[live]]
    assert relative_error(wrong, chained["hidden"]) > 0.1


@PLAN
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("upstream", [1.0, float("nan"), float("inf")])
def test_ignored_rows_are_zeros_and_spoil_nothing(wanted, garbage, upstream) -> None:
    head, targets, g, h = problem(garbage=garbage)
    ignored = targets == -100
    g[ignored], h[ignored] = upstream, upstream
    check(head, targets, g, h, wanted, chunk_size=4)
    clean = [torch.where(ignored[:, None], 0.0, head[0]), *head[1:]]
    g[ignored], h[ignored] = 0.0, 0.0
    for a, b in zip(
        evaluate(head, targets, g, h, wanted)[1].values(),
        evaluate(clean, targets, g, h, wanted)[1].values(),
        strict=True,
    ):
        assert torch.equal(a, b)


@PLAN
@pytest.mark.parametrize("rows", [0, ROWS])
def test_without_a_live_row_all_is_zero(wanted, rows) -> None:
    head, targets, g, h = problem()
    head[0], targets = head[0][:rows], torch.full_like(targets[:rows], -100)
    stats, gradients = evaluate(head, targets, g[:rows], h[:rows], wanted)
    for value in stats:
        assert value.shape == (rows,) and not value.any()
    for name, gradient in gradients.items():
        assert gradient.shape == head[NAMES.index(name)].shape and not gradient.any()


@PLAN
def test_a_vocabulary_of_one_token_is_certain(wanted) -> None:
    head, targets, g, h = problem()
    head = [head[0], head[1][:1], head[2][:1]]
    stats, gradients = evaluate(head, targets.clamp(max=0), g, h, wanted)
    assert not stats.logprob.any() and not stats.entropy.any()
    assert not any(x.any() for x in gradients.values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_small_targets_give_the_same_bits(dtype) -> None:
    head, targets, g, h = problem()
    stats, gradients = evaluate(head, targets, g, h)
    small, of_small = evaluate(head, targets.to(dtype), g, h)
    assert all(torch.equal(a, b) for a, b in zip(stats, small, strict=True))
    assert all(torch.equal(gradients[name], of_small[name]) for name in NAMES)


@pytest.mark.parametrize("wanted", [("hidden",), NAMES], ids="-".join)
def test_hidden_states_of_any_strides(wanted) -> None:
    (hidden, weight, bias), targets, g, h = problem(garbage=0.0)
    expected = evaluate([hidden, weight, bias], targets, g, h, wanted)[1]
    strided = torch.empty(WIDTH, 2 * ROWS, dtype=torch.float64)[:, ::2].T
    strided = strided.copy_(hidden)
    assert not strided.is_contiguous()
    leaves = [strided.detach(), weight.T.contiguous().T, bias]
    for name in wanted:
        leaves[NAMES.index(name)].requires_grad_()
    stats = linear_token_stats(leaves[0], leaves[1], targets, bias=bias, entropy=True)
    found = torch.autograd.grad(
        (g * stats.logprob + h * stats.entropy).sum(), [x for x in leaves if x.requires_grad]
    )
    for a, b in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("trained", [False, True])
def test_expanded_hidden_states_in_more_dimensions(trained) -> None:
    base = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=trained)
    targets = torch.randint(VOCAB, (4, 3))
    targets[1, 2] = -100
    leaves = [base, weight] if trained else [base]

    def gradients(hidden):
        logprob = linear_token_logprobs(hidden, weight, targets, chunk_size=4)
        assert logprob.shape == (4, 3)
        return logprob, torch.autograd.grad(logprob.sin().sum(), leaves)

    logprob, found = gradients(base.expand(4, 3, WIDTH))
    wanted, expected = gradients(base.repeat(4, 1, 1))
    torch.testing.assert_close(logprob, wanted, rtol=1e-14, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# Numerics


def low_precision(dtype, rows=128, vocab=300, width=32):
    hidden = torch.randn(rows, width).to(dtype)
    weight = torch.randn(vocab, width).mul(0.5).to(dtype)
    targets = torch.randint(vocab, (rows,))
    targets[::5] = -100
    return hidden, weight, targets, torch.randn(rows)


def in_fp64(hidden, weight, targets, g):
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
    found, chained = expected_of([hidden, weight, bias], targets, g, None)
    return found.logprob, chained["hidden"], chained["weight"]


def in_eager_fp32(hidden, weight, targets, g):
    """What a trainer writes: fp32 logits, and autograd to the leaves of low precision."""
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    live = targets != -100
    log_p = F.log_softmax(F.linear(h.float(), w.float()), -1)
    logprob = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0] * live
    return logprob.detach(), *torch.autograd.grad((logprob * g).sum(), (h, w))


def ours(hidden, weight, targets, g, trained, chunk_size=None):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
    logprob = linear_token_logprobs(h, w, targets, chunk_size=chunk_size)
    leaves = [h, w] if trained else [h]
    found = torch.autograd.grad((logprob * g).sum(), leaves)
    assert all(a.dtype == x.dtype for a, x in zip(found, leaves, strict=True))
    return logprob.detach(), *found


def errors_of(found, given):
    return [relative_error(a, b) for a, b in zip(found, in_fp64(*given), strict=False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunks", [1, 7, 64])
def test_errors_are_at_most_twice_those_of_fp32_logits(dtype, trained, chunks) -> None:
    given = low_precision(dtype)
    eager = errors_of(in_eager_fp32(*given), given)
    found = errors_of(ours(*given, trained, chunk_size=-(-128 // chunks)), given)
    assert all(a <= 2 * b for a, b in zip(found, eager, strict=False)), (found, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("at", "mutant"), enumerate(["logits", "d_hidden", "d_weight"]))
def test_the_comparison_rejects_sums_of_low_precision(dtype, at, mutant) -> None:
    hidden, weight, targets, g = given = low_precision(dtype)
    live = (targets != -100).nonzero()[:, 0]
    h, x = hidden[live].float(), targets[live]
    logits = h @ weight.float().T
    log_p = F.log_softmax(logits.to(dtype).float() if mutant == "logits" else logits, -1)
    dz = g[live, None] * (F.one_hot(x, len(weight)) - log_p.exp())
    logprob = torch.zeros(len(targets))
    logprob[live] = log_p.gather(-1, x[:, None])[:, 0]
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    step = len(weight) // 64 if mutant == "d_hidden" else len(weight)
    for part in range(0, len(weight), step):
        share = dz[:, part : part + step] @ weight[part : part + step].float()
        d_hidden[live] += share.to(dtype)
    step = 2 if mutant == "d_weight" else len(h)
    for part in range(0, len(h), step):
        d_weight += (dz[part : part + step].T @ h[part : part + step]).to(dtype)
    eager = errors_of(in_eager_fp32(*given), given)
    found = errors_of((logprob, d_hidden, d_weight), given)
    assert found[at] > 2 * eager[at], (found, eager)
    assert mutant == "logits" or all(found[i] <= 2 * eager[i] for i in {0, 1, 2} - {at})


# Cost


def audit(rows, vocab, width, wanted=(), *, entropy=False, chunk_size=8, ignored=True):
    """FLOPs in units of G, and the largest tensor, of forward and backward."""
    leaves = [torch.randn(rows, width), torch.randn(vocab, width), torch.randn(vocab)]
    for name in wanted:
        leaves[NAMES.index(name)].requires_grad_()
    targets = torch.randint(vocab, (rows,))
    if ignored:
        targets[torch.randperm(rows)[: rows // 2]] = -100
    live = int((targets != -100).sum())
    with FlopAudit() as mode:
        stats = linear_token_stats(
            leaves[0], leaves[1], targets, bias=leaves[2], entropy=entropy, chunk_size=chunk_size
        )
        if wanted:
            loss = stats.logprob.sum() + (stats.entropy.sum() if entropy else 0.0)
            torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
    return mode.flops / (2 * live * vocab * width), mode.largest


@pytest.mark.parametrize(
    ("wanted", "entropy", "cost"),
    [
        ((), False, 1),
        ((), True, 1),
        (("hidden",), False, 2),
        (("hidden",), True, 3),
        (("hidden", "weight"), False, 4),
        (("hidden", "weight"), True, 4),
        (("weight",), False, 3),
        (("weight",), True, 3),
        (NAMES, False, 4),
        (("bias",), False, 2),
        (("hidden", "bias"), False, 3),
    ],
)
@pytest.mark.parametrize("chunk_size", [8, 1000])
def test_each_plan_costs_what_it_says(wanted, entropy, cost, chunk_size) -> None:
    flops, _ = audit(64, 101, 16, wanted, entropy=entropy, chunk_size=chunk_size)
    assert flops == pytest.approx(cost, rel=0.01)


def test_the_audit_counts_what_eager_pytorch_does() -> None:
    h, w = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    with FlopAudit() as mode:
        F.linear(h, w, torch.zeros(11)).sum().backward()
        torch.ones(6, 11).addmm_(h.detach(), w.detach().T, beta=0)
        torch.addmm(torch.zeros(6, 11), h.detach(), w.detach().T, out=torch.zeros(6, 11))
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert mode.flops == 5 * (2 * 6 * 11 * 5) + 2 * 2 * 3 * 4 * 5
    assert mode.largest == 66


@pytest.mark.parametrize("wanted", [(), *PLANS], ids="-".join)
@pytest.mark.parametrize("entropy", [False, True])
def test_memory_depends_on_the_chunk_and_not_on_the_tokens(wanted, entropy) -> None:
    vocab, width, chunk = 3000, 4, 8
    sizes = [
        audit(rows, vocab, width, wanted, entropy=entropy, chunk_size=chunk)[1]
        for rows in (64, 512)
    ]
    assert sizes == [chunk * vocab] * 2


def test_the_default_chunk_is_bounded(monkeypatch) -> None:
    monkeypatch.setitem(linear_rows._WORKSPACE_BYTES, "cpu", 4 * 3000 * 10)
    _, largest = audit(512, 3000, 4, NAMES, chunk_size=None, ignored=False)
    assert 9 * 3000 <= largest <= 10 * 3000


# Around it


@PLAN
def test_the_same_bits_twice(wanted) -> None:
    head, targets, g, h = problem(dtype=torch.float32)
    runs = [evaluate(head, targets, g, h, wanted, chunk_size=2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", PLANS, ids="-".join)
def test_autocast_rounds_the_operands_as_linear_does(dtype, wanted) -> None:
    hidden, weight = torch.randn(40, 24).to(dtype), torch.randn(60, 24) / 2
    bias, targets = torch.randn(60), torch.randint(60, (40,))

    def run(function):
        leaves = dict(zip(NAMES, (x.clone() for x in (hidden, weight, bias)), strict=True))
        for name in wanted:
            leaves[name].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logprob = function(*leaves.values())
        gradients = torch.autograd.grad(logprob.sum(), [leaves[name] for name in wanted])
        return logprob.detach(), gradients

    def plain(h, w, b):
        return F.linear(h, w, b).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    logprob, found = run(lambda h, w, b: linear_token_logprobs(h, w, targets, bias=b))
    expected, gradients = run(plain)
    assert logprob.dtype == torch.float32
    assert relative_error(logprob, expected) < 4e-3
    # The bf16 operands exactly: what F.linear rounds besides, its logits, is not rounded here.
    exact = plain(hidden.bfloat16().float(), weight.bfloat16().float(), bias)
    assert relative_error(logprob, exact) < 1e-6
    originals = dict(zip(NAMES, (hidden, weight, bias), strict=True))
    for name, a, b in zip(wanted, found, gradients, strict=True):
        assert a.dtype == originals[name].dtype
        assert relative_error(a, b) < 1e-2, name


def test_backward_inside_autocast_gives_the_same_bits() -> None:
    hidden, weight = torch.randn(9, 5), torch.randn(37, 5)
    targets = torch.randint(37, (9,))
    runs = []
    for inside in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_token_logprobs(h, w, targets).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            runs.append(torch.autograd.grad(loss, (h, w)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_grad_keeps_nothing_and_costs_one_matmul() -> None:
    h, w = torch.randn(16, 5, requires_grad=True), torch.randn(37, 5, requires_grad=True)
    targets = torch.randint(37, (16,))
    with torch.no_grad(), FlopAudit() as mode:
        stats = linear_token_stats(h, w, targets, entropy=True)
    assert not stats.logprob.requires_grad and not stats.entropy.requires_grad
    assert mode.flops == 2 * 16 * 37 * 5
    torch.testing.assert_close(stats.logprob, linear_token_logprobs(h, w, targets).detach())


def test_lse_is_not_differentiable() -> None:
    head, targets, _, _ = problem()
    stats = linear_token_stats(head[0].requires_grad_(), head[1], targets)
    assert stats.logprob.requires_grad and not stats.lse.requires_grad
    assert stats.entropy is None


@PLAN
@pytest.mark.parametrize("entropy", [False, True])
def test_checkpointing_changes_no_gradient(wanted, entropy) -> None:
    head, targets, g, h = problem(dtype=torch.float32)
    _, expected = evaluate(head, targets, g, h if entropy else None, wanted)
    leaves = [x.clone().requires_grad_(n in wanted) for n, x in zip(NAMES, head, strict=True)]

    def loss(hidden, weight, bias):
        stats = linear_token_stats(hidden, weight, targets, bias=bias, entropy=entropy)
        total = stats.logprob @ g.float()
        return total + stats.entropy @ h.float() if entropy else total

    checkpoint(loss, *leaves, use_reentrant=False).backward()
    for name, leaf in zip(NAMES, leaves, strict=True):
        if name in wanted:
            assert torch.equal(leaf.grad, expected[name]), name
        else:
            assert leaf.grad is None


@PLAN
@pytest.mark.parametrize("entropy", [False, True])
def test_first_and_second_derivatives(wanted, entropy) -> None:
    head = [torch.randn(4, 3), torch.randn(6, 3), torch.randn(6)]
    head = [x.double() for x in head]
    targets = torch.tensor([1, -100, 5, 0])
    leaves = [head[NAMES.index(name)].requires_grad_() for name in wanted]

    def function(*given):
        filled = dict(zip(NAMES, head, strict=True)) | dict(zip(wanted, given, strict=True))
        stats = linear_token_stats(
            filled["hidden"], filled["weight"], targets, bias=filled["bias"], entropy=entropy,
            chunk_size=2, softcap=3.0, temperature=0.7,
        )  # fmt: skip
        return (stats.logprob, stats.entropy) if entropy else stats.logprob

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("used", ["logprob", "entropy"])
def test_a_second_derivative_of_one_output_alone(used) -> None:
    hidden = torch.randn(4, 3).double().requires_grad_()
    weight = torch.randn(6, 3).double().requires_grad_()
    targets = torch.tensor([1, -100, 5, 0])

    def function(hidden, weight):
        return getattr(linear_token_stats(hidden, weight, targets, entropy=True), used)

    assert torch.autograd.gradcheck(function, (hidden, weight))
    assert torch.autograd.gradgradcheck(function, (hidden, weight))


@pytest.mark.parametrize("trained", [False, True])
def test_entropy_alone_may_be_differentiated(trained) -> None:
    head, targets, _, h = problem()
    hidden, weight = head[0].requires_grad_(), head[1].requires_grad_(trained)
    stats = linear_token_stats(hidden, weight, targets, bias=head[2], entropy=True, chunk_size=4)
    leaves = [hidden, weight] if trained else [hidden]
    found = torch.autograd.grad((stats.entropy * h).sum(), leaves)
    _, chained = expected_of(head, targets, torch.zeros(ROWS), h)
    for a, name in zip(found, NAMES, strict=False):
        assert relative_error(a, chained[name]) <= 1e-11


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_into_one_graph(trained) -> None:
    head, targets, g, _ = problem(dtype=torch.float32)
    hidden, weight = head[0].requires_grad_(), head[1].requires_grad_(trained)

    def step(hidden, weight):
        return (linear_token_logprobs(hidden, weight, targets, chunk_size=4) * g.float()).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [hidden, weight] if trained else [hidden]
    found = torch.autograd.grad(compiled(hidden, weight), leaves)
    for a, b in zip(found, torch.autograd.grad(step(hidden, weight), leaves), strict=True):
        assert relative_error(a, b) < 1e-6


MISTAKES = {
    "hidden of integers": ({"hidden": torch.zeros(ROWS, WIDTH).int()}, TypeError, "hidden"),
    "hidden too wide": ({"hidden": torch.zeros(ROWS, WIDTH + 1)}, ValueError, "hidden"),
    "hidden 0-d": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden"),
    "weight of one dimension": ({"weight": torch.zeros(WIDTH)}, ValueError, "weight"),
    "weight of three": ({"weight": torch.zeros(2, 3, WIDTH)}, ValueError, "weight"),
    "empty weight": ({"weight": torch.zeros(0, WIDTH)}, ValueError, "weight"),
    "weight of another dtype": ({"weight": torch.zeros(VOCAB, WIDTH).half()}, TypeError, "weight"),
    "bias of another length": ({"bias": torch.zeros(VOCAB + 1)}, ValueError, "bias"),
    "bias of integers": ({"bias": torch.zeros(VOCAB).int()}, TypeError, "bias"),
    "targets of floats": ({"targets": torch.zeros(ROWS)}, TypeError, "targets"),
    "too few targets": ({"targets": torch.zeros(ROWS - 1).long()}, ValueError, "targets"),
    "target too large": ({"targets": torch.full((ROWS,), VOCAB)}, ValueError, "targets"),
    "negative target": ({"targets": torch.full((ROWS,), -1)}, ValueError, "targets"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size"),
    "chunk_size of floats": ({"chunk_size": 2.0}, TypeError, "chunk_size"),
    "chunk_size of bools": ({"chunk_size": True}, TypeError, "chunk_size"),
    "impl": ({"impl": "cuda"}, ValueError, "impl"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperatures": ({"temperature": torch.zeros(ROWS)}, ValueError, "temperature"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "scale": ({"scale": "1"}, TypeError, "scale"),
    "no weight": ({"weight": None}, TypeError, "weight"),
    "targets as a list": ({"targets": [0] * ROWS}, TypeError, "targets"),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("operation", [linear_token_stats, linear_token_logprobs])
def test_bad_input_names_the_argument(case, operation) -> None:
    changes, error, name = MISTAKES[case]
    arguments = {
        "hidden": torch.zeros(ROWS, WIDTH),
        "weight": torch.zeros(VOCAB, WIDTH),
        "targets": torch.zeros(ROWS, dtype=torch.long),
    } | changes
    with pytest.raises(error, match=f"^{name}: "):
        operation(**arguments)
