"""What the backends of token statistics do besides their numbers: layouts, bits, gradients in the
memory of the logits, memory, graphs and operators.
"""

import pytest
import torch
from support.compare import assert_as_accurate, assert_gradient_as_accurate
from support.oracle import token_stats_oracle
from support.token_stats_rows import BACKENDS, evaluate, random_rows

import fastrlhf
from fastrlhf import reference
from fastrlhf.recipes.memory import peak_memory


def layouts(device):
    """(B, T, V) = (2, 3, 65) logits of one content in many layouts, by name."""
    content = torch.randn(2, 3, 65, device=device)

    def filled(view: torch.Tensor) -> torch.Tensor:
        return view.copy_(content)

    new = lambda *shape: torch.full(shape, torch.nan, device=device)  # noqa: E731
    return content, {
        "contiguous": content.clone(),
        "all but the last position": filled(new(2, 4, 65)[:, :-1]),
        "all but the first position": filled(new(2, 4, 65)[:, 1:]),
        "part of the vocabulary": filled(new(2, 3, 80)[..., 7:72]),
        "every other token": filled(new(2, 3, 130)[..., ::2]),
        "vocabulary first": filled(new(65, 3, 2).permute(2, 1, 0)),
        "positions first": filled(new(3, 2, 65).transpose(0, 1)),
        "odd offset": filled(new(2 * 3 * 65 + 3)[3:].view(2, 3, 65)),
    }


# One worker compiles for all: what the compiler needs before its first kernel takes a while.
INDUCTOR = pytest.param("inductor", marks=pytest.mark.xdist_group("inductor"))


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", layouts("cpu")[1])
def test_layouts_do_not_matter(impl, inplace, layout, device) -> None:
    content, views = layouts(device)
    targets = torch.randint(65, (2, 3), device=device)
    targets[1, 1] = -100
    expected, gradient = evaluate(content, targets, impl=impl)
    leaf = views[layout].requires_grad_()
    logits = leaf.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
    stats = fastrlhf.token_stats(logits, targets, impl=impl, inplace_backward=inplace)
    (found,) = torch.autograd.grad(stats.logprob.sum(), logits)
    exact = token_stats_oracle(content.flatten(0, 1), targets.flatten())
    assert_as_accurate(stats.logprob, expected.logprob, exact.logprob)
    assert_gradient_as_accurate(
        found.flatten(0, 1), gradient.flatten(0, 1), exact.gradient, targets.flatten()
    )


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_expanded_logits_and_upstream_gradients(impl, inplace, device) -> None:
    row = torch.randn(1, 30, device=device, requires_grad=True)
    targets = torch.tensor([1, 2, 29], device=device)
    logprobs = fastrlhf.token_logprobs(
        row.expand(3, 30), targets, impl=impl, inplace_backward=inplace
    )
    (gradient,) = torch.autograd.grad(logprobs.mean(), row)
    plain, exact = (
        torch.autograd.grad(x.log_softmax(-1)[0, targets].mean(), x)[0]
        for x in (row, row.detach().double().requires_grad_())
    )
    assert_as_accurate(gradient, plain, exact)


@BACKENDS
def test_offsets_past_2_to_the_31_elements(impl, device) -> None:
    vocab, stride = 262144, 2**31 + 16
    # Two rows, far apart in memory of which only they are ever touched.
    memory = torch.empty(stride + vocab, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, vocab), (stride, 1))
    content = torch.randn(2, vocab, device=device).bfloat16()
    logits.copy_(content)
    targets = torch.tensor([5, vocab - 1], device=device)
    expected = fastrlhf.token_logprobs(content, targets, impl=impl)
    assert torch.equal(fastrlhf.token_logprobs(logits, targets, impl=impl), expected)


@BACKENDS
@pytest.mark.parametrize("vocab", [1000, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, vocab, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 12
    logits, targets, g, h = random_rows(rows, vocab, device, dtype)
    targets, logits = torch.where(targets < 0, 0, targets), logits.nan_to_num(0.0)
    options = {"impl": impl, "temperature": 0.7}
    stats, gradient = evaluate(logits, targets, g=g, h=h, **options)
    again, gradient_again = evaluate(logits, targets, g=g, h=h, **options)
    assert torch.equal(stats.logprob, again.logprob) and torch.equal(gradient, gradient_again)
    for row in (0, 1, rows - 1):
        one = slice(row, row + 1)
        alone, gradient_alone = evaluate(logits[one], targets[one], g=g[one], h=h[one], **options)
        for name in ("logprob", "entropy", "lse"):
            assert torch.equal(getattr(alone, name), getattr(stats, name)[one]), name
        assert torch.equal(gradient_alone, gradient[one])


@BACKENDS
def test_backward_in_place_gives_the_same_bits_in_the_memory_of_the_logits(impl, device) -> None:
    leaf = torch.randn(5, 300, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 299, 0, 7], device=device)
    _, expected = evaluate(leaf, targets, impl=impl)
    logits = leaf * 1.0
    logprobs = fastrlhf.token_logprobs(logits, targets, impl=impl, inplace_backward=True)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits.detach(), expected)


