"""Cases of statistics of tokens, from logits and from hidden states."""

from typing import Any

import torch
from torch import Tensor

import fastrlhf

from . import formulas as f
from .draw import DTYPES, Draw
from .judge import Case
from .shared import (
    head,
    head_reach,
    head_terms,
    reach,
    steepness,
    subset,
    targets_of,
    tokens,
    vocabulary,
)


def further(d: Draw) -> dict[str, Any]:
    """What else is asked for, and whether the entropy has a gradient."""
    names = tuple(name for name in f.FURTHER if d.chance(0.4))
    return {"with_stats": names, "entropy_grad": d.chance(0.7)}


def asked(found: fastrlhf.TokenStats) -> tuple:
    """All but the lse, a truth value as a number."""
    top1 = None if found.is_top1 is None else found.is_top1.to(found.logprob.dtype)
    return found.logprob, found.entropy, top1, found.mean_logit, found.log_sum_sq_probs


def token_stats(d: Draw) -> Case:
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    ignore = d.of(-100, 0, -1)
    targets, _ = targets_of(d, shape, vocab, ignore)
    live = targets != ignore
    logits = d.hidden(d.logits(*shape, vocab, dtype=dtype), live)
    logits = d.laid_out(logits, repeated=False)
    o = {**d.transform(*shape), "ignore_index": ignore}
    entropy, inplace, impl = d.of(True, False), d.chance(0.2), d.of("eager", "triton")
    more = further(d)

    def call(x: dict[str, Tensor]) -> tuple:
        logits = x["logits"] * 1 if inplace else x["logits"]
        options = {**o, "inplace_backward": inplace, "impl": impl}
        if entropy or more["with_stats"]:
            return asked(fastrlhf.token_stats(logits, targets, **options, entropy=entropy, **more))
        return fastrlhf.token_logprobs(logits, targets, **options), None, None, None, None

    def formula(x: dict[str, Tensor]) -> tuple:
        logprob, h = f.token_stats(x["logits"], targets, o)
        h = h if more["entropy_grad"] else h.detach()
        others = f.further_stats(x["logits"], targets, o, more["with_stats"], ties=True)
        return logprob, h if entropy else None, *others

    size = reach(f.where_kept(logits, live), o)
    return Case("token_stats", {"logits": logits}, call, formula, subset(d, "logits"), size,
                terms=steepness(o), twice=not inplace and d.chance(0.2))  # fmt: skip


def linear_token_stats(d: Draw) -> Case:
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    targets, live = targets_of(d, shape, vocab, -100)
    live = targets != -100
    x = head(d, shape, vocab, live, dtype)
    o, entropy = d.transform(*shape), d.of(True, False)
    options = {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton")}
    more = further(d)

    def call(x: dict[str, Tensor]) -> tuple:
        given = (x["hidden"], x["weight"], targets)
        options_ = {**o, **options, "bias": x.get("bias")}
        if entropy or more["with_stats"]:
            return asked(fastrlhf.linear_token_stats(*given, **options_, entropy=entropy, **more))
        return fastrlhf.linear_token_logprobs(*given, **options_), None, None, None, None

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.head_logits(x["hidden"], x["weight"], x.get("bias"), live)
        logprob, h = f.token_stats(logits, targets, o)
        h = h if more["entropy_grad"] else h.detach()
        others = f.further_stats(logits, targets, o, more["with_stats"], ties=False)
        return logprob, h if entropy else None, *others

    return Case("linear_token_stats", x, call, formula, subset(d, *x), head_reach(x, live, o),
                grad_size=4.0, terms=head_terms(x, live, o), twice=d.chance(0.2))  # fmt: skip


def support(d: Draw, targets: Tensor, live: Tensor, vocab: int) -> tuple[Any, Tensor]:
    """Kept ids in some order, and where they are (..., V); rubbish for ignored tokens."""
    kept = d.bits(*targets.shape, vocab) != 0
    index = torch.where(live, targets, 0).long()[..., None]
    kept = kept.scatter(-1, index, torch.ones_like(index, dtype=torch.bool))
    rows = [row.nonzero()[:, 0] for row in kept.reshape(-1, vocab)]
    backwards, rubbish = d.chance(0.5), d.of([], [-7, 10**9, -7])
    rows = [
        (row.flip(0) if backwards else row) if counts else torch.tensor(rubbish, dtype=torch.int64)
        for row, counts in zip(rows, live.reshape(-1).tolist(), strict=True)
    ]
    ids = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    dtype = d.of(torch.int64, torch.int32)
    return (ids.to(dtype), offsets.to(dtype)), kept


def kept_token_stats(d: Draw) -> Case:
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    targets, _ = targets_of(d, shape, vocab, -100)
    live = targets != -100
    ids, kept = support(d, targets, live, vocab)
    logits = d.laid_out(d.hidden(d.logits(*shape, vocab, dtype=dtype), live), repeated=False)
    o, options = d.transform(*shape), {"support": ids, "impl": d.of("eager", "triton")}

    def call(x: dict[str, Tensor]) -> tuple:
        return fastrlhf.token_stats(x["logits"], targets, entropy=True, **o, **options)[:2]

    def formula(x: dict[str, Tensor]) -> tuple:
        return f.kept_stats(x["logits"], targets, o, kept)

    size = reach(f.where_kept(logits, live), o)
    return Case("kept_token_stats", {"logits": logits}, call, formula, subset(d, "logits"), size,
                terms=steepness(o), twice=d.chance(0.2))  # fmt: skip


def fewer_rows(d: Draw) -> Case:
    """Tokens that share hidden states, over kept ids or all; statistics, or a loss of groups, in
    which some tokens have no gradient.
    """
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    targets, _ = targets_of(d, shape, vocab, -100)
    live = targets != -100
    states = d.size(6, least=1)
    rows = d.integers(states, shape)
    used = torch.zeros(states, dtype=torch.bool)
    used[rows[live].long()] = True
    x = head(d, (states,), vocab, used, dtype)
    ids, kept = support(d, targets, live, vocab) if d.chance(0.5) else (None, None)
    o, side = d.transform(*shape), d.normal(*shape) * d.of(1.0, d.bits(*shape).double())
    options = {"rows": torch.where(live, rows, 10**6), "support": ids, "entropy": True,
               "chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton")}  # fmt: skip
    groups = d.integers(3, shape) if d.chance(0.5) else None
    of_loss = d.chance(0.5)

    def loss_fn(stats: Any, side: Tensor) -> Tensor:
        return (side.to(stats.logprob.dtype) * (stats.logprob - stats.entropy)).sum()

    def call(x: dict[str, Tensor]) -> tuple:
        given = (x["hidden"], x["weight"], targets)
        more = {**o, **options, "bias": x.get("bias")}
        if of_loss:
            return (fastrlhf.linear_loss(loss_fn, *given, side, groups=groups, **more)[0],)
        stats = fastrlhf.linear_token_stats(*given, **more)
        here = side.to(stats.logprob.dtype)
        return (f.where_kept(here * (stats.logprob - stats.entropy), live).sum(),)

    def formula(x: dict[str, Tensor]) -> tuple:
        hidden = f.where_kept(x["hidden"], used)[torch.where(live, rows, 0).long()]
        logits = f.head_logits(hidden, x["weight"], x.get("bias"), live)
        if kept is None:
            logprob, h = f.token_stats(logits, targets, o)
        else:
            logprob, h = f.kept_stats(logits, targets, o, kept)
        return (f.where_kept(side.to(h.dtype) * (logprob - h), live).sum(),)

    size = (
        head_reach(x, used, o)
        * max(1, targets.numel())
        * (1 + float(side.abs().max() if side.numel() else 0))
    )
    return Case("fewer_rows", x, call, formula, subset(d, *x), size,
                terms=5 * (1 + targets.numel()) * head_terms(x, used, o))  # fmt: skip


