"""Checks of operations from hidden states, with a frozen and with a trained head."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrlhf

from . import plain
from .accuracy import judge
from .cases import (
    Case,
    Function,
    Leaves,
    compare,
    compare_gradients,
    evaluate,
    hidden_case,
    normal,
)
from .machine import Machine
from .sections import Reporter
from .tokens import Tokens

_TEMPERATURE = 0.8
_SMOOTHING, _Z_LOSS = 0.1, 1e-3
_HALVES = (torch.bfloat16, torch.float16)
_SMALL = (1.0, 1 / 8192, 1e-6)  # upstream gradients, as of a loss scale or a long batch


class Operation(NamedTuple):
    """An operation of this library and its plain formula."""

    ours: Function
    plain: Function


def _options(x: Leaves) -> dict[str, Any]:
    """Return options for four chunks, so that sums over chunks are checked."""
    b, t, _ = x["hidden"].shape
    return {"chunk_size": max(2, b * t // 4), "impl": "triton"}


def _head(x: Leaves) -> tuple[Tensor, Tensor]:
    return x["hidden"], x["weight"]


def _log_p(x: Leaves, prefix: str = "") -> Tensor:
    return plain.log_softmax(x[prefix + "hidden"] @ x[prefix + "weight"].T)


def _stats(x: Leaves, s: Tokens) -> dict:
    stats = fastrlhf.linear_token_stats(
        *_head(x), s.targets, entropy=True, temperature=_TEMPERATURE, softcap=plain.SOFTCAP,
        with_stats=("is_top1", "mean_logit", "log_sum_sq_probs"), **_options(x),
    )  # fmt: skip
    return {
        "logprob": stats.logprob, "entropy": stats.entropy, "mean": stats.mean_logit,
        "squares": stats.log_sum_sq_probs,
    }  # fmt: skip


def _plain_stats(x: Leaves, s: Tokens) -> dict:
    logits = x["hidden"] @ x["weight"].T
    log_p = plain.log_softmax(logits, _TEMPERATURE, plain.SOFTCAP)
    capped = plain.SOFTCAP * torch.tanh(logits.detach() / plain.SOFTCAP)
    return {
        "logprob": plain.logprobs(log_p, s),
        "entropy": plain.entropy(log_p) * s.live,
        "mean": capped.mean(-1) / _TEMPERATURE * s.live,
        "squares": (2 * log_p.detach()).logsumexp(-1) * s.live,
    }


def _logprobs(x: Leaves, s: Tokens) -> dict:
    return {"logprob": fastrlhf.linear_token_logprobs(*_head(x), s.targets, **_options(x))}


def _plain_logprobs(x: Leaves, s: Tokens) -> dict:
    return {"logprob": plain.logprobs(_log_p(x), s)}


def _few_ids(s: Tokens, vocab: int) -> Tensor:
    """Return three ids for each token, (B, T, 3): the target and two others."""
    target = s.picked[..., 0]
    return torch.stack((target, (target + 1) % vocab, (target + vocab // 2) % vocab), dim=-1)


def _over_kept_ids(x: Leaves, s: Tokens) -> dict:
    ids = _few_ids(s, len(x["weight"]))[s.live].flatten()
    lengths = torch.where(s.live, 3, 0).flatten()
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    stats = fastrlhf.linear_token_stats(
        *_head(x), s.targets, entropy=True, support=(ids, offsets), impl="triton"
    )
    return {"logprob": stats.logprob, "entropy": stats.entropy}


def _plain_over_kept_ids(x: Leaves, s: Tokens) -> dict:
    logits = x["hidden"] @ x["weight"].T
    log_p = plain.log_softmax(logits.gather(-1, _few_ids(s, len(x["weight"]))))
    return {"logprob": log_p[..., 0] * s.live, "entropy": plain.entropy(log_p) * s.live}


def _pairs(s: Tokens) -> Tensor:
    """Pair the tokens with a target as neighbours, and return the number of each first token."""
    live = s.live.flatten().nonzero()[:, 0]
    rows = torch.zeros_like(s.targets).flatten()
    rows[live] = live[torch.arange(len(live), device=live.device) // 2 * 2]
    return rows.view(s.targets.shape)


def _shared(x: Leaves, s: Tokens) -> dict:
    hidden, weight = _head(x)
    stats = fastrlhf.linear_token_stats(
        hidden.flatten(0, 1), weight, s.targets, rows=_pairs(s), entropy=True, **_options(x)
    )
    return {"logprob": stats.logprob, "entropy": stats.entropy}


def _plain_shared(x: Leaves, s: Tokens) -> dict:
    log_p = plain.log_softmax(x["hidden"].flatten(0, 1)[_pairs(s)] @ x["weight"].T)
    return {"logprob": plain.logprobs(log_p, s), "entropy": plain.entropy(log_p) * s.live}


def _loss(x: Leaves, s: Tokens) -> dict:
    count = s.live.sum()

    def weighted(stats: fastrlhf.ChunkStats, g: Tensor) -> Tensor:
        return (stats.logprob * g).sum() / count

    return {"loss": fastrlhf.linear_loss(weighted, *_head(x), s.targets, s.g, **_options(x))[0]}


def _plain_loss(x: Leaves, s: Tokens) -> dict:
    return {"loss": plain.mean(plain.logprobs(_log_p(x), s) * s.g, s)}


def _cross_entropy(x: Leaves, s: Tokens) -> dict:
    loss = fastrlhf.linear_cross_entropy(
        *_head(x), s.targets, label_smoothing=_SMOOTHING, z_loss=_Z_LOSS, **_options(x)
    )
    return {"loss": loss}


def _plain_cross_entropy(x: Leaves, s: Tokens) -> dict:
    logits = x["hidden"] @ x["weight"].T
    lse = logits.logsumexp(-1)
    losses = (_SMOOTHING - 1) * plain.logprobs(plain.log_softmax(logits), s)
    losses = losses + _SMOOTHING * (lse - logits.mean(-1)) + _Z_LOSS * lse.square()
    return {"loss": plain.mean(losses, s)}


def _dpo(x: Leaves, s: Tokens) -> dict:
    sequences = torch.arange(s.targets.shape[0], device=s.targets.device)
    losses, _ = fastrlhf.linear_dpo_loss(
        *_head(x), s.targets, s.advantages * 0, *sequences.chunk(2), plain.BETA, **_options(x)
    )
    return {"loss": losses.mean()}


def _plain_dpo(x: Leaves, s: Tokens) -> dict:
    return {"loss": plain.dpo(plain.logprobs(_log_p(x), s), s)}


def _policy(x: Leaves, s: Tokens) -> dict:
    rest = (s.targets, s.old, s.advantages, s.live)
    return {"loss": fastrlhf.linear_policy_loss(*_head(x), *rest, **_options(x))[0]}


def _plain_policy(x: Leaves, s: Tokens) -> dict:
    return {"loss": plain.mean(plain.clipped(plain.logprobs(_log_p(x), s), s), s)}


def _divergence(direction: str) -> Operation:
    def ours(x: Leaves, s: Tokens) -> dict:
        values = fastrlhf.linear_kl_divergence(
            *_head(x), x["other_hidden"], x["other_weight"], mask=s.live, direction=direction,
            beta=0.3, **_options(x),
        )  # fmt: skip
        return {"divergence": values}

    def formula(x: Leaves, s: Tokens) -> dict:
        values = plain.divergence(_log_p(x), _log_p(x, "other_"), direction, 0.3)
        return {"divergence": values * s.live}

    return Operation(ours, formula)


OPERATIONS = {
    "linear_token_logprobs": Operation(_logprobs, _plain_logprobs),
    "linear_token_stats": Operation(_stats, _plain_stats),
    "linear_token_stats over kept ids": Operation(_over_kept_ids, _plain_over_kept_ids),
    "linear_token_stats of shared rows": Operation(_shared, _plain_shared),
    "linear_loss": Operation(_loss, _plain_loss),
    "linear_cross_entropy": Operation(_cross_entropy, _plain_cross_entropy),
    "linear_dpo_loss": Operation(_dpo, _plain_dpo),
    "linear_policy_loss": Operation(_policy, _plain_policy),
    "linear_kl_divergence reverse": _divergence("reverse"),
    "linear_kl_divergence jsd": _divergence("jsd"),
}


def check(report: Reporter, machine: Machine, dtype: torch.dtype) -> None:
    """Check values and gradients of every operation in a dtype."""
    for vocab, dtypes in zip(machine.sizes.vocabs, machine.sizes.linear_dtypes, strict=True):
        if dtype not in dtypes:
            continue
        case = hidden_case(machine, vocab, dtype)
        for (name, operation), trained in itertools.product(OPERATIONS.items(), (False, True)):
            wanted = ("hidden", "weight")[: 1 + trained]
            title = f"{name} V={vocab} {str(dtype).removeprefix('torch.')}"
            title += ", trained head" if trained else ", frozen head"
            compare(report, machine, title, operation, case, wanted)


def check_small_gradients(report: Reporter, machine: Machine) -> None:
    """Check that small fp16 gradients are as accurate as fp16 can represent them.

    Plain PyTorch loses them to underflow, so the exact gradients rounded to fp16 are used in place
    of its own.
    """
    case = hidden_case(machine, machine.sizes.vocabs[0], torch.float16)
    # With this scale, the gradient of the hidden states is not too small for fp16.
    case.leaves["weight"].mul_(4.0)
    case.leaves["hidden"].div_(4.0)
    for name in ("linear_loss", "linear_token_logprobs"):
        operation = OPERATIONS[name]
        for size in _SMALL:
            # linear_loss is a mean here. Its division is undone, so that the gradient of each token
            # is of the order of `size`.
            factor = size * float(case.tokens.live.sum()) if name == "linear_loss" else size
            wanted = ("hidden", "weight")
            _, exact = _scaled(operation.plain, case.double(), factor)
            ours = report.demand(
                f"{name} fp16",
                lambda ours=operation.ours, factor=factor: _scaled(ours, case, factor),
            )
            if ours is None:
                continue
            _, found = ours
            for leaf in wanted:
                three = (found[leaf], exact[leaf].half(), exact[leaf])
                title = f"{name} fp16, gradients of {size:.0e}: {leaf}"
                slack = machine.slack(torch.float16)
                compare_gradients(report, title, leaf, three, case.tokens.targets, slack)


def _scaled(function: Function, case: Case, factor: float) -> tuple[dict, dict]:
    """Evaluate a function with its value (a loss, or one value for each token) times `factor`."""

    def total(x: Leaves, s: Tokens) -> dict:
        ((name, value),) = function(x, s).items()
        return {"loss": value if name == "loss" else (value * s.g).sum()}

    return evaluate(total, case, ("hidden", "weight"), factor)


def check_products(report: Reporter, machine: Machine) -> None:
    """Check the matmul that every linear operation consists of: fp32 += 16 bits × 16 bits.

    It computes logits (m, n) from hidden states (m, k), and from logits the gradient of the weight.
    The rows lie anywhere, or start at multiples of 64 numbers as in this library.
    """
    for (m, k, n), dtype in itertools.product(machine.sizes.products, _HALVES):
        for padding in dict.fromkeys((0, 3, -n % 64)):
            hidden, weight = (normal(machine, *size).to(dtype) for size in ((m, k), (n, k)))
            logits = normal(machine, m, n + padding)[:, :n]
            d_logits = normal(machine, m, n + padding).to(dtype)[:, :n]
            total = normal(machine, n, k)
            title = f"addmm fp32 += {dtype} ({m}, {k}, {n})".replace("torch.", "")
            title += f", rows padded by {padding}"
            _check_product(report, machine, title, logits, hidden, weight.T)
            _check_product(report, machine, f"{title}, of a weight", total, d_logits.T, hidden)


def _check_product(
    report: Reporter, machine: Machine, title: str, out: Tensor, a: Tensor, b: Tensor
) -> None:
    exact = out.double() + a.double() @ b.double()
    usual = out + a.float() @ b.float()

    def multiply() -> None:
        machine.add_product(out, a, b)
        report.check(title, judge(out, usual, exact, machine.slack(torch.float32)))

    report.demand(title, multiply)
