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
TEACHER = {"teacher_logprobs": LOGITS.log_softmax(-1)[..., :1], "teacher_ids": IDS[..., None] * 0}
PARAMETER = torch.randn(T, V, requires_grad=True)
PAIRS = {"yw_idxs": PAIR[0], "yl_idxs": PAIR[1]}
POLICY = {"old_logprobs": LP, "advantages": torch.ones(B), "mask": MASK}

# Arguments of each function, all of them good.
CALLS = {
    "token_stats": {"logits": LOGITS, "targets": IDS},
    "token_logprobs": {"logits": LOGITS, "targets": IDS},
    "cross_entropy": {"logits": LOGITS, "targets": IDS},
    "linear_token_stats": {"hidden": HIDDEN, "weight": WEIGHT, "targets": IDS},
    "linear_token_logprobs": {"hidden": HIDDEN, "weight": WEIGHT, "targets": IDS},
    "kl_divergence": {"logits": LOGITS, "ref_logits": LOGITS},
    "linear_kl_divergence": {
        "hidden": HIDDEN, "weight": WEIGHT, "ref_hidden": HIDDEN, "ref_weight": WEIGHT,
    },
    "topk_kl_divergence": {"logits": LOGITS, **TEACHER},
    "linear_topk_kl_divergence": {"hidden": HIDDEN, "weight": WEIGHT, **TEACHER},
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
    "linear_kto_loss": {
        "hidden": HIDDEN, "weight": WEIGHT, "targets": IDS, "ref_logps": SUMS,
        "desirable": torch.tensor([True, False]), "kl": 0.1,
    },
    "kto_kl": {"pi_logps": SUMS, "ref_logps": SUMS},
    "tpo_loss": {"logps": SUMS, **PAIRS, "gold_idxs": PAIR[0]},
    "wpo_weights": {"logprobs": LP, "mask": MASK},
    "plackett_luce_dpo_loss": {
        "pi_logps": SUMS, "ref_logps": SUMS, "groups": torch.tensor([0, 0]),
        "ranks": torch.tensor([0, 1]),
    },
    "ranked_pairs": {"groups": torch.tensor([0, 0]), "ranks": torch.tensor([0, 1])},
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
    "global_normalizer": {"mask": MASK},
    "group_advantages": {"rewards": SUMS, "groups": torch.tensor([0, 0])},
    "rollout_correction": {"logprobs": LP, "rollout_logprobs": LP, "mask": MASK},
    "rollout_metrics": {"logprobs": LP, "rollout_logprobs": LP, "mask": MASK},
    "rollout_rejection": {"logprobs": LP, "rollout_logprobs": LP, "mask": MASK, "upper": 0.1},
    "top_entropy_mask": {"entropy": -LP, "mask": MASK},
    "clip_cov_mask": {"logprobs": LP, "advantages": torch.ones(B), "mask": MASK},
    "kl_cov_mask": {"logprobs": LP, "advantages": torch.ones(B), "mask": MASK},
    "gdpo_advantages": {"rewards": LP, "groups": torch.tensor([0, 0])},
    "pf_ppo_weights": {"scores": SUMS},
    "monte_carlo_returns": {"rewards": LP, "mask": MASK},
    "outcome_rewards": {"scores": SUMS, "mask": MASK},
    "length_adaptive_lambda": {"lengths": torch.tensor([3, 3])},
    "kl_penalty": {"logprobs": LP, "ref_logprobs": LP},
    "reward_loss": {"chosen_scores": SUMS, "rejected_scores": SUMS},
    "process_reward_loss": {"scores": LP, "labels": MASK, "mask": MASK},
    "process_reward_scores": {"scores": LP, "mask": MASK},
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
DPO_OPTIONS = {
    "loss_type": "sigmoid", "loss_weights": None, "label_smoothing": 0.0, "discopop_tau": 0.05,
    "rpo_alpha": 0.0, "dpop_lambda": 0.0, "reference_free": False, "average": False,
    "f_divergence": "reverse_kl", "f_alpha": 0.5, "ld_alpha": None, "use_weighting": False,
}  # fmt: skip
OPTIONS_OF = {
    "dpo_loss": DPO_OPTIONS,
    "linear_dpo_loss": {**DPO_OPTIONS, "gamma": 0.5, "alpha": 1.0},
    "linear_kto_loss": {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
}
WRONG = {
    "text": "yes", "list": [0.5], "dict": {"a": 1}, "NaN": float("nan"), "object": object(),
    "sparse": torch.eye(3).to_sparse(), "complex": torch.ones(B, T, dtype=torch.complex64),
    "5-d": torch.ones(1, 1, 1, 1, 1),
}  # fmt: skip


def _options(name: str) -> dict[str, object]:
    """The options of a function with their defaults."""
    parameters = inspect.signature(getattr(fastrlhf, name)).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    if name in OPTIONS_OF:
        found |= OPTIONS_OF[name]
    elif any(p.kind is p.VAR_KEYWORD for p in parameters):
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
    """Whether an option is not looked at, given the others, or one of the values is a right one."""
    return (name, argument) == ("trpo_step", "head") or argument == "loss_weights"


@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_those_of_python_or_numpy_and_not_booleans(name) -> None:
    function, good = getattr(fastrlhf, name), CALLS[name]
    for option, default in _options(name).items():
        if isinstance(default, bool) or not isinstance(default, (int, float)):
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


@pytest.mark.parametrize("wrong", [-1, torch.nan, torch.inf, 0.5])
def test_lengths_are_counts(wrong) -> None:
    lengths = torch.tensor([wrong, 3])
    for call in (fastrlhf.simpo_loss, fastrlhf.orpo_loss):
        with pytest.raises(ValueError, match=r"^lengths: expected whole numbers of at least 0"):
            call(SUMS, lengths, *PAIR)
    for loss_type in ("ipo", "sigmoid"):  # whether the type looks at them or not
        with pytest.raises(ValueError, match=r"^lengths: "):
            fastrlhf.dpo_loss(SUMS, SUMS, *PAIR, loss_type=loss_type, lengths=lengths)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "cpo"])
