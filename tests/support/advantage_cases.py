"""Dtypes, masks and garbage with which whiten, shaped_rewards and group_advantages are tested, and
what shaped rewards must be.
"""

import math
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from support.preference_formulas import Expectation

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
MASKS = pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str
)
GARBAGE = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])

# Holes, trailing padding, both, a single token, no token, every token.
SHAPED_MASK = torch.tensor(
    [
        [1, 0, 1, 0, 1],
        [1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ],
    dtype=torch.bool,
)
LAST = [4, 2, 3, 1, None, 4]
PENALTIES: dict[str, Callable[[Decimal], Decimal]] = {
    "k1": lambda x: -x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: x.exp() - 1 - x,
    "abs": abs,
}


def to_shape(
    dtype: torch.dtype, garbage: float = math.nan, gap: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, and log-probs under the policy and the reference; garbage where nothing counts."""
    logprobs = -4 * torch.rand(SHAPED_MASK.shape, dtype=torch.float64)
    ref = logprobs + gap * torch.randn(SHAPED_MASK.shape, dtype=torch.float64)
    logprobs, ref = (torch.where(SHAPED_MASK, x, garbage).to(dtype) for x in (logprobs, ref))
    scores = torch.where(SHAPED_MASK.any(1), torch.randn(6), garbage).to(dtype)
    return scores, logprobs, ref


def expected_rewards(
    scores: Tensor, logprobs: Tensor, ref: Tensor, kl_coef: float, estimator: str
) -> Expectation:
    """What `shaped_rewards` must give the tokens of SHAPED_MASK, in order."""
    places = SHAPED_MASK.nonzero().tolist()
    count = len(places)

    def rewards_of(inputs: list[Decimal]) -> list[Decimal]:
        rewards = []
        for i, (sequence, token) in enumerate(places):
            x = inputs[count + i] - inputs[i]
            last = token == LAST[sequence]
            score = inputs[2 * count + sequence] if last else 0
            rewards.append(-Decimal(kl_coef) * PENALTIES[estimator](x) + score)
        return rewards

    scored = torch.where(SHAPED_MASK.any(1), scores, 0.0)
    inputs = [*logprobs[SHAPED_MASK].tolist(), *ref[SHAPED_MASK].tolist(), *scored.tolist()]
    return Expectation(rewards_of, [Decimal(x) for x in inputs])
