"""Formulas as trainers write them, in plain PyTorch and in the dtype that they are given.

What they are for is their error: it is the budget of ours (see compare.py). That they say the same
as the oracles is shown where they are used, in fp64.

Dims: B sequences, T tokens, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: str = "clip",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    ratio_floor: float = 0.0,
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
    kl_reference: str = "ref",
    kl_bias_correction: bool = False,
    kl_weights: Tensor | None = None,
    off_policy_mask_threshold: float | None = None,
) -> Tensor:
    """`policy_loss`, by its arguments' names."""
    live = mask.bool()

    def clean(x: Tensor) -> Tensor:
        x = x if x.ndim == 2 else x[:, None].expand(live.shape)
        return torch.where(live, x, 0.0).to(logprobs.dtype)

    lp, a, old = clean(logprobs), clean(advantages), clean(old_logprobs)
    counts = live.sum(-1).clamp(min=1)
    own, low, high = lp - old, 1 - clip_low, 1 + clip_high
    drift = -(own.sum(-1) / counts)[:, None].detach()
    if surrogate == "gmpo":
        log_low, log_high = math.log(low), math.log(high)
        own = torch.where(a < 0, own.clamp(min=log_low), own.clamp(max=log_high))
    mean = (own.sum(-1) / counts)[:, None].expand(live.shape)
    log_ratio = {
        "token": own, "sequence": mean, "product": mean * counts[:, None],
        "sequence-token": mean.detach() + lp - lp.detach(),
    }[ratio_level]  # fmt: skip
    ratio = log_ratio.exp()
    if surrogate == "clip":
        objective = torch.min(ratio * a, ratio.clamp(low, high) * a)
        if dual_clip is not None:
            objective = torch.where(a < 0, torch.max(objective, dual_clip * a), objective)
        losses = -objective
    elif surrogate == "cispo":
        losses = -ratio.detach().clamp(ratio_floor, high) * a * lp
    elif surrogate == "sapo":
        tau = torch.where(a > 0, *(torch.tensor(t, dtype=a.dtype) for t in sapo_temperatures))
        losses = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
    elif surrogate in ("dppo_tv", "dppo_kl"):
        p, q = lp.exp(), old.exp()
        distance = (p - q).abs()
        if surrogate == "dppo_kl":
            distance = q * (old - lp) + (1 - q) * ((1 - q) / (1 - p)).log()
        up = (p > q) & (distance > clip_high)
        gone = torch.where(a > 0, up, (p < q) & (distance > clip_low))
        weight = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
        losses = torch.where(gone, 0.0, -a * weight.detach() * (own - own.detach()).exp())
    elif surrogate == "gmpo":
        losses = -ratio * a
    elif surrogate == "vespo":
        k, rate = (
            torch.where(a > 0, *(torch.tensor(vespo_shape[i], dtype=a.dtype) for i in pair))
            for pair in ((0, 2), (1, 3))
        )
        losses = -(ratio**k * (rate * (1 - ratio)).exp()).detach() * a * lp
    else:
        losses = -a * lp
    if off_policy_mask_threshold is not None:
        losses = torch.where((a < 0) & (drift > off_policy_mask_threshold), 0.0, losses)
    if rollout_weights is not None:
        losses = losses * clean(rollout_weights)
    if kl_coef:
        x = (old if kl_reference == "old" else clean(ref_logprobs)) - lp
        kinds = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - 1 - x, "abs": x.abs()}
        penalty = kinds[kl_estimator.rstrip("+")]
        if kl_estimator.endswith("+"):
            penalty = penalty.detach() + kinds["k2"] - kinds["k2"].detach()
        if kl_bias_correction:
            penalty = penalty * ratio
        losses = losses + kl_coef * penalty * (1.0 if kl_weights is None else clean(kl_weights))
    if entropy_coef:
        losses = losses - entropy_coef * clean(entropy)
    of_sequences = torch.where(live, losses, 0.0).sum(-1)
    if reduction == "token-mean":
        return of_sequences.sum() / (normalizer or live.sum().clamp(min=1))
    if reduction == "sequence-mean":
        of_sequences = of_sequences / counts
    return of_sequences.sum() / (normalizer or len(live))


def plain_token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, entropies and log-sum-exps, 0 in ignored rows; in fp32 at least."""
    live = targets != ignore_index
    dtype = torch.promote_types(logits.dtype, torch.float32)
    z = torch.where(live[..., None], logits, 0.0).to(dtype) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    own = temperature.to(dtype)[..., None] if isinstance(temperature, Tensor) else temperature
    z = z / own
    log_p = F.log_softmax(z, -1)
    logprob = log_p.gather(-1, torch.where(live, targets, 0).long()[..., None])[..., 0]
    possible = torch.where(log_p == -torch.inf, 0.0, log_p)
    entropy = -(log_p.exp() * possible).sum(-1)
    return logprob * live, entropy * live, torch.logsumexp(z, -1) * live


def of_tokens(
    logits: Tensor,
    targets: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    l: Tensor | None = None,
    **transform: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """`plain_token_stats`, and the gradient of Σ g·logprob + h·entropy + l·lse in the dtype of the
    logits.
    """
    x = logits.detach().clone().requires_grad_()
    stats = plain_token_stats(x, targets, **transform)
    live = targets != transform.get("ignore_index", -100)
    total = sum(
        (torch.where(live, weight, 0.0).to(value.dtype) * value)[live].sum()
        for weight, value in zip((g, h, l), stats, strict=True)
        if weight is not None
    )
    (gradient,) = torch.autograd.grad(total, x)
    return tuple(value.detach() for value in stats), gradient


def plain_divergence(
    logits: Tensor,
    ref: Tensor,
    *,
    direction: str = "reverse",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`kl_divergence` of rows, in fp32 at least; what a side rules out does not count for it."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, ref.dtype), torch.float32)

    def log_softmax(x: Tensor) -> Tensor:
        z = x.to(dtype) * scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        own = temperature.to(dtype)[..., None] if isinstance(temperature, Tensor) else temperature
        return F.log_softmax(z / own, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        possible = a > -torch.inf
        difference = torch.where(possible, a, 0.0) - torch.where(possible, b, 0.0)
        return (a.exp() * difference).sum(-1)

    log_p, log_q = log_softmax(logits), log_softmax(ref)
    if direction != "jsd":
        return kl(log_p, log_q) if direction == "reverse" else kl(log_q, log_p)
    possible = (log_p > -torch.inf) | (log_q > -torch.inf)
    log_m = torch.logaddexp(
        torch.where(possible, log_p, 0.0) + math.log(1 - beta),
        torch.where(possible, log_q, 0.0) + math.log(beta),
    )
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def of_rows(
    logits: Tensor, ref: Tensor, mask: Tensor | None, g: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_divergence`, and the gradients of Σ g·value; 0 in rows off the mask."""
    live = torch.ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    live = live.to(logits.device)
    sides = [x.detach().clone().requires_grad_() for x in (logits, ref)]
    values = plain_divergence(*(torch.where(live[..., None], x, 0.0) for x in sides), **options)
    values = torch.where(live, values, 0.0)
    upstream = torch.ones_like(values) if g is None else torch.where(live, g.to(values), 0.0)
    return values.detach(), *torch.autograd.grad(values, sides, upstream)
