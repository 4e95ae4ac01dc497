"""Losses over kept ids from hidden states, against those of the logits of all ids."""

import pytest
import torch
import torch.nn.functional as F
from support.kept import ids_of
from support.kept_head_problems import BACKENDS, NAMES, SEQUENCES, SHAPE, TOKENS, VOCAB, Problem
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import ChunkStats, linear_loss, linear_token_stats
from fastrlhf.hf.logit_map import LogitMap
from fastrlhf.hf.own_module import ModuleScorer


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
