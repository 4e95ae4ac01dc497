"""A case of each public function: hostile arguments, the call, and the formula of `formulas.py`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrlhf
from support.policy_formulas import ESTIMATORS, FORMS

from . import formulas as f
from .draw import DTYPES, Draw
from .judge import Case

Maker = Callable[[Draw], Case]


def vocabulary(d: Draw) -> int:
    return d.of(1, 2, 3, 7, 8, 16, 17, 33, 64)


def subset(d: Draw, *names: str) -> tuple[str, ...]:
    """Leaves whose gradient is wanted; none in some cases."""
    return tuple(name for name in names if d.chance(0.8)) if d.chance(0.85) else ()


def reach(x: Tensor, o: dict[str, Any]) -> float:
    """The size of the largest effective logit, which rounding is relative to."""
    z = x.double()
    z = z[z.isfinite()]
    if not z.numel():
        return 1.0
    size = float(z.abs().max()) * float(o.get("scale", 1.0))
    if o.get("softcap") is not None:
        size = min(size, o["softcap"])
    return size / coldest(o)


def steepness(o: dict[str, Any], weight: Tensor | None = None) -> float:
    """The size of d log p / d input: terms of a gradient are as large, even if their sum is not."""
    largest = 1.0 if weight is None or not weight.numel() else float(weight.double().abs().max())
    return largest * float(o.get("scale", 1.0)) / coldest(o)


def coldest(o: dict[str, Any]) -> float:
    t = o.get("temperature", 1.0)
    if isinstance(t, Tensor):
        return float(t.min()) if t.numel() else 1.0
    return float(t)


def tokens(d: Draw) -> tuple[int, ...]:
    return d.of((d.size(5),), (d.size(3), d.size(4)), (d.size(3), d.size(4)))


def targets_of(d: Draw, shape: tuple[int, ...], vocab: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Targets of which some are ignored, and which are not."""
    live = d.bits(*shape) != 0
    targets = torch.where(live, d.integers(vocab, shape).long(), ignore)
    return d.laid_out(targets.to(d.of(torch.int64, torch.int32))), live


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


def head(
    d: Draw, shape: tuple[int, ...], vocab: int, live: Tensor, dtype: torch.dtype, prefix: str = ""
) -> dict[str, Tensor]:
    width = d.of(1, 3, 8)
    hidden = d.hidden(d.normal(*shape, width) * d.of(1e-3, 1.0, 3.0), live).to(dtype)
    weight = d.laid_out((d.normal(vocab, width) * d.of(0.1, 1.0, 3.0)).to(dtype))
    found = {f"{prefix}hidden": d.laid_out(hidden, repeated=False), f"{prefix}weight": weight}
    if d.chance(0.3):
        found[f"{prefix}bias"] = d.normal(vocab).to(dtype)
    return found


def head_reach(x: dict[str, Tensor], live: Tensor, o: dict[str, Any], prefix: str = "") -> float:
    h, w = f.where_kept(x[f"{prefix}hidden"].double(), live), x[f"{prefix}weight"].double()
    terms = h.abs() @ w.abs().T
    return reach(terms + (x[f"{prefix}bias"].double().abs() if f"{prefix}bias" in x else 0), o) + 1


def head_terms(x: dict[str, Tensor], live: Tensor, o: dict[str, Any], prefix: str = "") -> float:
    """The size of what the gradients of hidden states, weight and bias add up."""
    hidden = f.where_kept(x[f"{prefix}hidden"].double(), live).abs()
    rows = float(hidden.reshape(-1, hidden.shape[-1]).sum(0).max()) if hidden.numel() else 0.0
    return steepness(o, x[f"{prefix}weight"]) + (rows + live.numel()) * steepness(o)


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


def divergence_options(d: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        **d.transform(*shape),
        "direction": d.of("reverse", "forward", "jsd"),
        "beta": d.of(0.5, 0.1, 0.9, 0, 1),
    }


def no_infinities(values: Tensor, wants: tuple[str, ...]) -> Tensor:
    """An infinite divergence has no gradient to speak of."""
    if wants and values.detach().isinf().any():
        raise f.FragileError
    return values


