"""Checks of operations from logits: statistics, policy losses, cross-entropy, divergences."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

import fastrlhf

from . import plain
from .accuracy import judge_values
from .cases import (
    Case,
    Function,
    Leaves,
    compare,
    evaluate,
    logits_case,
    normal,
    same_bits,
)
from .machine import Machine
from .sections import Reporter
from .tokens import Tokens

_TRITON: dict[str, Any] = {"impl": "triton"}
_KL_COEF, _ENTROPY_COEF, _SHARE = 0.1, 0.01, 0.3
_KL_WEIGHT, _Z_LOSS = 0.7, 1e-3
_TEACHER = [0.4, 0.2, 0.1, 0.05]  # a teacher's probabilities of its likeliest words


class Operation(NamedTuple):
    """An operation of this library, its plain formula, and its kind of inputs."""

    ours: Function
    plain: Function
    inplace: Function | None = None  # the operation whose backward overwrites the logits
    transformed: bool = False  # whether the logits get a temperature and a softcap
    pair: bool = False  # whether it compares the logits of two models
    shared_zeros: bool = True  # whether both give 0 to the same tokens


# Statistics.


def _token_logprobs(x: Leaves, s: Tokens, **options: Any) -> dict:
    return {"logprob": fastrlhf.token_logprobs(x["logits"], s.targets, **options, **_TRITON)}


def _plain_logprobs(x: Leaves, s: Tokens) -> dict:
    return {"logprob": plain.logprobs(plain.log_softmax(x["logits"]), s)}


def _token_stats(x: Leaves, s: Tokens, **options: Any) -> dict:
    stats = fastrlhf.token_stats(
        x["logits"], s.targets, entropy=True, temperature=s.temperature, softcap=plain.SOFTCAP,
        with_stats=("is_top1", "log_sum_sq_probs"), **options, **_TRITON,
    )  # fmt: skip
    return {
        "logprob": stats.logprob, "entropy": stats.entropy, "squares": stats.log_sum_sq_probs,
    }  # fmt: skip


def _plain_stats(x: Leaves, s: Tokens) -> dict:
    log_p = plain.log_softmax(x["logits"], s.temperature, plain.SOFTCAP)
    squares = (2 * log_p.detach()).logsumexp(-1)
    return {
        "logprob": plain.logprobs(log_p, s),
        "entropy": plain.entropy(log_p),
        "squares": squares,
    }


# Policy losses.


def _policy(x: Leaves, s: Tokens, **options: Any) -> dict:
    rest = (s.targets, s.old, s.advantages, s.live)
    return {"loss": fastrlhf.logits_policy_loss(x["logits"], *rest, **options, **_TRITON)[0]}


def _plain_policy(x: Leaves, s: Tokens) -> dict:
    logp = plain.logprobs(plain.log_softmax(x["logits"]), s)
    return {"loss": plain.mean(plain.clipped(logp, s), s)}


def _regularised(x: Leaves, s: Tokens, **options: Any) -> dict:
    return _policy(
        x, s, ref_logprobs=s.ref, kl_coef=_KL_COEF, entropy_coef=_ENTROPY_COEF,
        temperature=s.temperature, softcap=plain.SOFTCAP, **options,
    )  # fmt: skip


def _plain_regularised(x: Leaves, s: Tokens) -> dict:
    log_p = plain.log_softmax(x["logits"], s.temperature, plain.SOFTCAP)
    logp = plain.logprobs(log_p, s)
    losses = plain.clipped(logp, s) + _KL_COEF * plain.k3(logp, s)
    return {"loss": plain.mean(losses - _ENTROPY_COEF * plain.entropy(log_p), s)}


def _dppo(x: Leaves, s: Tokens, **options: Any) -> dict:
    return _policy(
        x, s, surrogate="dppo_tv", ref_logprobs=s.ref, kl_coef=_KL_COEF, kl_bias_correction=True,
        kl_weights=_KL_WEIGHT * s.live, **options,
    )  # fmt: skip


def _plain_dppo(x: Leaves, s: Tokens) -> dict:
    logp = plain.logprobs(plain.log_softmax(x["logits"]), s)
    losses, ratio = plain.divergence_clipped(logp, s)
    return {"loss": plain.mean(losses + _KL_COEF * _KL_WEIGHT * ratio * plain.k3(logp, s), s)}


# Cross-entropy.


def _cross_entropy(x: Leaves, s: Tokens, **options: Any) -> dict:
    loss = fastrlhf.cross_entropy(x["logits"], s.targets, z_loss=_Z_LOSS, **options, **_TRITON)
    return {"loss": loss}


def _plain_cross_entropy(x: Leaves, s: Tokens) -> dict:
    logp = plain.logprobs(plain.log_softmax(x["logits"]), s)
    z_loss = _Z_LOSS * plain.wide(x["logits"]).logsumexp(-1).square()
    return {"loss": plain.mean(z_loss - logp, s)}


# Divergences.


def _words(s: Tokens) -> torch.Tensor:
    """Return ids in place of a teacher's likeliest words: the target and ids some way after it."""
    steps = torch.arange(len(_TEACHER), device=s.targets.device)
    return s.picked + steps


