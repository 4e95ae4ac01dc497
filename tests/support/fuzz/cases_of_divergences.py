"""Cases of divergences, and of products with the Fisher information."""

from typing import Any

from torch import Tensor

import fastrlhf

from . import formulas as f
from .draw import DTYPES, Draw
from .judge import Case
from .shared import (
    coldest,
    head,
    head_reach,
    head_terms,
    no_infinities,
    reach,
    steepness,
    subset,
    tokens,
    vocabulary,
)


def divergence_options(d: Draw, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        **d.transform(*shape),
        "direction": d.of("reverse", "forward", "jsd"),
        "beta": d.of(0.5, 0.1, 0.9, 0, 1),
    }


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
