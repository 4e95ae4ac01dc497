"""Every operation forward and backward at the sizes of models, in bf16, on a GPU's real kernels.

Without a GPU the same tests run interpreted, small and in fp32. What they hold: results and
gradients against fp64, with twice the error of plain PyTorch in the same dtype as the budget; the
same bits from run to run, and for a row whatever surrounds it; memory as the allocator counts it. A
GPU alone can have offsets past 2^31, and shows whether anything waits for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.compare import gradient_errors, relative_error
from torch import Tensor, autograd

import fastrlhf
from fastrlhf.recipes.memory import peak_memory

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
VOCABS = [128256, 50257] if GPU else [2000, 1257]
TOKENS, WIDTH = (32, 1024) if GPU else (4, 16)
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="needs a GPU")
EPS = torch.finfo(torch.float32).eps


class Step(NamedTuple):
    """What a training step starts from: four sequences, the first quarter of each a prompt."""

    hidden: Tensor  # (4, T, H)
    weight: Tensor  # (V, H)
    other_hidden: Tensor
    other_weight: Tensor
    targets: Tensor  # (4, T)
    old: Tensor
    advantages: Tensor
    g: Tensor  # gradients from outside, 0 at the prompt
    h: Tensor

    @property
    def mask(self) -> Tensor:
        return self.targets != -100

    def logits(self) -> tuple[Tensor, Tensor]:
        """Of both models, in the dtype of the hidden states."""
        return self.hidden @ self.weight.T, self.other_hidden @ self.other_weight.T

    def exact(self) -> "Step":
        return Step(*(x.double() if x.is_floating_point() else x for x in self))


def step(vocab: int, dtype: torch.dtype) -> Step:
    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(size, device=DEVICE)).to(dtype)

    hidden, other = (normal(4, TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    weights = [normal(vocab, WIDTH, scale=2 * WIDTH**-0.5, dtype=dtype) for _ in range(2)]
    targets = torch.randint(vocab, (4, TOKENS), device=DEVICE)
    targets[:, : TOKENS // 4] = -100
    logprobs = (hidden.double() @ weights[0].double().T).log_softmax(-1)
    logprobs = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0].float()
    # Log-ratios of 0.1 and 0.3: clipped or not, whatever the rounding.
    old = logprobs + torch.tensor([-0.3, -0.1, 0.1, 0.3]).repeat(TOKENS).view(4, -1).to(DEVICE)
    g, h = (normal(4, TOKENS) * (targets != -100) for _ in range(2))
    return Step(hidden, weights[0], other, weights[1], targets, old, normal(4), g, h)


# Plain formulas, of the logits of both models.


def _log_p(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _logprobs(logits: Tensor, s: Step) -> Tensor:
    return _log_p(logits).gather(-1, s.targets.clamp(min=0)[..., None])[..., 0] * s.mask


def _plain_stats(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    log_p = _log_p(logits)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (_logprobs(logits, s) * s.g + entropy * s.h).sum()


def _plain_dpo(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    chosen, rejected = _logprobs(logits, s).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _plain_policy(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    ratio, advantages = (_logprobs(logits, s) - s.old).exp(), s.advantages[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (losses * s.mask).sum() / s.mask.sum()


def _plain_kl(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    log_p, log_q = _log_p(logits), _log_p(other)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * s.g).sum()


def _plain_jsd(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    log_p, log_q = _log_p(logits), _log_p(other)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, device=DEVICE).log()
    halves = ((x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q))
    return (0.5 * sum(halves) * s.g).sum()


# The same from this library, from logits and from hidden states.

PAIRS = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
ZEROS = torch.zeros(4, device=DEVICE)


def _stats(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    stats = fastrlhf.token_stats(logits, s.targets, entropy=True, impl="triton")
    return (stats.logprob * s.g + stats.entropy * s.h).sum()


def _stats_inplace(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    stats = fastrlhf.token_stats(
        logits * 1, s.targets, entropy=True, inplace_backward=True, impl="triton"
    )
    return (stats.logprob * s.g + stats.entropy * s.h).sum()


def _dpo(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    logprobs = fastrlhf.token_logprobs(logits, s.targets, impl="triton")
    return fastrlhf.dpo_loss(logprobs, ZEROS, *PAIRS, mask=s.mask, impl="triton")[0].mean()


def _policy(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    rest = (s.targets, s.old, s.advantages, s.mask)
    return fastrlhf.logits_policy_loss(logits, *rest, impl="triton")[0]


def _kl(logits: Tensor, other: Tensor, s: Step, direction: str = "reverse") -> Tensor:
    values = fastrlhf.kl_divergence(logits, other, mask=s.mask, direction=direction, impl="triton")
    return (values * s.g).sum()


def _jsd(logits: Tensor, other: Tensor, s: Step) -> Tensor:
    return _kl(logits, other, s, "jsd")


def _linear_stats(s: Step) -> Tensor:
    stats = fastrlhf.linear_token_stats(
        s.hidden, s.weight, s.targets, entropy=True, chunk_size=20, impl="triton"
    )
    return (stats.logprob * s.g + stats.entropy * s.h).sum()


def _linear_dpo(s: Step) -> Tensor:
    return fastrlhf.linear_dpo_loss(
        s.hidden, s.weight, s.targets, ZEROS, *PAIRS, chunk_size=20, impl="triton"
    )[0].mean()


def _linear_policy(s: Step) -> Tensor:
    rest = (s.targets, s.old, s.advantages, s.mask)
    return fastrlhf.linear_policy_loss(s.hidden, s.weight, *rest, chunk_size=20, impl="triton")[0]


def _linear_kl(s: Step, direction: str = "reverse") -> Tensor:
    values = fastrlhf.linear_kl_divergence(
        s.hidden, s.weight, s.other_hidden, s.other_weight, mask=s.mask, direction=direction,
        chunk_size=20, impl="triton",
    )  # fmt: skip
    return (values * s.g).sum()


def _linear_jsd(s: Step) -> Tensor:
    return _linear_kl(s, "jsd")


FROM_LOGITS = {
    "token_stats": (_stats, _plain_stats),
    "token_stats in place": (_stats_inplace, _plain_stats),
    "dpo": (_dpo, _plain_dpo),
    "policy loss": (_policy, _plain_policy),
    "kl": (_kl, _plain_kl),
    "jsd": (_jsd, _plain_jsd),
}
FROM_HIDDEN = {
    "token_stats": (_linear_stats, _plain_stats),
    "dpo": (_linear_dpo, _plain_dpo),
    "policy loss": (_linear_policy, _plain_policy),
    "kl": (_linear_kl, _plain_kl),
    "jsd": (_linear_jsd, _plain_jsd),
}


def from_logits(function: Callable, s: Step) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the logits."""
    logits, other = (x.detach() for x in s.logits())
    logits.requires_grad_()
    loss = function(logits, other, s)
    return loss.detach(), autograd.grad(loss, logits)[0].flatten(0, 1)