def kl_divergence(d: Draw) -> Case:
    shape, vocab = tokens(d), vocabulary(d)
    mask = d.bits(*shape)
    p = d.logits(*shape, vocab, dtype=d.of(*DTYPES))
    q = d.logits(*shape, vocab, dtype=d.of(p.dtype, p.dtype, *DTYPES))
    if d.chance(0.3):
        q = (p.double() + 1e-3 * d.normal(*p.shape)).to(q.dtype)
    x = {"logits": d.hidden(p, mask), "ref_logits": d.hidden(q, mask)}
    o, impl = divergence_options(d, shape), d.of("eager", "triton")
    given = None if (mask != 0).all() and d.chance(0.5) else mask

    def call(x: dict[str, Tensor]) -> tuple:
        return (fastrlhf.kl_divergence(x["logits"], x["ref_logits"], mask=given, impl=impl, **o),)

    def formula(x: dict[str, Tensor]) -> tuple:
        return (no_infinities(f.divergence(x["logits"], x["ref_logits"], mask, o), wants),)

    wants = subset(d, *x)
    size = 1 + sum(reach(f.where_kept(y, mask), o) for y in x.values())
    return Case("kl_divergence", x, call, formula, wants, size, terms=steepness(o))


def linear_kl_divergence(d: Draw) -> Case:
    shape, vocab, dtype = tokens(d), vocabulary(d), d.of(*DTYPES)
    mask = d.bits(*shape)
    x = head(d, shape, vocab, mask, dtype) | head(d, shape, vocab, mask, dtype, "ref_")
    o = divergence_options(d, shape)
    options = {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton")}

    def call(x: dict[str, Tensor]) -> tuple:
        sides = (x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"])
        bias = {name: x.get(name) for name in ("bias", "ref_bias")}
        return (fastrlhf.linear_kl_divergence(*sides, mask=mask, **bias, **o, **options),)

    def formula(x: dict[str, Tensor]) -> tuple:
        sides = [
            f.head_logits(x[f"{side}hidden"], x[f"{side}weight"], x.get(f"{side}bias"), mask)
            for side in ("", "ref_")
        ]
        return (no_infinities(f.divergence(*sides, mask, o), wants),)

    wants = subset(d, *x)
    size = sum(head_reach(x, mask, o, side) for side in ("", "ref_"))
    terms = sum(head_terms(x, mask, o, side) for side in ("", "ref_"))
    return Case("linear_kl_divergence", x, call, formula, wants, size, grad_size=4.0, terms=terms)


def softmax_fisher_product(d: Draw) -> Case:
    shape, vocab = tokens(d), vocabulary(d)
    mask = d.bits(*shape)
    x = {
        "logits": d.hidden(d.logits(*shape, vocab, dtype=d.of(*DTYPES)), mask),
        "tangent": d.hidden(d.normal(*shape, vocab).to(d.of(*DTYPES)), mask),
    }
    o, impl = {"temperature": d.temperature(*shape)}, d.of("eager", "triton")
    narrow = x["tangent"].dtype

    def call(x: dict[str, Tensor]) -> tuple:
        product, quadratic = fastrlhf.softmax_fisher_product(*x.values(), mask=mask, impl=impl, **o)
        assert product.dtype == narrow
        return product, quadratic

    def formula(x: dict[str, Tensor]) -> tuple:
        return f.fisher(x["logits"], x["tangent"], mask, o)

    size = (reach(f.where_kept(x["logits"], mask), o) + 1) * 16 / coldest(o) ** 2
    return Case("softmax_fisher_product", x, call, formula, (), size)


def pairs_of(d: Draw, sequences: int) -> tuple[Tensor, Tensor]:
    count = d.size(4) if sequences else 0
    return d.integers(sequences, (count,)), d.integers(sequences, (count,))


PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "aot", "aot_unpaired",
)  # fmt: skip


def aot(kind: str, policy: Tensor, ref: Tensor, w: Tensor, l: Tensor, o: dict[str, Any]) -> Tensor:
    if kind == "aot":
        margin = (policy[w] - policy[l]).sort().values - (ref[w] - ref[l]).sort().values
    else:
        s = policy - ref
        margin = s[w].sort().values - s[l].sort().values
    return f.pair_losses("sigmoid", margin, torch.zeros_like(margin), o)


def check_ties(kind: str, policy: Tensor, ref: Tensor, w: Tensor, l: Tensor) -> None:
    """Equal numbers that are sorted have a gradient that depends on the sort."""
    sorted_ones = (
        [policy[w] - policy[l]] if kind == "aot" else [(policy - ref)[w], (policy - ref)[l]]
    )
    for x in sorted_ones:
        f.keep_off(x.sort().values.diff(), 0.0)


def dpo_loss(d: Draw) -> Case:
    sequences, length, kind = d.size(4), d.size(5, 1), d.of(*PAIR_LOSSES)
    masked, dtype = d.chance(0.6), d.of(*DTYPES)
    mask = d.bits(sequences, length) if masked else None
    shape = (sequences, length) if masked else (sequences,)
    policy = d.logprobs(*shape, dtype=dtype)
    summed = not masked or d.chance(0.4)
    ref = d.logprobs(*((sequences,) if summed else shape), dtype=d.of(dtype, *DTYPES))
    if mask is not None:
        policy = d.hidden(policy, mask)
        ref = ref if summed else d.hidden(ref, mask)
    pairs = pairs_of(d, sequences)
    o = {"label_smoothing": d.of(0.1, 0.25, 0.4) if kind == "exo_pair" else d.of(0.0, 0.1, 0.4),
         "discopop_tau": d.of(0.05, 0.5, 1.0)}  # fmt: skip
    beta, impl = d.of(0.1, 0.5, 2), d.of("eager", "triton", "auto")
    lengths = None if masked else d.integers(9, (sequences,))
    x = {"pi_logps": policy, "ref_logps": ref}

    def call(x: dict[str, Tensor]) -> tuple:
        return fastrlhf.dpo_loss(
            *x.values(), *pairs, beta, loss_type=kind, lengths=lengths, mask=mask, impl=impl, **o
        )

    def formula(x: dict[str, Tensor]) -> tuple:
        pi, ref = (y if y.ndim == 1 else f.where_kept(y, mask).sum(-1) for y in x.values())
        w, l = (i.long() for i in pairs)
        count = (lengths if mask is None else (mask != 0).sum(-1)).clamp(min=1).to(pi.dtype)
        settings = {**o, "beta": beta, "lengths_w": count[w], "lengths_l": count[l]}
        if kind.startswith("aot"):
            check_ties(kind, pi, ref, w, l)
            losses = aot(kind, pi, ref, w, l, settings)
        else:
            s = pi - ref
            losses = f.pair_losses(kind, s[w], s[l], settings)
        return losses, beta * (pi - ref).detach()

    size = largest(policy, mask) + largest(ref, None if summed else mask)
    return Case("dpo_loss", x, call, formula, subset(d, *x), squared(kind, size * beta + 1),
                grad_size=4.0 * (1 + 2 * beta) / o["discopop_tau"],
        terms=beta,)  # fmt: skip


def squared(kind: str, size: float) -> float:
    return size * size * 100 if kind in ("ipo", "sppo_hard") else size


def largest(x: Tensor, mask: Tensor | None) -> float:
    """The sum of the sizes of what is added up, in the worst row."""
    y = x.detach().double() if mask is None else f.where_kept(x.detach().double(), mask)
    if not y.numel():
        return 1.0
    return float(y.abs().sum(-1).max() if y.ndim > 1 else y.abs().max()) + 1.0


def reference_free(d: Draw) -> Case:
    sequences, kind, dtype = d.size(4), d.of("simpo", "cpo", "orpo"), d.of(*DTYPES)
    logps = d.logprobs(sequences, dtype=dtype) - 1e-2
    lengths, pairs = d.integers(9, (sequences,)), pairs_of(d, sequences)
    beta, gamma, alpha = d.of(0.1, 0.5, 2), d.of(0.0, 0.5), d.of(0.0, 1.0)
    eps = d.of(0.0, 0.1)

    def call(x: dict[str, Tensor]) -> tuple:
        if kind == "simpo":
            return fastrlhf.simpo_loss(x["logps"], lengths, *pairs, beta, gamma)
        if kind == "cpo":
            return fastrlhf.cpo_loss(x["logps"], *pairs, beta, alpha=alpha, label_smoothing=eps)
        return fastrlhf.orpo_loss(x["logps"], lengths, *pairs, beta)

    def formula(x: dict[str, Tensor]) -> tuple:
        w, l = (i.long() for i in pairs)
        sums = x["logps"]
        mean = sums / lengths.clamp(min=1).to(sums.dtype)
        if kind == "simpo":
            return f.ell(beta * (mean[w] - mean[l]) - gamma), beta * mean.detach()
        if kind == "cpo":
            o = {"beta": beta, "label_smoothing": eps}
            return f.pair_losses("sigmoid", sums[w], sums[l], o) - alpha * sums[
                w
            ], beta * sums.detach()
        odds = mean - torch.log(-torch.expm1(mean))
        return -mean[w] + beta * f.ell(odds[w] - odds[l]), beta * mean.detach()

    # Where a probability is nearly 1, its odds know the log-prob a hundred times less well.
    return Case(
        kind, {"logps": logps}, call, formula, subset(d, "logps"), largest(logps, None) * 100
    )


def kto_loss(d: Draw) -> Case:
    sequences, dtype = d.size(4), d.of(*DTYPES)
    x = {name: d.logprobs(sequences, dtype=dtype) for name in ("pi_logps", "ref_logps")}
    desirable, kl, beta = d.bits(sequences), d.of(0.0, 0.3, -1.0, 2), d.of(0.1, 0.5)
    weights = {"desirable_weight": d.of(1.0, 0.5), "undesirable_weight": d.of(1, 2.0)}

    def call(x: dict[str, Tensor]) -> tuple:
        return fastrlhf.kto_loss(*x.values(), desirable, kl, beta, **weights)

    def formula(x: dict[str, Tensor]) -> tuple:
        s = x["pi_logps"] - x["ref_logps"]
        gain = beta * (s - max(kl, 0.0))
        good = weights["desirable_weight"] * f.sigmoid(-gain)
        bad = weights["undesirable_weight"] * f.sigmoid(gain)
        return torch.where(desirable != 0, good, bad), beta * s.detach()

    size = sum(largest(y, None) for y in x.values())
    return Case("kto_loss", x, call, formula, subset(d, *x), size)


def policy_options(d: Draw, shape: tuple[int, int], mask: Tensor) -> dict[str, Any]:
    per_sequence = d.chance(0.5)
    of = shape[:1] if per_sequence else shape
    advantages = d.normal(*of).float() * (d.bits(*of) != 0)
    reduction = d.of("token-mean", "sequence-mean", "sequence-sum", "constant")
    kl = d.of(0.0, 0.0, 0.1)
    rollout = (d.normal(*shape).float() / 3).exp() if d.chance(0.3) else None
    surrogate, level = d.of(*(("clip", "token") for _ in range(8)), *FORMS)
    of_kl = d.hidden(d.bits(*shape).float(), mask) if kl and d.chance(0.3) else None
    return {
        "advantages": advantages if per_sequence else d.hidden(advantages, mask),
        "rollout_weights": rollout, "reduction": reduction, "kl_coef": kl,
        "surrogate": surrogate, "ratio_level": level, "kl_weights": of_kl,
        "kl_bias_correction": d.chance(0.3), "off_policy_mask_threshold": d.of(None, None, 0.1),
        "ratio_floor": d.of(0.0, 0.9), "vespo_shape": (2.0, 3.0, 3.0, 2.0),
        "clip_low": d.of(0.2, 3e-4), "clip_high": d.of(0.2, 4.0), "dual_clip": d.of(None, 3.0),
        "kl_estimator": d.of(*ESTIMATORS), "entropy_coef": d.of(0.0, 0.0, 0.01),
        "normalizer": d.of(None, 7.0) if reduction != "constant" else d.of(7.0, 3),
        "sapo_temperatures": (1.0, 1.05), "mask": mask,
    }  # fmt: skip


def split(o: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    rest = {name: value for name, value in o.items() if name not in ("advantages", "mask")}
    return o["advantages"], o["mask"], rest


def policy_loss(d: Draw) -> Case:
    shape = d.size(3), d.size(4)
    mask, dtype = d.bits(*shape), d.of(*DTYPES)
    o = policy_options(d, shape, mask)
    acc = torch.promote_types(dtype, torch.float32)
    lp = d.logprobs(*shape, dtype=dtype)
    near = (lp.double() + d.normal(*shape) * d.of(0.01, 0.3)).clamp(max=-1e-3).to(acc)
    old = d.of(None, near, d.logprobs(*shape, dtype=acc))
    ref = (lp.double() + d.normal(*shape) * d.of(0.01, 1.0)).to(acc)
    x = {"logprobs": d.hidden(lp, mask)}
    if o["entropy_coef"]:
        x["entropy"] = d.hidden(d.normal(*shape).abs().to(dtype), mask)
    advantages, _, options = split(o)
    recipe = d.of("policy_loss", "ppo_loss") if o["surrogate"] == "clip" else "policy_loss"
    if recipe == "ppo_loss":
        options = {name: value for name, value in options.items() if name != "surrogate"}

    def call(x: dict[str, Tensor]) -> tuple:
        function = getattr(fastrlhf, recipe)
        given = (x["logprobs"], old, advantages, mask)
        return (function(*given, ref_logprobs=ref, entropy=x.get("entropy"), **options)[0],)

    def formula(x: dict[str, Tensor]) -> tuple:
        return (f.policy(x["logprobs"], old, ref, x.get("entropy"), o),)

    size = policy_size(lp, old, ref, mask, o)
    return Case("policy_loss", x, call, formula, subset(d, *x), size, grad_size=8.0,
                twice=d.chance(0.2))  # fmt: skip


def policy_size(
    lp: Tensor, old: Tensor | None, ref: Tensor, mask: Tensor, o: dict[str, Any]
) -> float:
    """Sizes of log-probs times those of the ratios and penalties that they become."""
    sizes = [largest(x, mask) for x in (lp, old, ref) if x is not None]
    far = 0.0 if old is None else float(finite_max(lp.double() - old.double(), mask))
    if o["ratio_level"] == "product":
        far *= mask.shape[1]
    penalty = float(finite_max(ref.double() - lp.double(), mask)) if o["kl_coef"] else 0.0
    worst = max(far, penalty)
    if o["kl_coef"] and o["kl_bias_correction"]:
        worst = max(far, 0.0) + max(penalty, 0.0)
    weights = (
        1.0 if o["rollout_weights"] is None else float(finite_max(o["rollout_weights"], mask)) + 1
    )
    return (
        sum(sizes) ** 2
        * weights
        * float(torch.tensor(min(max(worst, 0.0), 80.0)).exp())
        * max(1, mask.numel())
    )


def finite_max(x: Tensor, mask: Tensor) -> Tensor:
    x = f.where_kept(x.detach().double(), mask)
    return x.max() if x.numel() else torch.zeros(())


def of_logits(d: Draw) -> tuple[tuple[int, int], int, Tensor, Tensor, dict[str, Any]]:
    shape, vocab = (d.size(3), d.size(4)), d.of(2, 3, 7, 16, 17, 33)
    mask = d.bits(*shape)
    return shape, vocab, mask, d.integers(vocab, shape), policy_options(d, shape, mask)


def logits_policy_loss(d: Draw) -> Case:
    shape, vocab, mask, targets, o = of_logits(d)
    dtype = d.of(*DTYPES)
    logits = (d.normal(*shape, vocab) * d.of(1e-3, 1.0, 3.0)).to(dtype)
    transform = d.transform(*shape)
    if isinstance(transform["temperature"], (int, float)):
        transform["temperature"] = max(transform["temperature"], 0.7)
    inplace, impl = d.chance(0.3), d.of("eager", "triton")
    x = {"logits": d.laid_out(d.hidden(logits, mask), repeated=False)}
    clean = f.where_kept(x["logits"].double(), mask)
    lp = f.token_stats(clean, targets, {**transform, "ignore_index": -5})[0].detach()
    acc = torch.promote_types(dtype, torch.float32)
    old = d.of(None, (lp + d.normal(*shape) * 0.3).clamp(max=-1e-3).to(acc))
    ref = (lp + d.normal(*shape)).to(acc)
    advantages, _, options = split(o)
    options |= {"inplace_backward": inplace, "impl": impl, "entropy": d.of(True, False)}

    def call(x: dict[str, Tensor]) -> tuple:
        logits = x["logits"] * 1 if inplace else x["logits"]
        given = (logits, targets, old, advantages, mask)
        return (fastrlhf.logits_policy_loss(*given, ref_logprobs=ref, **transform, **options)[0],)

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.where_kept(x["logits"], mask)
        lp, h = f.token_stats(logits, targets, {**transform, "ignore_index": -5})
        return (f.policy(lp, old, ref, h, o),)

    size = policy_size(lp, old, ref, mask, o) * (1 + reach(clean, transform))
    return Case("logits_policy_loss", x, call, formula, subset(d, "logits"), size, grad_size=8.0,
                terms=steepness(transform) / size)  # fmt: skip


def linear_policy_loss(d: Draw) -> Case:
    shape, vocab, mask, targets, o = of_logits(d)
    dtype, transform = d.of(*DTYPES), {"temperature": d.of(1.0, 0.7), "softcap": d.of(None, 30.0)}
    x = head(d, shape, vocab, mask, dtype)
    logits = f.head_logits(x["hidden"].double(), x["weight"].double(),
                           x["bias"].double() if "bias" in x else None, mask)  # fmt: skip
    lp = f.token_stats(logits, targets, {**transform, "ignore_index": -5})[0]
    acc = torch.promote_types(dtype, torch.float32)
    old = d.of(None, (lp + 0.3 * d.normal(*shape)).clamp(max=-1e-3).to(acc))
    ref = (lp + d.normal(*shape)).to(acc)
    advantages, _, options = split(o)
    options |= {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton")}

    def call(x: dict[str, Tensor]) -> tuple:
        given = (x["hidden"], x["weight"], targets, old, advantages, mask)
        loss, _ = fastrlhf.linear_policy_loss(
            *given, ref_logprobs=ref, bias=x.get("bias"), **transform, **options
        )
        return (loss,)

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.head_logits(x["hidden"], x["weight"], x.get("bias"), mask)
        lp, h = f.token_stats(logits, targets, {**transform, "ignore_index": -5})
        return (f.policy(lp, old, ref, h, o),)

    size = policy_size(lp, old, ref, mask, o) * (1 + head_reach(x, mask, transform))
    return Case("linear_policy_loss", x, call, formula, subset(d, *x), size, grad_size=8.0,
                terms=head_terms(x, mask, transform))  # fmt: skip


def linear_dpo_loss(d: Draw) -> Case:
    shape, vocab, dtype = (d.size(4), d.size(4)), vocabulary(d), d.of(*DTYPES)
    targets, _ = targets_of(d, shape, vocab, -100)
    live, kind = targets != -100, d.of(*PAIR_LOSSES[:12])
    x = head(d, shape, vocab, live, dtype)
    transform = {"temperature": d.of(1.0, 0.7), "softcap": d.of(None, 30.0)}
    acc = torch.promote_types(dtype, torch.float32)
    ref = -d.normal(shape[0]).abs().to(acc) * 5
    pairs, beta = pairs_of(d, shape[0]), d.of(0.1, 0.5)
    o = {"label_smoothing": 0.1, "discopop_tau": 0.5}
    options = {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton"), "loss_type": kind}

    def call(x: dict[str, Tensor]) -> tuple:
        given = (x["hidden"], x["weight"], targets, ref, *pairs, beta)
        return fastrlhf.linear_dpo_loss(*given, bias=x.get("bias"), **transform, **o, **options)

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.head_logits(x["hidden"], x["weight"], x.get("bias"), live)
        lp, _ = f.token_stats(logits, targets, transform)
        w, l = (i.long() for i in pairs)
        count = live.sum(-1).clamp(min=1).to(lp.dtype)
        settings = {**o, "beta": beta, "lengths_w": count[w], "lengths_l": count[l]}
        s = lp.sum(-1) - ref.to(lp.dtype)
        return f.pair_losses(kind, s[w], s[l], settings), beta * s.detach()

    size = head_reach(x, live, transform) * (1 + shape[1]) + largest(ref, None)
    size = squared(kind, size)
    return Case("linear_dpo_loss", x, call, formula, subset(d, *x), size, grad_size=8.0,
                terms=head_terms(x, live, transform))  # fmt: skip


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


MAKERS: tuple[Maker, ...] = (
    token_stats, token_stats, linear_token_stats, linear_token_stats, linear_loss,
    kept_token_stats, fewer_rows,
    linear_cross_entropy, kl_divergence, kl_divergence, linear_kl_divergence,
    softmax_fisher_product, dpo_loss, dpo_loss, reference_free, kto_loss, policy_loss, policy_loss,
    logits_policy_loss, logits_policy_loss, linear_policy_loss, linear_dpo_loss, value_loss, gae,
    group_advantages, shaped_rewards, kl_penalty, reward_loss, plackett_luce_loss, whiten,
    sequence_logprobs, shift_targets, conjugate_gradient,
)  # fmt: skip