@BACKENDS
def test_overwritten_logits_are_refused_by_autograd(impl, device) -> None:
    leaf = torch.randn(2, 30, device=device, requires_grad=True)
    logits = leaf * 1.0
    targets = torch.tensor([1, 2], device=device)
    logprobs = fastrlhf.token_logprobs(logits, targets, impl=impl, inplace_backward=True)
    other_loss = logits.square().sum()
    logprobs.sum().backward(retain_graph=True)
    for later in (logprobs, other_loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.sum().backward()


@BACKENDS
@pytest.mark.parametrize("step", [1, 19])
def test_overlapping_windows_are_not_overwritten(impl, step, device) -> None:
    memory = torch.randn(60, device=device)
    before, targets = memory.clone(), torch.tensor([1, 2, 3], device=device)
    windows = memory.unfold(0, 20, step)[:3]
    _, expected = evaluate(windows, targets, impl=impl)
    leaf = windows.requires_grad_()
    fastrlhf.token_logprobs(leaf, targets, impl=impl, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(memory.detach(), before)


@BACKENDS
def test_windows_that_only_touch_are_overwritten(impl, device) -> None:
    memory = torch.randn(60, device=device)
    windows, targets = memory.unfold(0, 20, 20), torch.tensor([1, 2, 3], device=device)
    _, expected = evaluate(windows, targets, impl=impl)
    leaf = windows.requires_grad_()
    fastrlhf.token_logprobs(leaf, targets, impl=impl, inplace_backward=True).sum().backward()
    assert torch.equal(memory.detach(), expected.view(-1))


@BACKENDS
def test_a_leaf_may_be_overwritten_too(impl, device) -> None:
    logits = torch.randn(2, 30, device=device, requires_grad=True)
    targets = torch.tensor([1, 2], device=device)
    _, expected = evaluate(logits, targets, impl=impl)
    fastrlhf.token_logprobs(logits, targets, impl=impl, inplace_backward=True).sum().backward()
    assert torch.equal(logits.grad, expected)


def test_auto_is_eager_on_the_cpu() -> None:
    logits, targets = torch.randn(3, 50), torch.tensor([1, 2, 3])
    auto = fastrlhf.token_logprobs(logits, targets)
    assert torch.equal(auto, fastrlhf.token_logprobs(logits, targets, impl="eager"))


def test_the_eager_backend_holds_a_bounded_fp32_copy(monkeypatch) -> None:
    held = []
    forward = reference.token_stats_forward
    backward = reference.token_stats_backward

    def recorded(function):
        def call(logits, *args, **kwargs):
            held.append(logits.numel())
            return function(logits, *args, **kwargs)

        return call

    monkeypatch.setattr(reference, "token_stats_forward", recorded(forward))
    monkeypatch.setattr(reference, "token_stats_backward", recorded(backward))
    logits = torch.randn(300, 20000, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(20000, (300,))
    fastrlhf.token_logprobs(logits, targets, impl="eager").sum().backward()
    assert len(held) == 2 * 6 and max(held) <= 2**20
    assert sum(held) == 2 * logits.numel()


@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory_is_the_gradient_and_a_bounded_rest(inplace, device) -> None:
    logits = torch.randn(1200, 20000, device=device).bfloat16()
    leaf = logits.requires_grad_()
    targets = torch.randint(20000, (1200,), device=device)

    def work() -> None:
        logprobs = fastrlhf.token_logprobs(leaf.view_as(leaf), targets, inplace_backward=inplace)
        logprobs.sum().backward()

    _, peak = peak_memory(work, device)
    rest = 2**20 if device.type == "cuda" else 6 * 2**22
    assert peak <= (0 if inplace else leaf.nbytes) + rest


def training_step(impl, inplace):
    """A step from hidden states to a DPO loss, with everything that fastrlhf puts in between."""

    def step(hidden, weight, ids, mask, ref):
        targets = fastrlhf.shift_targets(ids, mask)
        stats = fastrlhf.token_stats(
            hidden @ weight.T, targets, entropy=True, softcap=20.0, impl=impl,
            inplace_backward=inplace,
        )  # fmt: skip
        index = torch.arange(2, device=ids.device), torch.arange(2, 4, device=ids.device)
        losses, _ = fastrlhf.dpo_loss(stats.logprob, ref, *index, mask=targets != -100, impl=impl)
        return losses.mean() - 0.01 * stats.entropy.mean()

    return step


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_a_training_step_compiles_whole(impl, inplace, backend, device) -> None:
    torch.compiler.reset()
    hidden = torch.randn(4, 6, 8, device=device, requires_grad=True)
    weight = torch.randn(37, 8, device=device, requires_grad=True)
    ids = torch.randint(37, (4, 6), device=device)
    inputs = (ids, torch.rand(4, 6, device=device) > 0.3, torch.randn(4, device=device))
    step = training_step(impl, inplace)
    results = []
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for function, sides in (
        (step, (hidden, weight)),
        (torch.compile(step, fullgraph=True, backend=backend), (hidden, weight)),
        (step, exact),
    ):
        loss = function(*sides, *inputs)
        results.append((loss, *torch.autograd.grad(loss, sides)))
    for plain, compiled, right in zip(*results, strict=True):
        assert_as_accurate(compiled, plain, right)


@BACKENDS
def test_the_operators_pass_opcheck(impl, device) -> None:
    logits = torch.randn(3, 20, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 19], device=device)
    options = (None, 0.7, 5.0, 1.0, -100, True, False, impl)
    operator = torch.ops.fastrlhf.token_stats.default
    torch.library.opcheck(operator, (logits, targets, *options))
    logprob, entropy, _, peak, log_norm = (x.detach() for x in operator(logits, targets, *options))
    saved = (logits.detach(), targets, logprob, entropy, peak, log_norm, logprob, entropy)
    transform = (None, 0.7, 5.0, 1.0, impl)
    torch.library.opcheck(torch.ops.fastrlhf.token_stats_backward.default, (*saved, *transform))
    torch.library.opcheck(torch.ops.fastrlhf.token_stats_backward_.default, (*saved, *transform))
    into = torch.empty(3, 20, device=device)
    for name, destination in (("", ()), ("_", ()), ("_into", (into,))):
        operator = getattr(torch.ops.fastrlhf, f"token_stats_backward{name}").default
        torch.library.opcheck(operator, (*destination, *saved, *transform, logprob))