def linear_loss(d: Draw) -> Case:
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    targets, _ = targets_of(d, shape, vocab, -100)
    live = targets != -100
    x = head(d, shape, vocab, live, dtype)
    o, side = d.transform(*shape), d.laid_out(d.normal(*shape))
    groups = d.integers(3, shape) if d.chance(0.5) else None
    options = {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton"), "groups": groups}

    def loss_fn(stats: Any, side: Tensor) -> Tensor:
        return (stats.logprob * side.to(stats.logprob.dtype) - stats.entropy).sum()

    def call(x: dict[str, Tensor]) -> tuple:
        return (
            fastrlhf.linear_loss(
                loss_fn, x["hidden"], x["weight"], targets, side, bias=x.get("bias"), entropy=True,
                **o, **options,
            )[0],
        )  # fmt: skip

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.head_logits(x["hidden"], x["weight"], x.get("bias"), live)
        logprob, h = f.token_stats(logits, targets, o)
        zero = torch.zeros((), dtype=h.dtype)
        return (torch.where(live, logprob * side.to(h.dtype) - h, zero).sum(),)

    size = head_reach(x, live, o) * max(1, targets.numel())
    return Case("linear_loss", x, call, formula, subset(d, *x), size,
                terms=5 * head_terms(x, live, o))  # fmt: skip


def linear_cross_entropy(d: Draw) -> Case:
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    targets, _ = targets_of(d, shape, vocab, -100)
    live = targets != -100
    x = head(d, shape, vocab, live, dtype)
    o, reduction = d.transform(*shape), d.of("mean", "sum", "none")
    smoothing, z_loss = d.of(0.0, 0.0, 0.1, 1.0), d.of(0.0, 0.0, 0.01)
    options = {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton")}

    def call(x: dict[str, Tensor]) -> tuple:
        return (
            fastrlhf.linear_cross_entropy(
                x["hidden"], x["weight"], targets, bias=x.get("bias"), reduction=reduction,
                label_smoothing=smoothing, z_loss=z_loss, **o, **options,
            ),
        )  # fmt: skip

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.head_logits(x["hidden"], x["weight"], x.get("bias"), live)
        z = f.effective(logits, o)
        if (smoothing or z_loss) and not f.where_kept(z.detach(), live).isfinite().all():
            raise f.FragileError  # infinite, as it should be, with any gradient
        losses = -(1 - smoothing) * f.token_stats(logits, targets, o)[0]
        lse = z.logsumexp(-1) if smoothing or z_loss else torch.zeros_like(losses)
        losses = losses + smoothing * (lse - z.mean(-1) if smoothing else 0) + z_loss * lse**2
        losses = f.where_kept(losses, live)
        if reduction == "none":
            return (losses,)
        return (losses.sum() / (max(1, int(live.sum())) if reduction == "mean" else 1),)

    size = head_reach(x, live, o)
    size = (size + z_loss * (size + 5) ** 2) * max(1, targets.numel())
    return Case("linear_cross_entropy", x, call, formula, subset(d, *x), size,
                terms=5 * (1 + 2 * z_loss * size) * head_terms(x, live, o))  # fmt: skip
