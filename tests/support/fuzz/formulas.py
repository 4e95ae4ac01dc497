"""What the docstrings say, in plain PyTorch that autograd differentiates, in the inputs' dtype.

Written for fp64, where little needs care but what is infinite or left out: such entries are
replaced before a formula sees them. Nothing here comes from the library.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class FragileError(Exception):
    """The answer hangs by a rounding: a ratio at its bound, two equal scores that are sorted."""


def keep_off(x: Tensor, *bounds: float, margin: float = 1e-3) -> None:
    """Refuse a case where something lies so near a bound that rounding decides its side."""
    for bound in bounds:
        if ((x.detach() - bound).abs() < margin).any():
            raise FragileError


def keep_within(most: float, *values: Tensor) -> None:
    """Refuse a case whose ratios end before those of another dtype do."""
    if any(bool((x.detach() > most).any()) for x in values):
        raise FragileError


def where_kept(x: Tensor, mask: Tensor) -> Tensor:
    kept = (mask != 0).view(*mask.shape, *[1] * (x.ndim - mask.ndim))
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def per_token(value: Any, tokens: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A number, or a tensor that fits tokens; of two dimensions, (B,) is one a sequence."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.ndim == 1 and len(tokens) == 2:
        value = value[:, None]
    return value.to(dtype).expand(tokens)[..., None]


def effective(logits: Tensor, o: dict[str, Any]) -> Tensor:
    x = logits * float(o.get("scale", 1.0))
    if o.get("softcap") is not None:
        x = o["softcap"] * torch.tanh(x / o["softcap"])
    return x / per_token(o.get("temperature", 1.0), tuple(x.shape[:-1]), x.dtype)


def log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Ln p with -inf where p is 0, and which rows have no distribution."""
    empty = (z == -torch.inf).all(-1, keepdim=True)
    z = torch.where(empty, torch.zeros((), dtype=z.dtype), z)
    return z.log_softmax(-1), empty[..., 0]


def expected(p: Tensor, x: Tensor) -> Tensor:
    """Σ p·x, without the terms that have no probability."""
    here = p > 0
    zero = torch.zeros((), dtype=p.dtype)
    return torch.where(here, p * torch.where(here, x, zero), zero).sum(-1)


def token_stats(logits: Tensor, targets: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy, 0 where the target is ignored."""
    live = targets != o.get("ignore_index", -100)
    log_p, empty = log_softmax(effective(where_kept(logits, live), o))
    index = torch.where(live, targets.long(), 0)
    logprob = log_p.gather(-1, index[..., None])[..., 0]
    zero = torch.zeros((), dtype=log_p.dtype)
    none = torch.full((), -torch.inf, dtype=log_p.dtype)
    entropy = torch.where(empty, zero, expected(log_p.exp(), -log_p))
    return where_kept(torch.where(empty, none, logprob), live), where_kept(entropy, live)


def kept_stats(
    logits: Tensor, targets: Tensor, o: dict[str, Any], kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy over kept columns (..., V) alone: 0 where there is one of them."""
    live = targets != o.get("ignore_index", -100)
    z = effective(where_kept(logits, live), o)
    zero, none = (torch.full((), x, dtype=z.dtype) for x in (0.0, -torch.inf))
    z = torch.where(kept, torch.where((kept.sum(-1) == 1)[..., None], zero, z), none)
    plain = {"ignore_index": o.get("ignore_index", -100)}
    return token_stats(z, targets, plain)


FURTHER = ("is_top1", "mean_logit", "log_sum_sq_probs")


def further_stats(
    logits: Tensor, targets: Tensor, o: dict[str, Any], names: Sequence[str], *, ties: bool
) -> list[Tensor | None]:
    """What `with_stats` may name, None where it does not: numbers without gradient. Without ties,
    logits that are equal here may differ in the library.
    """
    live = targets != o.get("ignore_index", -100)
    z = effective(where_kept(logits.detach(), live), o)
    log_p, empty = log_softmax(z)
    largest = z.amax(-1, keepdim=True)
    gaps = torch.where(z == largest, torch.zeros((), dtype=z.dtype), largest - z)
    near = (gaps < 1e-5 * (1 + largest.abs())) & ((gaps > 0) if ties else (gaps >= 0))
    if "is_top1" in names and (near.sum(-1) > (0 if ties else 1)).any():
        raise FragileError
    found = (
        ((z == largest).int().argmax(-1) == targets) & ~empty,
        z.mean(-1),
        torch.where(empty, torch.zeros((), dtype=z.dtype), (2 * log_p).logsumexp(-1)),
    )
    return [
        where_kept(x.to(z.dtype), live) if name in names else None
        for name, x in zip(FURTHER, found, strict=True)
    ]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor) -> Tensor:
    logits = where_kept(hidden, live) @ weight.T
    return logits if bias is None else logits + bias


