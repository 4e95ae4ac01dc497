"""Cases of policy losses."""

from typing import Any

import torch
from torch import Tensor

import fastrlhf
from support.policy_formulas import ESTIMATORS, FORMS

from . import formulas as f
from .draw import DTYPES, Draw
from .judge import Case
from .shared import finite_max, head, head_reach, head_terms, largest, reach, steepness, subset


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