def _topk(x: Leaves, s: Tokens, **options: Any) -> dict:
    words = _words(s)
    teacher = torch.tensor(_TEACHER, device=words.device).log().expand(words.shape)
    values = fastrlhf.topk_kl_divergence(
        x["logits"], teacher, words % x["logits"].shape[-1], direction="reverse", mask=s.live,
        **options, **_TRITON,
    )  # fmt: skip
    return {"divergence": values}


def _plain_topk(x: Leaves, s: Tokens) -> dict:
    log_p, words = plain.log_softmax(x["logits"]), _words(s) % x["logits"].shape[-1]
    rest = log_p.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)
    ours = torch.cat((log_p.gather(-1, words), rest), dim=-1)
    left = [*_TEACHER, 1 - sum(_TEACHER)]
    teacher = torch.tensor(left, dtype=torch.float64, device=words.device).log()
    return {"divergence": plain.kl(ours, teacher.to(ours.dtype).expand(ours.shape)) * s.live}


def _divergence(direction: str, transformed: bool = False) -> Operation:
    def ours(x: Leaves, s: Tokens) -> dict:
        options = {"temperature": s.temperature, "softcap": plain.SOFTCAP} if transformed else {}
        values = fastrlhf.kl_divergence(
            x["logits"], x["other_logits"], direction=direction, mask=s.live, beta=_SHARE,
            **options, **_TRITON,
        )  # fmt: skip
        return {"divergence": values}

    def formula(x: Leaves, s: Tokens) -> dict:
        options = (s.temperature, plain.SOFTCAP) if transformed else ()
        sides = (plain.log_softmax(x[name], *options) for name in ("logits", "other_logits"))
        return {"divergence": plain.divergence(*sides, direction, _SHARE)}

    # Plain PyTorch has no gradient of a mixture of two probabilities that are both 0.
    return Operation(ours, formula, None, transformed, pair=True, shared_zeros=direction != "jsd")


def _inplace(function: Any) -> Function:
    return lambda x, s: function(x, s, inplace_backward=True)


STATISTICS = {
    "token_logprobs": Operation(_token_logprobs, _plain_logprobs, _inplace(_token_logprobs)),
    "token_stats": Operation(_token_stats, _plain_stats, _inplace(_token_stats), True),
    "cross-entropy loss": Operation(_cross_entropy, _plain_cross_entropy, _inplace(_cross_entropy)),
}
POLICIES = {
    "logits_policy_loss": Operation(_policy, _plain_policy, _inplace(_policy)),
    "logits_policy_loss, KL and entropy": Operation(
        _regularised, _plain_regularised, _inplace(_regularised), True
    ),
    "logits_policy_loss, DPPO": Operation(_dppo, _plain_dppo, _inplace(_dppo)),
}
DIVERGENCES = {
    "kl_divergence reverse": _divergence("reverse"),
    "kl_divergence forward": _divergence("forward"),
    "kl_divergence jsd": _divergence("jsd"),
    "kl_divergence reverse, softcap": _divergence("reverse", transformed=True),
    "topk_kl_divergence": Operation(_topk, _plain_topk, _inplace(_topk)),
}


def make_case(machine: Machine, operation: Operation, vocab: int, dtype: torch.dtype) -> Case:
    """Make inputs for which the operation's values are finite.

    No token is certain under one model and impossible under the other, and the reference has
    probability 0 only where the policy has.
    """
    case = logits_case(
        machine, vocab, dtype, pair=operation.pair, transformed=operation.transformed
    )
    if operation.pair:
        logits, other = case.leaves["logits"], case.leaves["other_logits"]
        logits[-1, 1] = logits[0, 1]
        if operation.shared_zeros:
            other.masked_fill_(logits.isneginf(), -torch.inf)
    return case


