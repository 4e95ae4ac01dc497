"""Cases of advantages, rewards, values and sums over sequences."""

import torch
from torch import Tensor

import fastrlhf

from . import formulas as f
from .draw import DTYPES, Draw
from .judge import Case
from .shared import finite_max, largest, subset, tokens


def value_loss(d: Draw) -> Case:
    shape, dtype = (d.size(3), d.size(4)), d.of(*DTYPES)
    mask = d.bits(*shape)
    values, old, returns = (d.hidden(d.normal(*shape).to(dtype), mask) for _ in range(3))
    clip, normalizer = d.of(None, 0.2, 0.0), d.of(None, 5.0)

    def call(x: dict[str, Tensor]) -> tuple:
        given = (x["values"], old, returns, mask)
        return (fastrlhf.value_loss(*given, clip_range=clip, normalizer=normalizer)[0],)

    def formula(x: dict[str, Tensor]) -> tuple:
        v, o, r = (f.where_kept(y.to(x["values"].dtype), mask) for y in (x["values"], old, returns))
        losses = (v - r) ** 2
        if clip is not None:
            f.keep_off(f.where_kept((v - o).abs() - clip, mask) + 1.0 * (mask == 0), 0.0)
            bounded = torch.maximum(torch.minimum(v, o + clip), o - clip)
            other = (bounded - r) ** 2
            moved = f.where_kept(bounded != v, mask) != 0
            f.keep_off(torch.where(moved, losses - other, 1.0), 0.0)
            losses = torch.maximum(losses, other)
        count = normalizer or (mask != 0).sum().clamp(min=1).to(v.dtype)
        return (f.where_kept(losses, mask).sum() / 2 / count,)

    return Case("value_loss", {"values": values}, call, formula, subset(d, "values"), 50.0)


def gae(d: Draw) -> Case:
    shape, dtype = (d.size(3), d.size(40)), d.of(*DTYPES)
    mask = d.bits(*shape)
    x = {name: d.hidden(d.normal(*shape).to(dtype), mask) for name in ("rewards", "values")}
    gamma, lam, impl = d.of(1.0, 0.9, 0, 1), d.of(0.95, 1, 0.0), d.of("eager", "triton")

    def call(x: dict[str, Tensor]) -> tuple:
        return fastrlhf.gae(*x.values(), mask, gamma=gamma, lam=lam, impl=impl)

    def formula(x: dict[str, Tensor]) -> tuple:
        return f.gae(*(f.where_kept(y, mask) for y in x.values()), mask, gamma, lam)

    return Case("gae", x, call, formula, (), 4.0 * (1 + shape[1]))


def group_advantages(d: Draw) -> Case:
    count, dtype = d.size(7), d.of(torch.float32, torch.float64)
    valid = d.bits(count)
    rewards = d.hidden(d.of(d.normal(count), (d.bits(count) != 0).double()).to(dtype), valid)
    groups, kind = d.integers(3, (count,)), d.of("grpo", "dr_grpo", "rloo", "reinforce++")

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.group_advantages(x["rewards"], groups, kind=kind, valid=valid),)

    def formula(x: dict[str, Tensor]) -> tuple:
        return (f.group_advantages(x["rewards"], groups, valid, kind),)

    clean = f.where_kept(rewards, valid)
    return Case(
        "group_advantages", {"rewards": rewards}, call, formula, (), 40 * largest(clean, None)
    )


def shaped_rewards(d: Draw) -> Case:
    shape, dtype = (d.size(3), d.size(4)), d.of(*DTYPES)
    mask, kind, coef = d.bits(*shape), d.of("k1", "k2", "k3", "abs"), d.of(0.0, 0.1)
    x = {"scores": d.normal(shape[0]).to(dtype)}
    x |= {
        name: d.hidden(d.logprobs(*shape, dtype=dtype, far=0), mask) for name in ("logprobs", "ref")
    }

    def call(x: dict[str, Tensor]) -> tuple:
        scores, lp, ref = x.values()
        return (fastrlhf.shaped_rewards(scores, lp, ref, mask, kl_coef=coef, kl_estimator=kind),)

    def formula(x: dict[str, Tensor]) -> tuple:
        lp, ref = (f.where_kept(x[name], mask) for name in ("logprobs", "ref"))
        rewards = f.where_kept(-coef * f.penalty(ref - lp, kind), mask).clone()
        for b in range(shape[0]):
            places = (mask[b] != 0).nonzero()[:, 0]
            if len(places):
                rewards[b, places[-1]] += x["scores"][b]
        return (rewards,)

    apart = float(finite_max((x["ref"].double() - x["logprobs"].double()), mask))
    size = (sum(largest(x[name], mask) for name in ("logprobs", "ref")) + 2) ** 2
    return Case(
        "shaped_rewards", x, call, formula, (), size * float(torch.tensor(max(apart, 0)).exp())
    )


def kl_penalty(d: Draw) -> Case:
    shape, dtype = tokens(d), d.of(*DTYPES)
    x = {name: d.logprobs(*shape, dtype=dtype) for name in ("logprobs", "ref_logprobs")}
    kind = d.of("k1", "k2", "k3", "abs")

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.kl_penalty(*x.values(), kind),)

    def formula(x: dict[str, Tensor]) -> tuple:
        gap = x["ref_logprobs"] - x["logprobs"]
        if kind == "abs":
            f.keep_off(gap, 0.0, margin=1e-30)
        return (f.penalty(gap, kind, most),)

    most = 700.0 if dtype == torch.float64 else 80.0
    size = sum(largest(y.reshape(-1), None) for y in x.values()) ** 2
    apart = x["ref_logprobs"].double() - x["logprobs"].double()
    size *= float(apart.max().clamp(0, most).exp()) if apart.numel() else 1.0
    return Case("kl_penalty", x, call, formula, subset(d, *x), size if kind != "k1" else 1000.0)