def divergence(logits: Tensor, other: Tensor, mask: Tensor, o: dict[str, Any]) -> Tensor:
    sides = [log_softmax(effective(where_kept(x, mask), o)) for x in (logits, other)]
    (log_p, no_p), (log_q, no_q) = sides
    direction, beta = o["direction"], o["beta"]
    if direction == "jsd" and beta in (0, 1):
        direction = "forward" if beta == 0 else "reverse"
    zero = torch.zeros((), dtype=log_p.dtype)
    if direction == "jsd":
        mixture = (1 - beta) * log_p.exp() + beta * log_q.exp()
        mixed = torch.where(mixture > 0, mixture, torch.ones_like(mixture)).log()
        value = (1 - beta) * expected(log_p.exp(), log_p - mixed)
        value = value + beta * expected(log_q.exp(), log_q - mixed)
        return where_kept(torch.where(no_p | no_q, zero, value), mask)
    if direction == "forward":
        (log_p, no_p), (log_q, no_q) = (log_q, no_q), (log_p, no_p)
    # An outright sum of p·(ln p - ln q): inf where q is 0 and p is not.
    value = torch.where(no_q, torch.inf, expected(log_p.exp(), log_p - log_q))
    return where_kept(torch.where(no_p, zero, value), mask)


def fisher(
    logits: Tensor, tangent: Tensor, mask: Tensor, o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    log_p, empty = log_softmax(effective(where_kept(logits, mask), o))
    p = log_p.exp() * (~empty)[..., None]
    u = torch.where(p > 0, where_kept(tangent, mask), torch.zeros((), dtype=p.dtype))
    centred = u - (p * u).sum(-1, keepdim=True)
    t = per_token(o.get("temperature", 1.0), tuple(p.shape[:-1]), p.dtype)
    product = where_kept(p * centred / t**2, mask)
    return product, (product * centred).sum(-1)


def ell(x: Tensor) -> Tensor:
    """-ln σ(x)."""
    return torch.logaddexp(torch.zeros_like(x), -x)


def sigmoid(x: Tensor) -> Tensor:
    """PyTorch's derivative σ·(1 - σ) has few digits where σ is nearly 1, in fp64 from x = 30 on."""
    return torch.exp(-ell(x))


def pair_losses(kind: str, w: Tensor, l: Tensor, o: dict[str, Any]) -> Tensor:
    """Of scores of the preferred and the other sequence; `o` has beta, eps, tau, lengths."""
    beta, eps, s = o["beta"], o["label_smoothing"], sigmoid
    if kind in ("ipo", "sigmoid_norm"):
        w, l = w / o["lengths_w"], l / o["lengths_l"]
    d, a, b = beta * (w - l), beta * w, beta * l
    if kind in ("sigmoid", "sigmoid_norm"):
        smooth = eps if kind == "sigmoid" else 0.0
        return (1 - smooth) * ell(d) + smooth * ell(-d)
    if kind == "robust":
        return ((1 - eps) * ell(d) - eps * ell(-d)) / (1 - 2 * eps)
    if kind == "hinge":
        keep_off(d, 1.0)
        return torch.relu(1 - d)
    if kind == "ipo":
        return (w - l - 1 / (2 * beta)) ** 2
    if kind == "exo_pair":
        return -s(d) * (ell(d) + math.log(1 - eps)) - s(-d) * (ell(-d) + math.log(eps))
    if kind == "nca_pair":
        return ell(a) + ell(-a) / 2 + ell(-b) / 2
    if kind == "bco_pair":
        return ell(a) + ell(-b)
    if kind == "sppo_hard":
        return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2
    if kind == "apo_zero":
        return s(-a) + s(b)
    if kind == "apo_down":
        return s(a) + s(-d)
    assert kind == "discopop"
    gate = d / o["discopop_tau"]
    return ell(d) * s(-gate) + torch.exp(-ell(gate) - d)


def surrogate(log_ratio: Tensor, lp: Tensor, a: Tensor, o: dict[str, Any]) -> Tensor:
    keep_off(log_ratio, 80.0, 700.0)
    ratio = log_ratio.clamp(max=80.0).exp()
    low, high, kind = 1 - o["clip_low"], 1 + o["clip_high"], o["surrogate"]
    if kind == "plain":
        return -a * lp
    if kind == "sapo":
        positive, other = o["sapo_temperatures"]
        tau = torch.where(a > 0, a.new_full((), positive), a.new_full((), other))
        return -(4 / tau) * sigmoid(tau * (ratio - 1)) * a
    if kind == "gmpo":
        return -ratio * a
    if kind == "vespo":
        numbers = (a.new_full((), x) for x in o["vespo_shape"])
        k_up, rate_up, k_down, rate_down = numbers
        k, rate = torch.where(a > 0, k_up, k_down), torch.where(a > 0, rate_up, rate_down)
        return -torch.exp(k * log_ratio - rate * torch.expm1(log_ratio)).detach() * a * lp
    keep_off(ratio, *(() if o["dual_clip"] is None else (o["dual_clip"],)))
    if kind.startswith("dppo"):
        gone = moved_too_far(log_ratio.detach(), lp.detach(), a, o)
        if o["dual_clip"] is not None:
            held = log_ratio.detach()
            ratio = ratio.clamp(max=o["dual_clip"]).detach() * torch.exp(log_ratio - held)
        return torch.where(gone, torch.zeros_like(a), -ratio * a)
    keep_off(ratio, low, high)
    if kind == "cispo":
        keep_off(ratio, o["ratio_floor"])
        return -ratio.clamp(o["ratio_floor"], high).detach() * a * lp
    losses = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
    if o["dual_clip"] is not None:
        losses = torch.where(a < 0, torch.minimum(losses, -o["dual_clip"] * a), losses)
    return losses


def moved_too_far(log_ratio: Tensor, lp: Tensor, a: Tensor, o: dict[str, Any]) -> Tensor:
    """Whether DPPO leaves a token out."""
    p, q = lp.exp(), (lp - log_ratio).exp()
    distance = (p - q).abs()
    if o["surrogate"] == "dppo_kl":
        rest = (1 - q) * torch.log((1 - q) / (1 - p))
        distance = torch.where(q == 1, torch.zeros_like(q), rest) - q * log_ratio
    live = torch.where(a == 0, torch.zeros_like(a), distance)
    keep_off(live, o["clip_low"], o["clip_high"])
    up, down = (p > q) & (distance > o["clip_high"]), (p < q) & (distance > o["clip_low"])
    return torch.where(a > 0, up, down)


def penalty(x: Tensor, estimator: str, most: float = 80.0) -> Tensor:
    """Of x = ln ref - ln π, whose exponential ends at `most`: 700 in fp64."""
    if estimator.endswith("+"):
        value = penalty(x.detach(), estimator[:-1], most)
        return value + (x * x - (x * x).detach()) / 2
    if estimator == "k3":
        keep_off(x, 80.0, 700.0)
        x = x.clamp(max=most)
        # By its series near 0, where e^x - 1 is a derivative without digits, in fp64 too.
        near = x.abs() < 0.01
        small, series = torch.where(near, x, torch.zeros_like(x)), torch.ones_like(x)
        for k in range(8, 2, -1):
            series = 1 + small / k * series
        return torch.where(near, small**2 / 2 * series, torch.expm1(x) - x)
    return {"k1": -x, "k2": x * x / 2, "abs": x.abs()}[estimator]


def of_level(log_ratio: Tensor, a: Tensor, lengths: Tensor, o: dict[str, Any]) -> Tensor:
    """The log-ratio that the surrogate is of, from those of the tokens."""
    if o["surrogate"] == "gmpo":
        low, high = math.log1p(-o["clip_low"]), math.log1p(o["clip_high"])
        keep_off(log_ratio, low, high)
        log_ratio = torch.where(a < 0, log_ratio.clamp(min=low), log_ratio.clamp(max=high))
    total = log_ratio.sum(-1, keepdim=True).expand(log_ratio.shape)
    if o["ratio_level"] == "product":
        keep_within(60.0, total)
    if o["ratio_level"] == "sequence-token":
        return (total / lengths).detach() + log_ratio - log_ratio.detach()
    return {"token": log_ratio, "sequence": total / lengths, "product": total}[o["ratio_level"]]


def policy(
    lp: Tensor, old: Tensor | None, ref: Tensor | None, entropy: Tensor | None, o: dict[str, Any]
) -> Tensor:
    """The loss of `policy_loss`; `o` has the mask, advantages, weights and all options."""
    mask = o["mask"] != 0
    zero = torch.zeros((), dtype=lp.dtype)

    def clean(x: Tensor) -> Tensor:
        x = x[:, None].expand(mask.shape) if x.ndim == 1 else x.expand(mask.shape)
        return torch.where(mask, x.to(lp.dtype), zero)

    a = clean(o["advantages"])
    if o["rollout_weights"] is not None:
        a = torch.where(a == 0, zero, a * clean(o["rollout_weights"]))
    lp = torch.where(mask, lp, zero)
    log_ratio = lp - (lp.detach() if old is None else clean(old.detach()))
    lengths = mask.sum(-1, keepdim=True).clamp(min=1).to(lp.dtype)
    drift = -(log_ratio.detach().sum(-1, keepdim=True) / lengths)
    log_ratio = of_level(log_ratio, a, lengths, o)
    losses = surrogate(log_ratio, lp, a, o)
    if o["off_policy_mask_threshold"] is not None:
        keep_off(torch.where(a < 0, drift, zero + 1e3), o["off_policy_mask_threshold"])
        gone = (a < 0) & (drift > o["off_policy_mask_threshold"])
        losses = torch.where(gone, zero, losses)
    if o["kl_coef"] != 0:
        kl = penalty(clean(ref.detach()) - lp, o["kl_estimator"])
        if o["kl_bias_correction"]:
            keep_within(60.0, log_ratio, clean(ref.detach()) - lp)
            kl = kl * log_ratio.clamp(max=80.0).exp()
        weights = 1.0 if o["kl_weights"] is None else clean(o["kl_weights"])
        losses = losses + o["kl_coef"] * weights * kl
    if o["entropy_coef"] != 0:
        losses = losses - o["entropy_coef"] * torch.where(mask, entropy, zero)
    losses = torch.where(mask, losses, zero)
    normalizer, reduction = o["normalizer"], o["reduction"]
    if reduction == "token-mean":
        return losses.sum() / (normalizer or mask.sum().clamp(min=1).to(lp.dtype))
    if reduction == "sequence-mean":
        losses = losses / lengths
    return losses.sum() / (normalizer or max(len(mask), 1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Sequence[Tensor]:
    """Sequence by sequence and token by token, over those of the mask alone."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(mask)):
        following, value_after = 0.0, 0.0
        for t in reversed((mask[b] != 0).nonzero()[:, 0].tolist()):
            delta = rewards[b, t] + gamma * value_after - values[b, t]
            following, value_after = delta + gamma * lam * following, values[b, t]
            advantages[b, t], returns[b, t] = following, following + values[b, t]
    return advantages, returns


def group_advantages(rewards: Tensor, groups: Tensor, valid: Tensor, kind: str) -> Tensor:
    found = torch.zeros_like(rewards)
    ids = torch.zeros_like(groups) if kind == "reinforce++" else groups
    for group in ids.unique():
        rows = ((ids == group) & (valid != 0)).nonzero()[:, 0]
        r = rewards[rows]
        if len(r) < 2 or (r == r[0]).all():
            continue
        centred = r - r.mean()
        if kind in ("grpo", "reinforce++"):
            centred = centred / (r.std() + 1e-4)
        found[rows] = centred * (len(r) / (len(r) - 1) if kind == "rloo" else 1)
    return found


def plackett_luce(scores: Tensor, groups: Tensor, ranks: Tensor) -> Tensor:
    losses = []
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        s = scores[rows[ranks[rows].argsort()]]
        terms = [s[k:].logsumexp(0) - s[k] for k in range(len(s))]
        losses.append(torch.stack(terms).sum())
    return torch.stack(losses) if losses else scores[:0]