def check(report: Reporter, machine: Machine, operations: dict[str, Operation], i: int) -> None:
    """Check values and gradients with the i-th vocabulary, also in place and for a loss times 2."""
    vocab = machine.sizes.vocabs[i]
    for dtype, (name, operation) in itertools.product(machine.sizes.dtypes[i], operations.items()):
        case = make_case(machine, operation, vocab, dtype)
        title = f"{name} V={vocab} {str(dtype).removeprefix('torch.')}"
        formulas, wanted = (operation.ours, operation.plain), tuple(case.leaves)
        gradients = compare(report, machine, title, formulas, case, wanted)
        if gradients and operation.inplace is not None:
            inplace = evaluate(operation.inplace, case, wanted)[1]["logits"]
            same_bits(report, f"{title}, in place", gradients["logits"], inplace)
        if "loss" in name:
            compare(report, machine, f"{title}, times 2", formulas, case, wanted, factor=2.0)


def check_rows(report: Reporter, machine: Machine) -> None:
    """Check that results do not depend on how rows are batched or where they lie in memory.

    A row alone must give the same bits as in a batch, and logits may start at any address.
    """
    vocab, dtype = machine.sizes.vocabs[1], machine.sizes.dtypes[1][0]
    operations = STATISTICS | DIVERGENCES
    for name in ("token_stats", "kl_divergence reverse", "kl_divergence jsd"):
        operation = operations[name]
        case, row = make_case(machine, operation, vocab, dtype), (slice(0, 1), slice(1, 2))
        wanted = tuple(case.leaves)
        values, gradients = evaluate(operation.ours, case, wanted)
        alone = evaluate(operation.ours, _part(case, row), wanted)
        for whole, part in zip((values, gradients), alone, strict=True):
            for key, found in part.items():
                same_bits(report, f"{name}, a row alone: {key}", found, whole[key][row])
        formulas = (_misplaced(operation.ours), operation.plain)
        compare(report, machine, f"{name} of an unaligned view", formulas, case, wanted)


def _part(case: Case, row: tuple[slice, slice]) -> Case:
    """Return a part of a batch."""
    leaves = {name: x[row] for name, x in case.leaves.items()}
    tokens = Tokens(*(x[row[0]] if x.ndim == 1 else x[row] for x in case.tokens))
    return Case(leaves, {}, tokens)


def _misplaced(function: Function) -> Function:
    """Wrap a function so that its leaves start at unaligned addresses, with gaps between rows."""

    def call(x: Leaves, s: Tokens) -> dict:
        # The padded rows have one more entry before and two after, which the slice leaves out.
        return function({k: torch.nn.functional.pad(v, (1, 2))[..., 1:-2] for k, v in x.items()}, s)

    return call


def check_hostile_values(report: Reporter, machine: Machine) -> None:
    """Check values that plain formulas do not give: near certainties and infinite divergences."""
    vocab = machine.sizes.vocabs[1]
    logits = normal(machine, 3, vocab, scale=3.0)
    logits[:, 7] = logits.logsumexp(-1) + torch.tensor([8.0, 12.0, 16.0], device=machine.device)
    targets = torch.full((3,), 7, device=machine.device)
    # The exact value is not taken from log_softmax, which cancels even in fp64.
    rest = logits.double().index_fill(1, targets[:1], -torch.inf).logsumexp(-1)
    exact = torch.nn.functional.logsigmoid(logits[:, 7].double() - rest)
    found = fastrlhf.token_logprobs(logits, targets, **_TRITON)
    ratio = found.double() / exact
    one = torch.ones_like(ratio)
    # The logarithm of the log-prob is up to 16 and is accurate to a few roundings. So the relative
    # error of the log-prob itself may be 16 times as large.
    verdict = judge_values(ratio, one, one, 16 * machine.slack(torch.float32))
    report.check("log-probs where p is nearly 1", verdict)
    other = logits.clone()
    other[1, 5] = -torch.inf
    found = fastrlhf.kl_divergence(logits, other, **_TRITON)
    only_the_second = [False, True, False]
    report.holds("KL: inf where q alone is 0", found.isposinf().tolist() == only_the_second)
    logits[1, 7] = -torch.inf
    found = fastrlhf.token_logprobs(logits, targets, **_TRITON)
    report.holds("log-prob: -inf where p is 0", found.isneginf().tolist() == only_the_second)