def from_hidden(function: Callable, s: Step, trained: bool) -> list[Tensor]:
    """Loss, and gradients of hidden states and, if it is trained, of the head."""
    s = s._replace(
        hidden=s.hidden.detach().requires_grad_(),
        weight=s.weight.detach().requires_grad_(trained),
    )
    loss = function(s)
    return [loss.detach(), *autograd.grad(loss, [s.hidden, s.weight][: 1 + trained])]


def within(found: float, plain: float) -> bool:
    """An error within twice that of plain PyTorch, or within rounding where that made none."""
    return found <= max(2 * plain, 64 * EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_from_logits(name, vocab, dtype) -> None:
    fused, plain = FROM_LOGITS[name]
    s = step(vocab, dtype)
    # The very logits that the others see, in fp64.
    logits, other = (x.detach().double() for x in s.logits())
    logits.requires_grad_()
    exact = plain(logits, other, s.exact())
    gradient = autograd.grad(exact, logits)[0].flatten(0, 1)
    errors = []
    for function in (fused, plain):
        loss, found = from_logits(function, s)
        # Of a divergence no entry stands out, but in a split it passes as well.
        errors.append(
            (relative_error(loss, exact), *gradient_errors(found, gradient, s.targets.flatten()))
        )
        assert not found[~s.mask.flatten()].any()
    assert all(map(within, *errors)), errors


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", FROM_HIDDEN)
def test_from_hidden_states(name, vocab, dtype, trained) -> None:
    fused, plain = FROM_HIDDEN[name]
    s = step(vocab, dtype)

    def through_logits(given: Step) -> Tensor:
        return plain(*given.logits(), given)

    exact = from_hidden(through_logits, s.exact(), trained)
    errors = [
        [relative_error(x, y) for x, y in zip(from_hidden(f, s, trained), exact, strict=True)]
        for f in (fused, through_logits)
    ]
    assert all(map(within, *errors)), errors


def test_the_budget_rejects_what_is_missing_or_a_percent_off() -> None:
    s = step(VOCABS[0], torch.float32)
    targets = s.targets.flatten()
    _, gradient = from_logits(_plain_policy, s)
    index = targets.clamp(min=0)[:, None]
    target_part = torch.zeros_like(gradient).scatter(1, index, gradient.gather(1, index))
    for mutant in (0 * gradient, target_part, gradient - target_part, 1.01 * gradient):
        errors = gradient_errors(mutant, gradient, targets)
        assert not all(within(error, 2e-3) for error in errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS if GPU else VOCABS[1:])
def test_the_same_bits_from_run_to_run(vocab, dtype) -> None:
    s = step(vocab, dtype)
    for fused, _ in FROM_LOGITS.values():
        assert all(map(torch.equal, from_logits(fused, s), from_logits(fused, s)))
    for fused, _ in FROM_HIDDEN.values():
        for trained in (False, True):
            runs = (from_hidden(fused, s, trained) for _ in range(2))
            assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", ["token_stats", "kl", "jsd"])
def test_a_row_has_the_same_bits_alone(name, vocab, dtype) -> None:
    s = step(vocab, dtype)
    logits, other = (x.detach() for x in s.logits())
    fused, _ = FROM_LOGITS[name]

    def gradient(sequence: slice, token: slice) -> Tensor:
        """Of a part of the batch, which is a batch itself."""
        cut = (sequence, token)
        part = s._replace(targets=s.targets[cut], g=s.g[cut], h=s.h[cut])
        leaf = logits[cut].clone().requires_grad_()
        return autograd.grad(fused(leaf, other[cut], part), leaf)[0]

    whole = gradient(slice(None), slice(None))
    for i, j in ((0, TOKENS // 4), (3, TOKENS - 1)):
        alone = gradient(slice(i, i + 1), slice(j, j + 1))
        assert alone.any() and torch.equal(alone[0, 0], whole[i, j])


# Memory: with the default size of chunks on a GPU; on a CPU with one that a small batch exceeds.

CHUNKS = {} if GPU else {"chunk_size": 64}
WORKSPACE_MIB = 512 if GPU else 64 * 2000 * 4 / 2**20


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["linear_token_stats", "linear_dpo_loss", "linear_policy_loss"])
def test_memory_beyond_the_gradients_is_the_workspace(name, trained) -> None:
    vocab, width = (128256, 1024) if GPU else (2000, 16)
    dtype = torch.bfloat16 if GPU else torch.float32
    peaks = {}
    for tokens in (2048, 8192) if GPU else (256, 1024):
        hidden = torch.randn(4, tokens // 4, width, device=DEVICE).to(dtype).requires_grad_()
        weight = (0.05 * torch.randn(vocab, width, device=DEVICE)).to(dtype)
        weight.requires_grad_(trained)
        targets = torch.randint(vocab, (4, tokens // 4), device=DEVICE)
        old, ones = torch.full(targets.shape, -12.0, device=DEVICE), torch.ones_like(ZEROS)
        mask = torch.ones_like(targets, dtype=torch.bool)

        def work(hidden=hidden, weight=weight, targets=targets, old=old, ones=ones, mask=mask):
            hidden.grad = weight.grad = None
            head = (hidden, weight, targets)
            if name == "linear_token_stats":
                loss = fastrlhf.linear_token_stats(*head, **CHUNKS).logprob.sum()
            elif name == "linear_dpo_loss":
                loss = fastrlhf.linear_dpo_loss(*head, ZEROS, *PAIRS, **CHUNKS)[0].mean()
            else:
                loss = fastrlhf.linear_policy_loss(*head, old, ones, mask, **CHUNKS)[0]
            loss.backward()

        work()
        hidden.grad = weight.grad = None
        peaks[tokens] = peak_memory(work, DEVICE)[1]
    few, many = peaks
    # A token more costs its gradient, what is kept for it and a copy in order: no logits.
    per_token = (peaks[many] - peaks[few]) / (many - few)
    assert per_token <= 4 * width * 4 + 256, per_token
    gradient = vocab * width * (4 + hidden.element_size()) if trained else 0
    beyond = (peaks[few] - gradient - few * per_token) / 2**20
    # On a GPU the logits of a chunk in fp32, and their gradient in the dtype of the matmuls; the
    # eager backend holds its chunk a few times while it works on it.
    assert beyond <= (1.6 if GPU else 6) * WORKSPACE_MIB, beyond


# What a GPU alone can show.

ROWS_PAST_2_31 = 2**31 // 262144 + 2


@NEEDS_GPU
@pytest.mark.parametrize("name", ["token_stats", "token_stats in place", "kl", "jsd"])
def test_offsets_past_2_to_the_31(name) -> None:
    vocab = 262144
    logits = torch.zeros(ROWS_PAST_2_31, vocab, dtype=torch.bfloat16, device=DEVICE)
    other = logits.clone()
    targets = torch.full((ROWS_PAST_2_31,), 7, device=DEVICE)
    for x, seed in ((logits, 1), (other, 2)):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        row = torch.randn(vocab, device=DEVICE, generator=generator).bfloat16()
        x[0] = x[-1] = row
    logits.requires_grad_()
    if "stats" in name:
        inplace = "place" in name
        view = logits.view_as(logits)
        values = fastrlhf.token_logprobs(view, targets, inplace_backward=inplace)
    else:
        direction = {"kl": "reverse"}.get(name, name)
        values = fastrlhf.kl_divergence(logits, other, direction=direction)
    assert values[0] == values[-1] != 0
    (gradient,) = autograd.grad(values.sum(), logits)
    assert torch.equal(gradient[0], gradient[-1]) and gradient[0].any()
    assert not torch.equal(gradient[0], gradient[1])


@NEEDS_GPU
def test_offsets_past_2_to_the_31_of_a_fisher_product() -> None:
    logits = torch.zeros(ROWS_PAST_2_31, 262144, dtype=torch.bfloat16, device=DEVICE)
    tangent = torch.zeros_like(logits)
    tangent[0] = tangent[-1] = torch.randn(262144, device=DEVICE).bfloat16()
    product, form = fastrlhf.softmax_fisher_product(logits, tangent)
    assert torch.equal(product[0], product[-1]) and product[0].any() and form[0] == form[-1] != 0
    assert not product[1].any()


GRAPHED = ["token_stats", "policy loss", "kl"]


def training_step(name: str) -> Callable[[], Tensor]:
    """Forward and backward on tensors that stay where they are."""
    s = step(VOCABS[0], torch.bfloat16)
    logits, other = (x.detach() for x in s.logits())
    logits.requires_grad_()
    fused, _ = FROM_LOGITS[name]
    return lambda: autograd.grad(fused(logits, other, s), logits)[0]


@NEEDS_GPU
@pytest.mark.parametrize("name", GRAPHED)
def test_nothing_waits_for_the_gpu(name) -> None:
    backward = training_step(name)
    backward()  # what is compiled and loaded once
    try:
        torch.cuda.set_sync_debug_mode("error")
        backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
@pytest.mark.parametrize("name", GRAPHED)
def test_a_cuda_graph_replays_forward_and_backward(name) -> None:
    backward = training_step(name)
    expected = backward()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = backward()
    gradient.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(gradient, expected)
