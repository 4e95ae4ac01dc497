"""Every public function names the argument that does not fit, whatever is wrong with it."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrlhf
from fastrlhf import LMHead

B, T, H, V = 2, 3, 4, 5
IDS, MASK = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.ones(B, T)
LOGITS, HIDDEN, WEIGHT = torch.randn(B, T, V), torch.randn(B, T, H), torch.randn(V, H)
LP, SUMS, PAIR = -torch.rand(B, T), -torch.rand(B), (torch.tensor([0]), torch.tensor([1]))
PARAMETER = torch.randn(T, V, requires_grad=True)
PAIRS = {"yw_idxs": PAIR[0], "yl_idxs": PAIR[1]}
POLICY = {"old_logprobs": LP, "advantages": torch.ones(B), "mask": MASK}

# Arguments of each function, all of them good.
CALLS = {
    "token_stats": {"logits": LOGITS, "targets": IDS},
    "token_logprobs": {"logits": LOGITS, "targets": IDS},
    "linear_token_stats": {"hidden": HIDDEN, "weight": WEIGHT, "targets": IDS},
    "linear_token_logprobs": {"hidden": HIDDEN, "weight": WEIGHT, "targets": IDS},
    "kl_divergence": {"logits": LOGITS, "ref_logits": LOGITS},
    "linear_kl_divergence": {
        "hidden": HIDDEN, "weight": WEIGHT, "ref_hidden": HIDDEN, "ref_weight": WEIGHT,
    },
    "softmax_fisher_product": {"logits": LOGITS, "tangent": LOGITS},
    "linear_softmax_fisher_product": {"hidden": HIDDEN, "weight": WEIGHT, "tangent": HIDDEN},
    "dpo_loss": {"pi_logps": SUMS, "ref_logps": SUMS, **PAIRS},
    "linear_dpo_loss": {
        "hidden": HIDDEN, "weight": WEIGHT, "targets": IDS, "ref_logps": SUMS, **PAIRS,
    },
    "simpo_loss": {"logps": SUMS, "lengths": torch.tensor([3, 3]), **PAIRS},
    "cpo_loss": {"logps": SUMS, **PAIRS},
    "orpo_loss": {"logps": SUMS, "lengths": torch.tensor([3, 3]), **PAIRS},
    "kto_loss": {
        "pi_logps": SUMS, "ref_logps": SUMS, "desirable": torch.tensor([True, False]), "kl": 0.1,
    },
    "sequence_logprobs": {"token_logprobs": LP, "mask": MASK},
    "policy_loss": {"logprobs": LP, **POLICY},
    "ppo_loss": {"logprobs": LP, **POLICY},
    "grpo_loss": {"logprobs": LP, **POLICY},
    "logits_policy_loss": {"logits": LOGITS, "targets": IDS, **POLICY},
    "linear_policy_loss": {"hidden": HIDDEN, "weight": WEIGHT, "targets": IDS, **POLICY},
    "value_loss": {"values": LP, "old_values": LP, "returns": LP, "mask": MASK},
    "gae": {"rewards": LP, "values": LP, "mask": MASK},
    "whiten": {"x": LP, "mask": MASK},
    "shaped_rewards": {
        "scores": SUMS, "logprobs": LP, "ref_logprobs": LP, "mask": MASK, "kl_coef": 0.1,
    },
    "group_advantages": {"rewards": SUMS, "groups": torch.tensor([0, 0])},
    "kl_penalty": {"logprobs": LP, "ref_logprobs": LP},
    "reward_loss": {"chosen_scores": SUMS, "rejected_scores": SUMS},
    "plackett_luce_loss": {
        "scores": SUMS, "groups": torch.tensor([0, 0]), "ranks": torch.tensor([0, 1]),
    },
    "shift_targets": {"input_ids": IDS},
    "conjugate_gradient": {"operator": lambda v: v, "target": SUMS},
    "fisher_vector_product": {
        "policy": lambda: PARAMETER, "params": [PARAMETER], "vector": torch.ones(T * V),
    },
    "trpo_step": {
        "policy": lambda: PARAMETER * 1, "params": [PARAMETER], "targets": IDS[0],
        "advantages": torch.ones(T), "mask": MASK[0],
    },
}  # fmt: skip

# Options that functions take by way of **keywords.
POLICY_OPTIONS = {
    "surrogate": "clip", "ratio_level": "token", "clip_low": 0.2, "clip_high": 0.2,
    "dual_clip": None, "kl_coef": 0.0, "kl_estimator": "k3", "entropy_coef": 0.0,
    "reduction": "token-mean", "normalizer": None,
}  # fmt: skip
WRONG = {
    "text": "yes", "list": [0.5], "dict": {"a": 1}, "NaN": float("nan"), "object": object(),
    "sparse": torch.eye(3).to_sparse(), "complex": torch.ones(B, T, dtype=torch.complex64),
    "5-d": torch.ones(1, 1, 1, 1, 1),
}  # fmt: skip


def _options(name: str) -> dict[str, object]:
    """The options of a function with their defaults."""
    parameters = inspect.signature(getattr(fastrlhf, name)).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        found |= {k: v for k, v in POLICY_OPTIONS.items() if (name, k) != ("ppo_loss", "surrogate")}
    return found


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments_are_taken(name) -> None:
    getattr(fastrlhf, name)(**CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_is_named(name) -> None:
    function, good = getattr(fastrlhf, name), CALLS[name]
    argument_names = {*good, *_options(name), "labels"}
    for argument in (*good, *_options(name)):
        for kind, value in WRONG.items():
            try:
                function(**{**good, argument: value})
            except (TypeError, ValueError) as error:
                named = re.match(r"^([a-z_]+)(\[\d+\])?: ", str(error))
                assert named and named[1] in argument_names, (argument, kind, str(error))
            except Exception as error:
                raise AssertionError((argument, kind, repr(error))) from error
            else:
                # Of tensors, what they hold is the caller's; of numbers, nothing is taken.
                assert isinstance(value, Tensor) or _harmless(name, argument), (argument, kind)


def _harmless(name: str, argument: str) -> bool:
    """Whether an option is not looked at, given the others."""
    return (name, argument) in {
        ("linear_dpo_loss", "gamma"), ("linear_dpo_loss", "alpha"), ("trpo_step", "head"),
        ("dpo_loss", "lengths"),
    }  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_those_of_python_or_numpy_and_not_booleans(name) -> None:
    function, good = getattr(fastrlhf, name), CALLS[name]
    for option, default in _options(name).items():
        if isinstance(default, bool) or not isinstance(default, (int, float)):
            continue
        if name == "linear_dpo_loss" and option in ("gamma", "alpha"):
            continue
        kind = np.int64 if isinstance(default, int) else np.float64
        function(**{**good, option: kind(default)})
        with pytest.raises(TypeError, match=f"^{option}: "):
            function(**{**good, option: True})


def test_a_head_is_what_lm_head_returns() -> None:
    good = CALLS["fisher_vector_product"]
    with pytest.raises(TypeError, match=r"^head: expected an LMHead or None, got int"):
        fastrlhf.fisher_vector_product(**{**good, "head": 3})
    head = LMHead(WEIGHT, None, 1.0, None)
    hidden = torch.randn(T, H, requires_grad=True)
    fastrlhf.fisher_vector_product(lambda: hidden * 1, [hidden], torch.ones(T * H), head=head)


@pytest.mark.parametrize("lengths", [torch.tensor([-1, 3]), torch.tensor([torch.nan, 3])])
def test_lengths_are_counts(lengths) -> None:
    for call in (fastrlhf.simpo_loss, fastrlhf.orpo_loss):
        with pytest.raises(ValueError, match=r"^lengths: expected numbers of at least 0"):
            call(SUMS, lengths, *PAIR)
    with pytest.raises(ValueError, match=r"^lengths: "):
        fastrlhf.dpo_loss(SUMS, SUMS, *PAIR, loss_type="ipo", lengths=lengths)