@pytest.mark.parametrize("option", ["gamma", "alpha", "discopop_tau", "label_smoothing"])
def test_options_that_a_loss_does_not_look_at_are_checked_too(option, loss_type) -> None:
    good = {**CALLS["linear_dpo_loss"], "loss_type": loss_type}
    if loss_type != "sigmoid":
        good["ref_logps"] = None
    fastrlhf.linear_dpo_loss(**good)
    with pytest.raises(ValueError, match=f"^{option}: "):
        fastrlhf.linear_dpo_loss(**good, **{option: float("nan")})


@pytest.mark.parametrize("name", CALLS)
def test_no_number_is_too_large_to_be_named(name) -> None:
    for option, default in _options(name).items():
        if isinstance(default, float) or option == "ignore_index":
            with pytest.raises(ValueError, match=f"^{option}: "):
                getattr(fastrlhf, name)(**{**CALLS[name], option: 10**400})


@pytest.mark.parametrize("value", [1e39, 1e-39, float("inf")])
@pytest.mark.parametrize("option", ["temperature", "softcap", "scale"])
def test_a_factor_of_logits_is_one_that_they_can_be_multiplied_by(option, value) -> None:
    with pytest.raises(ValueError, match=f"^{option}: "):
        fastrlhf.token_logprobs(LOGITS, IDS, **{option: value})
    with pytest.raises(ValueError, match=r"^temperature: expected positive finite"):
        fastrlhf.token_logprobs(LOGITS, IDS, temperature=torch.tensor([1.0, torch.inf]))


def test_a_step_has_targets_wherever_its_mask_is_set() -> None:
    good = CALLS["trpo_step"]
    with pytest.raises(ValueError, match=r"^targets: expected indices in .* got -100$"):
        fastrlhf.trpo_step(**{**good, "targets": torch.tensor([1, -100, 2])})


@pytest.mark.parametrize(
    "operator",
    [lambda v: None, lambda v: v[:, None], lambda v: v.sum(), lambda v: v.int(), lambda v: [v]],
)
def test_an_operator_makes_a_vector_of_a_vector(operator) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^operator\(x\): "):
        fastrlhf.conjugate_gradient(operator, torch.tensor([1.0, 2.0]))


def test_an_operator_may_write_into_its_vector() -> None:
    x, residual = fastrlhf.conjugate_gradient(lambda v: v.mul_(2), torch.tensor([1.0, 2.0]))
    assert torch.equal(x, torch.tensor([0.5, 1.0])) and residual == 0


def test_a_loss_of_chunks_is_a_function_of_dense_tensors() -> None:
    head = CALLS["linear_token_stats"]
    with pytest.raises(TypeError, match=r"^loss_fn: expected a function, got str"):
        fastrlhf.linear_loss("nll", *head.values())
    with pytest.raises(TypeError, match=r"^side_inputs\[0\]: expected a dense tensor"):
        fastrlhf.linear_loss(lambda stats, _: stats.logprob.sum(), *head.values(), MASK.to_sparse())


@pytest.mark.parametrize("weight", [WEIGHT.T, WEIGHT[None], WEIGHT[:0], WEIGHT[0]])
def test_a_wrong_head_of_a_policy_is_not_blamed_on_its_targets(weight) -> None:
    with pytest.raises(ValueError, match=r"^(weight|hidden): "):
        fastrlhf.linear_policy_loss(**{**CALLS["linear_policy_loss"], "weight": weight})