def reward_loss(d: Draw) -> Case:
    count, dtype = d.size(5), d.of(*DTYPES)
    x = {name: (d.normal(count) * d.of(1.0, 50.0)).to(dtype) for name in ("chosen", "rejected")}
    margin, coef = d.of(None, 0.5, 1), d.of(0.0, 0.01)

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.reward_loss(*x.values(), margin=margin, center_coef=coef)[0],)

    def formula(x: dict[str, Tensor]) -> tuple:
        w, l = x.values()
        return (f.ell(w - l - (margin or 0.0)) + coef * (w + l) ** 2,)

    size = sum(largest(y, None) for y in x.values())
    return Case("reward_loss", x, call, formula, subset(d, *x), size * (1 + coef * size))


def plackett_luce_loss(d: Draw) -> Case:
    count, dtype = d.size(7), d.of(*DTYPES)
    scores = (d.normal(count) * d.of(1.0, 100.0)).to(dtype)
    groups = d.integers(3, (count,))
    ranks = torch.randperm(count, generator=d.generator)

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.plackett_luce_loss(x["scores"], groups, ranks),)

    def formula(x: dict[str, Tensor]) -> tuple:
        return (f.plackett_luce(x["scores"], groups, ranks),)

    size = 8 * largest(scores, None)
    return Case(
        "plackett_luce_loss",
        {"scores": scores},
        call,
        formula,
        subset(d, "scores"),
        size,
        terms=1.0,
    )


def whiten(d: Draw) -> Case:
    shape, dtype = (d.size(3), d.size(5)), d.of(*DTYPES)
    mask, shift = d.bits(*shape), d.of(True, False)
    x = {"x": d.hidden((d.normal(*shape) + d.of(0.0, 10.0)).to(dtype), mask)}

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.whiten(x["x"], mask, shift_mean=shift),)

    def formula(x: dict[str, Tensor]) -> tuple:
        y = f.where_kept(x["x"], mask)
        n = (mask != 0).sum()
        mean = y.sum() / n.clamp(min=1)
        centred = f.where_kept(y - mean, mask)
        variance = (centred**2).sum() / (n - 1).clamp(min=1)
        if n > 1 and float(variance.detach()) < 1e-2:
            raise f.FragileError
        scaled = centred * (variance + 1e-8).rsqrt()
        return (scaled if shift else f.where_kept(scaled + mean, mask),)

    return Case("whiten", x, call, formula, subset(d, "x") if (mask != 0).sum() > 1 else (), 400.0)


def sequence_logprobs(d: Draw) -> Case:
    shape, dtype = (d.size(3), d.size(5)), d.of(*DTYPES)
    mask, average = d.bits(*shape), d.of(True, False)
    x = {"token_logprobs": d.hidden(d.logprobs(*shape, dtype=dtype), mask)}

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.sequence_logprobs(x["token_logprobs"], mask, average=average),)

    def formula(x: dict[str, Tensor]) -> tuple:
        sums = f.where_kept(x["token_logprobs"], mask).sum(-1)
        return (sums / (mask != 0).sum(-1).clamp(min=1) if average else sums,)

    size = largest(x["token_logprobs"], mask)
    return Case("sequence_logprobs", x, call, formula, subset(d, *x), size)


def shift_targets(d: Draw) -> Case:
    shape, ignore = (d.size(3), d.size(5)), d.of(-100, -1)
    ids, mask = d.integers(9, shape), d.bits(*shape)

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.shift_targets(ids, mask, ignore_index=ignore),)

    def formula(x: dict[str, Tensor]) -> tuple:
        found = torch.full(shape, ignore)
        for b in range(shape[0]):
            for t in range(shape[1] - 1):
                found[b, t] = int(ids[b, t + 1]) if mask[b, t + 1] != 0 else ignore
        return (found,)

    return Case("shift_targets", {}, call, formula, (), exact=True)


def conjugate_gradient(d: Draw) -> Case:
    size, dtype = d.size(6), d.of(torch.float32, torch.float64)
    root = d.normal(size, size)
    matrix = (root @ root.T / max(size, 1) + torch.eye(size, dtype=torch.float64)).to(dtype)
    of_matrix, of_target = d.of(1.0, 1e-15, 1e15), d.of(1.0, 1e-15, 1e15, 0.0)
    matrix, target = matrix * of_matrix, (d.normal(size) * of_target).to(dtype)

    def call(x: dict[str, Tensor]) -> tuple:
        found, _ = fastrlhf.conjugate_gradient(
            lambda v: matrix @ v, x["target"], iterations=d.of(20, 100), tolerance=0.0
        )
        return (found * of_matrix,)

    def formula(x: dict[str, Tensor]) -> tuple:
        return (torch.linalg.solve((matrix / of_matrix).to(x["target"].dtype), x["target"]),)

    return Case(
        "conjugate_gradient", {"target": target}, call, formula, (), 50 * largest(target, None)
    )
