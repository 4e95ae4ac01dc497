"""Tokens without a gradient cost no matmul backward, and change none."""

import pytest
import torch
import torch.nn.functional as F
from support.matmuls import MatmulAudit
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import ChunkStats, linear_loss
from fastrlhf.ops.head_gradients import LogitGradient
from fastrlhf.ops.linear_plans import few_enough

TOKENS, WIDTH, VOCAB = 96, 6, 37
G = 2 * TOKENS * WIDTH * VOCAB
SHARES = {"all": 1.0, "most": 0.96, "some": 0.375, "few": 0.0625, "none": 0.0}


def inputs(trained: bool, dtype=torch.float64):
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=trained)
    bias = torch.randn(VOCAB, dtype=dtype, requires_grad=trained)
    return hidden, weight, bias, torch.randint(VOCAB, (TOKENS,))


def coefficients(share: float) -> Tensor:
    """Of as many tokens of each chunk, anywhere in it."""
    count = round(share * TOKENS)
    some = torch.zeros(TOKENS, dtype=torch.float64)
    some[torch.arange(count) * TOKENS // max(1, count)] = 1
    return some * torch.randn(TOKENS, dtype=torch.float64)


def plain(hidden, weight, bias, targets, coefficient, entropy_coef):
    log_p = F.linear(hidden, weight, bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (coefficient * (log_p[range(TOKENS), targets] + entropy_coef * entropy)).sum()


def of_chunk(stats: ChunkStats, coefficient: Tensor) -> Tensor:
    return (coefficient * (stats.logprob + 0.3 * stats.entropy)).sum()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", [16, 48, 1000])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_a_loss_of_ones_own(share, grouped, chunk, trained) -> None:
    hidden, weight, bias, targets = inputs(trained)
    coefficient = coefficients(SHARES[share])
    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
    # Four groups of 24: some are larger than a chunk of 16.
    groups = torch.arange(TOKENS) // 24 if grouped else None
    with MatmulAudit(VOCAB) as audit:
        loss, _ = linear_loss(
            of_chunk, hidden, weight, targets, coefficient, groups=groups, bias=bias, entropy=True,
            chunk_size=chunk,
        )  # fmt: skip
        found = autograd.grad(loss, wanted)
    multiplied = 1.0 if share in ("all", "most") else SHARES[share]
    again = multiplied if grouped and chunk == 16 else 0
    assert audit.operations == G * (1 + again + (2 if trained else 1) * multiplied)
    expected = autograd.grad(plain(hidden, weight, bias, targets, coefficient, 0.3), wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("share", SHARES)
def test_statistics_whose_loss_comes_later(share, chunk) -> None:
    hidden, weight, bias, targets = inputs(trained=True)
    coefficient = coefficients(SHARES[share])
    with MatmulAudit(VOCAB) as audit:
        stats = fastrlhf.linear_token_stats(
            hidden, weight, targets, bias=bias, entropy=True, chunk_size=chunk
        )
        loss = of_chunk(stats, coefficient)
        found = autograd.grad(loss, (hidden, weight, bias))
    multiplied = 1.0 if share in ("all", "most") else SHARES[share]
    assert audit.operations == G * (1 + 3 * multiplied)
    expected = autograd.grad(
        plain(hidden, weight, bias, targets, coefficient, 0.3), (hidden, weight, bias)
    )
    torch.testing.assert_close(found, expected)


def test_a_slope_of_any_statistic_counts() -> None:
    """Of the log-prob for some tokens, of the entropy or the lse for others."""
    hidden, weight, bias, targets = inputs(trained=True)
    place = torch.arange(TOKENS) % 8
    sides = [(place == i).double() for i in range(3)]

    def loss_fn(stats: ChunkStats, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
        return (c * stats.logprob + d * stats.entropy + e * stats.lse).sum()

    with MatmulAudit(VOCAB) as audit:
        loss, _ = linear_loss(
            loss_fn, hidden, weight, targets, *sides, bias=bias, entropy=True, chunk_size=48
        )
        found = autograd.grad(loss, (hidden, weight, bias))
    assert audit.operations == G * (1 + 2 * 3 / 8)
    logits = F.linear(hidden, weight, bias)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    of_all = sides[0] * log_p[range(TOKENS), targets], sides[1] * entropy
    exact = sum(x.sum() for x in of_all) + (sides[2] * logits.logsumexp(-1)).sum()
    torch.testing.assert_close(found, autograd.grad(exact, (hidden, weight, bias)))


def test_clipped_tokens_of_a_policy_loss() -> None:
    """With a reference to look at, tokens without an advantage are scored, and no more."""
    hidden, weight, bias, targets = inputs(trained=True)
    hidden, targets = hidden.view(4, 24, WIDTH), targets.view(4, 24)
    with torch.no_grad():
        now = fastrlhf.linear_token_logprobs(hidden, weight, targets, bias=bias)
    advantages = torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    # In the third sequence the first 12 tokens are clipped.
    old = now.clone()
    old[2, :12] -= 1
    with MatmulAudit(VOCAB) as audit:
        loss, metrics = fastrlhf.linear_policy_loss(
            hidden, weight, targets, old, advantages, torch.ones_like(old), ref_logprobs=now - 0.1,
            bias=bias,
        )  # fmt: skip
        found = autograd.grad(loss, (hidden, weight, bias))
    assert metrics["clip_ratio/high_mean"] == 12 / 96
    assert audit.operations == G * (1 + 2 * 36 / 96)
    logprobs = F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    loss, _ = fastrlhf.policy_loss(logprobs, old, advantages, torch.ones_like(old))
    expected = autograd.grad(loss, (hidden, weight, bias))
    torch.testing.assert_close(found, expected)
    assert not found[0][:2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_tokens_without_a_gradient_hold_does_not_matter(dtype) -> None:
    """Their logits may be infinite: 0 times them is never taken."""
    hidden, weight, _, targets = inputs(trained=True, dtype=dtype)
    coefficient = coefficients(0.375).to(dtype).float()
    with torch.no_grad():
        hidden[coefficient == 0] = torch.inf
    for loss in (
        linear_loss(lambda s, c: (c * s.logprob).nan_to_num().sum(), hidden, weight, targets,
                    coefficient)[0],
        (coefficient * fastrlhf.linear_token_logprobs(hidden, weight, targets)).nan_to_num().sum(),
    ):  # fmt: skip
        of_hidden, of_weight = autograd.grad(loss, (hidden, weight))
        assert not of_hidden[coefficient == 0].any()
        assert of_weight.isfinite().all()


@pytest.mark.parametrize("tokens", [5, 40])
def test_that_is_so_of_few_tokens_too(tokens) -> None:
    hidden, weight, _, targets = inputs(trained=True)
    hidden, targets = hidden[:tokens], targets[:tokens]
    with torch.no_grad():
        hidden[0] = torch.inf
    upstream = torch.ones(tokens, dtype=torch.float64)
    upstream[0] = 0.0
    logprobs = fastrlhf.linear_token_logprobs(hidden, weight, targets)
    (found,) = autograd.grad(logprobs, weight, upstream)
    of_others = fastrlhf.linear_token_logprobs(hidden[1:], weight, targets[1:])
    torch.testing.assert_close(found, autograd.grad(of_others.sum(), weight)[0])


def test_rows_move_to_the_front_in_parts() -> None:
    rows = torch.randn(100, 3)
    units = torch.rand(100, 1)
    for some in (torch.arange(99, 100), torch.arange(1, 100, 3), torch.arange(100)):
        values, unit = LogitGradient(rows.clone(), units).leading(some)
        assert torch.equal(values, rows[some])
        assert torch.equal(unit, units[some])


def test_few_rows_are_not_worth_it() -> None:
    wanted = torch.ones(1000, dtype=torch.bool)
    assert few_enough(wanted) is None
    wanted[:124] = False
    assert few_enough(wanted) is None
    wanted[124] = False
    assert torch.equal(few_enough(wanted), torch.arange(125, 1000))
    assert few_enough(torch.zeros(7, dtype=torch.bool)) is None
