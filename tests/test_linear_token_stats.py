"""Token statistics from hidden states against an oracle in NumPy's fp64, at the stated cost."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate, relative_error
from support.matmuls import MatmulAudit
from support.oracle import token_stats_oracle
from torch import Tensor, autograd
from torch.utils.checkpoint import checkpoint

import fastrlhf
from fastrlhf import QuantizedWeight, linear_token_logprobs, linear_token_stats, reference
from fastrlhf.ops.linear_head import Head

TOKENS, WIDTH, VOCAB = 11, 6, 37
# Which of hidden, weight and bias need a gradient. P1 and P4 are KEEP_SLOPES and RECOMPUTE of
# `fastrlhf/ops/linear_plans.py`, the plans that statistics then take.
NEEDS = {
    "P1": (True, False, False),
    "P4": (True, True, True),
    "P4 without bias": (True, True, False),
    "weight": (False, True, False),
    "bias": (False, False, True),
}
TRANSFORMS = {
    "plain": {},
    "all": {"softcap": 3.0, "scale": 0.5, "temperature": torch.linspace(0.5, 2, TOKENS)},
}


def inputs(needs=(True, True, True), dtype=torch.float64, device="cpu"):
    """Hidden states with garbage in ignored rows, weight, bias; targets."""
    targets = torch.randint(VOCAB, (TOKENS,), device=device)
    targets[[0, 4, 10]] = -100
    tensors = [
        torch.randn(*shape, dtype=dtype, device=device)
        for shape in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    ]
    tensors[0][0], tensors[0][4] = torch.nan, torch.inf
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    return tensors, targets


def oracle(tensors: list[Tensor], targets: Tensor, g: Tensor, h: Tensor, **transform):
    """Statistics, and the gradients of Σ g·logprob + h·entropy, by the chain rule in fp64."""
    hidden, weight, bias = (x.detach().cpu().double() for x in tensors)
    hidden = torch.where((targets.cpu() >= 0)[:, None], hidden, 0.0)
    logits = hidden @ weight.T + bias
    found = token_stats_oracle(logits, targets, g=g, h=h, **transform)
    dz = found.gradient
    return found, (dz @ weight, dz.T @ hidden, dz.sum(0))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize(
    ("impl", "chunk_size"), [("eager", 1), ("eager", 3), ("eager", None), ("triton", 4)]
)
def test_values_and_gradients(impl, chunk_size, needs, transform, entropy, device) -> None:
    place = device if impl == "triton" else "cpu"
    tensors, targets = inputs(NEEDS[needs], device=place)
    options = {
        name: value.to(place) if isinstance(value, Tensor) else value
        for name, value in TRANSFORMS[transform].items()
    }
    stats = linear_token_stats(
        tensors[0], tensors[1], targets, bias=tensors[2], entropy=entropy, chunk_size=chunk_size,
        impl=impl, **options,
    )  # fmt: skip
    g, h = torch.randn(TOKENS, dtype=torch.float64), torch.randn(TOKENS, dtype=torch.float64)
    h = h if entropy else torch.zeros(TOKENS)
    expected, gradients = oracle(tensors, targets, g, h, **TRANSFORMS[transform])
    bounds = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(stats.logprob.cpu(), expected.logprob, **bounds)
    torch.testing.assert_close(stats.lse.cpu(), expected.lse, **bounds)
    assert not stats.lse.requires_grad
    # An ignored row has no influence, so whatever upstream gradient reaches it does no harm.
    upstream = torch.where(targets.cpu() < 0, torch.nan, g).to(place)
    loss = stats.logprob @ upstream
    if entropy:
        torch.testing.assert_close(stats.entropy.cpu(), expected.entropy, **bounds)
        loss = loss + stats.entropy @ h.to(place)
    else:
        assert stats.entropy is None
    wanted = [i for i, need in enumerate(NEEDS[needs]) if need]
    found = autograd.grad(loss, [tensors[i] for i in wanted])
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient.cpu(), gradients[i], **bounds)
        if i == 0:
            assert not gradient[targets < 0].any()


def test_the_entropy_alone_and_other_shapes() -> None:
    tensors, targets = inputs()
    stats = linear_token_stats(tensors[0], tensors[1], targets, bias=tensors[2], entropy=True)
    whole = autograd.grad(stats.entropy.sum(), tensors)
    _, expected = oracle(tensors, targets, torch.zeros(TOKENS), torch.ones(TOKENS))
    for a, b in zip(whole, expected, strict=True):
        torch.testing.assert_close(a, b)
    # The same tokens as (B, T), strided and with small targets.
    hidden = torch.stack([tensors[0]] * 3, dim=1).transpose(0, 1).flip(-1)
    strided = linear_token_stats(
        hidden, tensors[1].flip(-1), targets.to(torch.int8).expand(3, -1), bias=tensors[2]
    )
    torch.testing.assert_close(strided.logprob, stats.logprob.expand(3, -1))


def test_nothing_to_do() -> None:
    for needs in ((True, False, False), (True, True, True)):
        tensors, targets = inputs(needs)
        hidden, weight, bias = tensors
        wanted = [x for x in tensors if x.requires_grad]
        empty = linear_token_logprobs(hidden[:0], weight, targets[:0], bias=bias)
        ignored = linear_token_logprobs(hidden, weight, torch.full_like(targets, -100), bias=bias)
        assert empty.shape == (0,) and not ignored.any()
        for loss in (empty.sum(), ignored.sum()):
            for gradient in autograd.grad(loss, wanted):
                assert not gradient.any()
    one = linear_token_logprobs(tensors[0][1:2], weight[:1], torch.zeros(1, dtype=torch.long))
    assert one.item() == 0


def errors(dtype: torch.dtype, trained: bool, *, tokens: int = 256, chunk_size: int | None = None):
    """Relative errors of log-prob and gradients, ours and those of eager PyTorch in fp32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 64, generator=generator).to(dtype)
    weight = (torch.randn(500, 64, generator=generator) * 0.3).to(dtype)
    targets = torch.randint(500, (tokens,), generator=generator)
    g = torch.randn(tokens, generator=generator)

    def run(function, kind):
        x, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_(trained)
        logprob = function(x, w)
        leaves = [x, w] if trained else [x]
        return [logprob.detach(), *autograd.grad((logprob * g).sum(), leaves)]

    def eager(x, w):
        logits = F.linear(x.to(torch.promote_types(x.dtype, torch.float32)), w.to(
            torch.promote_types(w.dtype, torch.float32)))  # fmt: skip
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    exact = run(eager, torch.float64)
    ours = run(lambda x, w: linear_token_logprobs(x, w, targets, chunk_size=chunk_size), dtype)
    theirs = run(eager, dtype)
    return [
        [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        for found in (ours, theirs)
    ], (ours, exact)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_are_at_most_twice_those_of_fp32_logits(dtype, trained) -> None:
    (ours, theirs), _ = errors(dtype, trained)
    for own, eager in zip(ours, theirs, strict=True):
        assert own <= 2 * eager


def entropy_errors(dtype: torch.dtype, upstream: float, sharpness: float) -> tuple[float, float]:
    """Relative errors of d_hidden, ours and that of eager PyTorch in fp32, where the log-prob's
    share and the entropy's nearly cancel in every token.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator).to(dtype)
    weight = (sharpness * torch.randn(2, 16, generator=generator)).to(dtype)
    targets = torch.zeros(64).long()

    def d_hidden(function, kind, g, h):
        x = hidden.to(kind).requires_grad_()
        logprob, entropy, *_ = function(x, weight.to(kind), targets, entropy=True)
        (found,) = autograd.grad((g * logprob + h * entropy).sum(), x)
        return found

    def eager(x, w, targets, entropy):
        return fastrlhf.reference.linear_token_stats(x, w, targets, entropy=entropy)

    one, none = torch.ones(64).double(), torch.zeros(64).double()
    of_logprob, of_entropy = (
        d_hidden(eager, torch.float64, *pair) for pair in ((one, none), (none, one))
    )
    # Of two tokens, all slopes of a row are parallel.
    ratio = (of_logprob * of_entropy).sum(1) / of_entropy.square().sum(1)
    g, h = upstream * one.float(), (-0.97 * upstream * ratio).float()
    exact = d_hidden(eager, torch.float64, g.double(), h.double())
    own, theirs = (d_hidden(f, dtype, g, h) for f in (linear_token_stats, eager))
    return relative_error(own, exact), relative_error(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slopes_that_cancel_and_small_ones_keep_their_accuracy(dtype, monkeypatch) -> None:
    # And slopes of 1e-6, which a loss scaled for fp16 shows.
    for upstream, sharpness in ((1.0, 0.3), (1e4, 2e-3)):
        own, theirs = entropy_errors(dtype, upstream, sharpness)
        assert own <= 2 * theirs
    # The mutant: slopes rounded to the dtype of the hidden states.
    monkeypatch.setattr(
        "fastrlhf.ops.linear_plans.room_for_slopes", lambda hidden, alone: torch.zeros_like(hidden)
    )
    own, theirs = entropy_errors(dtype, 1.0, 0.3)
    assert own > 4 * theirs


def test_one_slope_alone_keeps_the_range_of_a_scaled_loss() -> None:
    hidden = torch.zeros(1, 2).half().requires_grad_()
    weight = torch.tensor([[1e-7, 0.0], [0.0, 4e-7]]).half()
    logprob = linear_token_logprobs(hidden, weight, torch.tensor([0]))
    (found,) = autograd.grad(2.0**16 * logprob.sum(), hidden)
    exact = 2.0**15 * (weight[0] - weight[1]).double()
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-3, atol=0)


def test_bf16_logits_would_not_pass() -> None:
    (_, theirs), (_, exact) = errors(torch.bfloat16, True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=generator).bfloat16()
    weight = (torch.randn(500, 64, generator=generator) * 0.3).bfloat16()
    targets = torch.randint(500, (256,), generator=generator)
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    assert relative_error(log_p.gather(-1, targets[:, None])[:, 0], exact[0]) > 100 * theirs[0]


def test_the_weight_gradient_stays_exact_over_64_chunks() -> None:
    (ours, theirs), (found, exact) = errors(torch.bfloat16, True, tokens=256, chunk_size=4)
    assert ours[2] <= 2 * theirs[2]
    # The mutant: chunks added up in bf16.
    total = torch.zeros_like(found[2])
    for part in exact[2].to(torch.float32).div(64).expand(64, -1, -1):
        total += part.bfloat16()
    assert relative_error(total, exact[2]) > 2 * theirs[2]


def matmuls(
    needs: str, *, entropy: bool = False, entropy_grad: bool = True, grad: bool = True
) -> float:
    """Matmuls of forward and backward in units of G, half of the tokens ignored."""
    hidden, weight, bias = torch.randn(64, 32), torch.randn(1000, 32), torch.randn(1000)
    for tensor, need in zip((hidden, weight, bias), NEEDS[needs], strict=True):
        tensor.requires_grad_(need and grad)
    targets = torch.randint(1000, (64,))
    targets[::2] = -100
    with MatmulAudit() as audit:
        stats = linear_token_stats(
            hidden, weight, targets, bias=bias, entropy=entropy, entropy_grad=entropy_grad,
            chunk_size=8, with_stats=() if entropy_grad else reference.FURTHER_STATS,
        )  # fmt: skip
        if grad:
            (stats.logprob.sum() + (stats.entropy.sum() if entropy else 0)).backward()
    # One weight gradient, or eight rows of logits: no (n, V), let alone (N, V).
    assert audit.largest <= 1000 * 32
    return audit.operations / (2 * 32 * 1000 * 32)


def test_as_many_matmuls_as_the_plan_says() -> None:
    assert matmuls("P4", grad=False) == pytest.approx(1, rel=0.01)
    assert matmuls("P1") == pytest.approx(2, rel=0.01)
    assert matmuls("P1", entropy=True) == pytest.approx(3, rel=0.01)
    assert matmuls("P1", entropy=True, entropy_grad=False) == pytest.approx(2, rel=0.01)
    assert matmuls("P4") == pytest.approx(4, rel=0.01)
    assert matmuls("P4", entropy=True) == pytest.approx(4, rel=0.01)
    assert matmuls("P4", entropy=True, entropy_grad=False) == pytest.approx(4, rel=0.01)
    assert matmuls("weight") == pytest.approx(3, rel=0.01)
    assert matmuls("bias") == pytest.approx(2, rel=0.01)


def test_the_audit_sees_what_it_is_for() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
    with MatmulAudit() as audit:
        F.linear(x, w).sum().backward()
        torch.zeros(5, 11).addmm_(x.detach(), w.detach().T)
    assert audit.operations == 4 * 2 * 5 * 7 * 11
    assert audit.largest == 77


@pytest.mark.parametrize("needs", ["P1", "P4"])
def test_the_workspace_does_not_grow_with_the_tokens(needs) -> None:
    largest = []
    for tokens in (32, 256):
        tensors = torch.randn(tokens, 4), torch.randn(5000, 4)
        for tensor, need in zip(tensors, NEEDS[needs], strict=False):
            tensor.requires_grad_(need)
        with MatmulAudit() as audit:
            linear_token_logprobs(
                *tensors, torch.zeros(tokens).long(), chunk_size=16
            ).sum().backward()
        largest.append(audit.largest)
    assert largest[0] == largest[1] == 16 * 5000


def test_the_same_bits_twice() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        tensors, targets = inputs(dtype=torch.float32)
        stats = linear_token_stats(*tensors[:2], targets, bias=tensors[2], chunk_size=3)
        runs.append([stats.logprob, *autograd.grad(stats.logprob.sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needs", ["P1", "P4"])
@pytest.mark.parametrize("entropy", [False, True])
def test_derivatives_of_both_orders(needs, entropy) -> None:
    tensors, targets = inputs(NEEDS[needs])
    wanted = [x for x in tensors if x.requires_grad]
    with torch.no_grad():
        tensors[0][targets < 0] = 0.0  # finite differences cannot step from NaN

    def statistics(*given):
        filled = iter(given)
        hidden, weight, bias = (next(filled) if x.requires_grad else x for x in tensors)
        stats = linear_token_stats(
            hidden, weight, targets, bias=bias, entropy=entropy, softcap=4.0, chunk_size=4
        )
        return (stats.logprob, stats.entropy) if entropy else stats.logprob

    assert autograd.gradcheck(statistics, wanted, fast_mode=True)
    assert autograd.gradgradcheck(statistics, wanted, fast_mode=True)


def test_a_tied_weight_gets_the_gradients_of_both_uses_of_any_order() -> None:
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(VOCAB, (5,)), torch.randint(VOCAB, (5,))

    def loss(weight):
        return linear_token_logprobs(torch.tanh(weight[ids]), weight, targets)

    assert autograd.gradcheck(loss, (weight,), fast_mode=True)
    assert autograd.gradgradcheck(loss, (weight,), fast_mode=True)


@pytest.mark.parametrize("needs", ["P1", "P4"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(needs, reentrant) -> None:
    tensors, targets = inputs(NEEDS[needs])
    wanted = [x for x in tensors if x.requires_grad]

    def logprobs(hidden):
        return linear_token_logprobs(hidden, tensors[1], targets, bias=tensors[2])

    plain = autograd.grad(logprobs(tensors[0]).sum(), wanted)
    for x in wanted:
        x.grad = None
    checkpoint(logprobs, tensors[0], use_reentrant=reentrant).sum().backward()
    for x, gradient in zip(wanted, plain, strict=True):
        assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast(hidden_dtype) -> None:
    hidden = torch.randn(32, 16).to(hidden_dtype).requires_grad_()
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_token_logprobs(hidden, weight, targets)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    expected = fastrlhf.reference.linear_token_stats(*exact, targets).logprob
    plain = fastrlhf.reference.linear_token_stats(*(x.float() for x in exact), targets).logprob
    assert_as_accurate(found, plain, expected)
    gradients = autograd.grad(found.sum(), (hidden, weight))
    for gradient, of, want in zip(
        gradients, (hidden, weight), autograd.grad(expected.sum(), exact), strict=True
    ):
        assert gradient.dtype == of.dtype
        assert relative_error(gradient, want) < (1e-5 if of is weight else 4e-3)


def test_fp64_is_left_alone_by_autocast() -> None:
    tensors, targets = inputs()
    plain = linear_token_logprobs(*tensors[:2], targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_token_logprobs(*tensors[:2], targets), plain)


@pytest.mark.parametrize("needs", ["P1", "P4"])
def test_compiled_in_one_graph(needs) -> None:
    tensors, targets = inputs(NEEDS[needs])
    wanted = [x for x in tensors if x.requires_grad]

    def step(hidden, weight, bias):
        return linear_token_logprobs(1.0 * hidden, weight, targets, bias=bias, chunk_size=4).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        autograd.grad(compiled(*tensors), wanted),
        autograd.grad(step(*tensors), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needs", NEEDS)
def test_a_weight_that_is_converted_in_slices_gives_the_same(needs, monkeypatch) -> None:
    tensors, targets = inputs(NEEDS[needs], torch.bfloat16)
    wanted = [x for x in tensors if x.requires_grad]
    results = []
    for rows in (VOCAB, 5):
        monkeypatch.setattr("fastrlhf.ops.linear_head._SLICE_ELEMENTS", rows * WIDTH)
        logprob = linear_token_logprobs(tensors[0], tensors[1], targets, bias=tensors[2])
        results.append((logprob, *autograd.grad(logprob.sum(), wanted)))
    for whole, sliced in zip(*results, strict=True):
        torch.testing.assert_close(sliced, whole)


def test_a_weight_that_is_rounded_first_is_converted_in_slices(monkeypatch) -> None:
    monkeypatch.setattr("fastrlhf.ops.linear_head._SLICE_ELEMENTS", 5 * WIDTH)
    weight = torch.randn(VOCAB, WIDTH)
    assert Head([weight], None, torch.float32).slice_rows == VOCAB
    assert Head([weight], None, torch.bfloat16).slice_rows == 5  # as under autocast


@pytest.mark.parametrize("needs", NEEDS)
def test_whatever_upstream_gradient_reaches_an_ignored_token_does_no_harm(needs) -> None:
    tensors, targets = inputs(NEEDS[needs])
    wanted = [x for x in tensors if x.requires_grad]
    stats = linear_token_stats(*tensors[:2], targets, bias=tensors[2], entropy=True)
    upstream = torch.randn(2, TOKENS, dtype=torch.float64)
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        g, h = torch.where(targets == -100, garbage, upstream)
        results.append(
            autograd.grad((stats.logprob, stats.entropy), wanted, (g, h), retain_graph=True)
        )
    for clean, *others in zip(*results, strict=True):
        assert all(torch.equal(other, clean) for other in others)


def test_a_run_that_is_longer_than_a_slice_is_not_expanded() -> None:
    codes = torch.randint(-127, 128, (4096, 64), dtype=torch.int8)
    quantized = QuantizedWeight(codes, torch.tensor([0.5]), codes.numel(), None, torch.float32)
    audit = MatmulAudit()
    with audit:
        rows = quantized[100:108]
    assert torch.equal(rows, 0.5 * codes[100:108].float())
    assert audit.largest <= codes.numel()  # as bytes, the codes themselves


@pytest.mark.parametrize("slices", [1, 6])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_weight(bits, slices, monkeypatch) -> None:
    vocab, width, run = 30, 8, 16 if bits == 4 else 8
    monkeypatch.setattr("fastrlhf.ops.linear_head._SLICE_ELEMENTS", vocab * width // slices)
    scales = torch.rand(vocab * width // run) + 0.5
    if bits == 4:
        indices, table = torch.randint(16, (vocab, width)), torch.linspace(-1, 1, 16)
        codes = (indices[:, ::2] * 16 + indices[:, 1::2]).to(torch.uint8)
        values = table[indices]
    else:
        codes, table = torch.randint(-127, 128, (vocab, width), dtype=torch.int8), None
        values = codes.float()
    dense = (values.view(-1, run) * scales[:, None]).view(vocab, width)
    quantized = QuantizedWeight(codes, scales, run, table, torch.float32)
    hidden = torch.randn(5, width, requires_grad=True)
    targets = torch.randint(vocab, (5,))
    found = linear_token_logprobs(hidden, quantized, targets)
    expected = linear_token_logprobs(hidden, dense, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (found, expected))
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(TOKENS, WIDTH + 1)}, ValueError, "^hidden: expected shape"),
        ({"hidden": torch.zeros(TOKENS, WIDTH).long()}, TypeError, "^hidden: "),
        ({"weight": None}, TypeError, "^weight: "),
        ({"weight": torch.zeros(VOCAB)}, ValueError, "^weight: "),
        ({"weight": torch.zeros(0, WIDTH)}, ValueError, "^weight: "),
        ({"weight": torch.zeros(VOCAB, WIDTH).bfloat16()}, TypeError, "^weight: expected"),
        ({"bias": torch.zeros(VOCAB + 1)}, ValueError, "^bias: "),
        ({"bias": torch.zeros(VOCAB).int()}, TypeError, "^bias: "),
        ({"targets": torch.zeros(TOKENS)}, TypeError, "^targets: "),
        ({"targets": torch.zeros(3).long()}, ValueError, "^targets: "),
        ({"targets": torch.full((TOKENS,), VOCAB)}, ValueError, "^targets: .*got 37"),
        ({"targets": torch.full((TOKENS,), -1)}, ValueError, "^targets: .*got -1"),
        ({"temperature": 0.0}, ValueError, "^temperature: "),
        ({"temperature": torch.zeros(TOKENS)}, ValueError, "^temperature: "),
        ({"softcap": -1.0}, ValueError, "^softcap: "),
        ({"scale": 0.0}, ValueError, "^scale: "),
        ({"chunk_size": 0}, ValueError, "^chunk_size: "),
        ({"chunk_size": 1.5}, TypeError, "^chunk_size: "),
        ({"impl": "cuda"}, ValueError, "^impl: "),
    ],
)
def test_bad_arguments_are_named(changes, error, message) -> None:
    arguments = {
        "hidden": torch.zeros(TOKENS, WIDTH), "weight": torch.zeros(VOCAB, WIDTH),
        "targets": torch.zeros(TOKENS).long(), **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_token_stats(**arguments)
