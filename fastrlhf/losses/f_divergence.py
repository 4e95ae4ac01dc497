"""The score of a sequence where another divergence than the reverse KL keeps policy and reference
together: f-DPO.

`pair_scores.py` and `preference.py` call `f_score`; the option is checked in
`preference_options.py`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastrlhf.losses.ratios import saturated
from fastrlhf.reference import expm1, log_to_mixture

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
F_DIVERGENCES: tuple[str, ...] = get_args(FDivergence)


def f_score(s: Tensor, divergence: str, alpha: float) -> Tensor:
    """Compute f'(u) - f'(1), with u = e^s the ratio of policy and reference: 2309.16240.

    The constant f'(1) makes the score of a ratio of 1 zero; the difference of two scores is free of
    it. "reverse_kl" ln u, "forward_kl" 1 - 1/u, "js" ln(2u / (1 + u)), "alpha" (1 - u^-α)/α, which
    goes from the reverse KL at α → 0 to the forward KL at 1. 1/u does not grow beyond e^80 (e^700
    in fp64), and keeps the slope that it has there: so the loss of a pair that is won by far has
    gradient 0, and not NaN.
    """
    if divergence == "reverse_kl":
        return s
    if divergence == "js":
        return -log_to_mixture(-s, 0.5, 0.5)  # of u and 1 in equal shares
    rate = 1.0 if divergence == "forward_kl" else alpha
    exponent = -rate * s
    end = torch.where(exponent == torch.inf, 0.0, exponent - exponent.detach())
    return -expm1(saturated(exponent).detach() + end) / rate
