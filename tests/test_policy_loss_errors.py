"""Errors of policy_loss and its recipes name the argument."""

import math
from typing import Any

import pytest
import torch
from support.policy_batches import batch

from fastrlhf import grpo_loss, kl_penalty, policy_loss, ppo_loss


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"surrogate": "gmpo"}, ValueError, "ratio_level: expected 'sequence' for surrogate"),
        ({"surrogate": "dppo_tv", "ratio_level": "product"}, ValueError, "ratio_level: .*'token'"),
        ({"vespo_shape": (1.0, 2.0)}, ValueError, "vespo_shape: expected four"),
        ({"kl_reference": "both"}, ValueError, "kl_reference: expected one of ref, old"),
        ({"kl_reference": "old"}, ValueError, "ref_logprobs: expected None for kl_reference"),
        (
            {"kl_reference": "old", "old_logprobs": None, "ref_logprobs": None},
            ValueError,
            "old_logprobs: expected a tensor for kl_reference",
        ),
        ({"kl_weights": torch.ones(4), "ref_logprobs": None}, ValueError, "kl_weights: .*None"),
        ({"kl_weights": torch.ones(3)}, ValueError, "kl_weights: expected shape"),
        ({"kl_bias_correction": 1}, TypeError, "kl_bias_correction: "),
        ({"surrogate": "cispo", "clip_high": -0.5, "ratio_floor": 0.6}, ValueError, "clip_high: "),
        ({"clip_high": -0.5}, ValueError, "clip_high: expected .*at least 0"),
        ({"ratio_floor": -1.0}, ValueError, "ratio_floor: expected"),
        ({"off_policy_mask_threshold": math.nan}, ValueError, "off_policy_mask_threshold: "),
        ({"reduction": "none", "normalizer": 3.0}, ValueError, "normalizer: .*'none'"),
        ({"surrogat": "clip"}, TypeError, "policy_loss: unexpected option 'surrogat'"),
        ({"surrogate": "ppo"}, ValueError, "surrogate: expected one of clip, .*'ppo'"),
        ({"ratio_level": "batch"}, ValueError, "ratio_level: .*'batch'"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected .*at least 0"),
        ({"clip_high": math.nan}, ValueError, "clip_high: expected"),
        ({"clip_high": "0.2"}, TypeError, "clip_high: expected a number, got str"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: expected more than 1"),
        ({"kl_coef": math.inf}, ValueError, "kl_coef: expected a finite"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of k1"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, ValueError, "ref_logprobs: .*kl_coef"),
        ({"entropy_coef": 0.1, "entropy": None}, ValueError, "entropy: .*entropy_coef"),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of token-mean"),
        ({"reduction": "constant"}, ValueError, "normalizer: .*'constant'"),
        ({"normalizer": 0}, ValueError, "normalizer: expected a positive"),
        ({"normalizer": torch.ones(4)}, ValueError, r"normalizer: .*0-d tensor, got \(4,\)"),
        ({"sapo_temperatures": (1.0,)}, ValueError, "sapo_temperatures: expected two"),
        ({"sapo_temperatures": (1.0, 0.0)}, ValueError, "sapo_temperatures: expected a positive"),
        ({"logprobs": [0.0]}, TypeError, "logprobs: expected a tensor"),
        ({"logprobs": torch.zeros(4, 5).long()}, TypeError, "logprobs: .*floating"),
        ({"logprobs": torch.zeros(4, 6)}, ValueError, r"mask: .*\(4, 6\).*got \(4, 5\)"),
        ({"logprobs": torch.zeros(5)}, ValueError, r"logprobs: .*\(B, T\).*got \(5,\)"),
        ({"old_logprobs": torch.zeros(4, 6)}, ValueError, "old_logprobs: expected shape"),
        ({"ref_logprobs": torch.zeros(4)}, ValueError, "ref_logprobs: expected shape"),
        ({"entropy": torch.zeros(5)}, ValueError, "entropy: expected shape"),
        ({"advantages": torch.zeros(5)}, ValueError, r"advantages: .*\(B,\)"),
        ({"advantages": 1.0}, TypeError, "advantages: expected a tensor, got float"),
        ({"rollout_weights": torch.zeros(2, 5)}, ValueError, "rollout_weights: expected shape"),
        ({"mask": None}, TypeError, "mask: expected a tensor"),
        ({"mask": torch.ones(5)}, ValueError, r"mask: .*\(4, 5\).*got \(5,\)"),
        ({"advantages": torch.zeros(4, 5, device="meta")}, ValueError, "advantages: expected on"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        policy_loss(**batch() | change)


def test_recipes_refuse_what_they_do_not_know() -> None:
    tensors = [batch()[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    with pytest.raises(ValueError, match=r"loss_type: expected one of grpo, .*'gpro'"):
        grpo_loss(*tensors, loss_type="gpro")
    with pytest.raises(ValueError, match="normalizer: expected a number"):
        grpo_loss(*tensors, loss_type="dr_grpo")
    with pytest.raises(TypeError, match="surrogate"):
        ppo_loss(*tensors, surrogate="plain")
    with pytest.raises(ValueError, match="estimator: expected one of"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k0")
