"""Errors of TRPO's steps and products name the argument."""

import math

import pytest
import torch
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from support.trpo_problems import MODES, VOCAB, B, Batch, T, flat

from fastrlhf import fisher_vector_product
from fastrlhf.hf import LMHead


def bad_arguments() -> dict:
    batch = Batch("cpu")
    weight = torch.zeros(VOCAB, VOCAB, dtype=torch.float64, requires_grad=True)
    float_targets = batch.targets.double()
    constant = batch.policy().detach()
    return {
        "policy without a gradient": (TypeError, "policy: ", {"policy": lambda: constant}),
        "policy of a tuple": (TypeError, "policy: ", {"policy": lambda: (batch.policy(),)}),
        "policy of other shape": (
            ValueError,
            r"policy: .*\(3, 4\).*\(3, 3, 7\)",
            {"policy": lambda: batch.policy()[:, :3]},
        ),
        "no params": (ValueError, "params: ", {"params": []}),
        "frozen params": (ValueError, "params: .*leaves", {"params": [constant]}),
        "params that are no leaves": (
            ValueError,
            "params: .*leaves",
            {"params": [2 * p for p in batch.params]},
        ),
        "head among params": (
            ValueError,
            "head: ",
            {"params": [*batch.params, weight], "head": LMHead(weight, None, 1.0, None)},
        ),
        "mode": (ValueError, "mode: .*'backward'", {"mode": "backward"}),
        "floating targets": (TypeError, "targets: .*integer", {"targets": float_targets}),
        "complex advantages": (
            TypeError,
            "advantages: .*real",
            {"advantages": batch.advantages.cfloat()},
        ),
        "shape of advantages": (
            ValueError,
            r"advantages: .*\(3, 4\).*\(4,\)",
            {"advantages": torch.zeros(T)},
        ),
        "shape of the mask": (ValueError, r"mask: .*\(3, 4\)", {"mask": torch.ones(B)}),
        "device of the mask": (ValueError, "mask: .*meta", {"mask": batch.mask.to("meta")}),
        "shape of old_logprobs": (
            ValueError,
            r"old_logprobs: .*\(3, 4\)",
            {"old_logprobs": torch.zeros(B)},
        ),
        "integer old_logprobs": (TypeError, "old_logprobs: ", {"old_logprobs": batch.targets}),
        "max_kl": (ValueError, "max_kl: .*positive", {"max_kl": 0.0}),
        "damping": (ValueError, "damping: ", {"damping": -0.1}),
        "NaN as damping": (ValueError, "damping: ", {"damping": math.nan}),
        "cg_iterations": (ValueError, "cg_iterations: ", {"cg_iterations": 0}),
        "backtrack_ratio": (ValueError, "backtrack_ratio: ", {"backtrack_ratio": 1.5}),
        "max_backtracks": (ValueError, "max_backtracks: ", {"max_backtracks": -1}),
        "temperature": (ValueError, "temperature: .*positive", {"temperature": 0.0}),
    }


@pytest.mark.parametrize("case", bad_arguments())
def test_bad_arguments_of_a_step_are_named(case) -> None:
    error, message, options = bad_arguments()[case]
    batch = Batch("cpu")
    with pytest.raises(error, match=f"^{message}"):
        batch.step(**options)


def bad_products() -> dict:
    batch = Batch("cpu")
    size = flat(batch.params).numel()
    constant = batch.policy().detach()
    return {
        "size": (ValueError, "vector: ", {"vector": torch.zeros(size + 1)}),
        "shape": (ValueError, "vector: ", {"vector": torch.zeros(size, 1)}),
        "dtype": (TypeError, "vector: ", {"vector": torch.zeros(size, dtype=torch.long)}),
        "mask": (ValueError, r"mask: .*\(3, 4\)", {"mask": torch.ones(T)}),
        "temperature": (ValueError, "temperature: .*positive", {"temperature": -1.0}),
        "policy of a tuple": (TypeError, "policy: ", {"policy": lambda: (batch.policy(),)}),
        "policy of a constant": (
            (TypeError, ValueError),
            "(policy|params): ",
            {"policy": lambda: constant},
        ),
    }


@pytest.mark.parametrize("case", bad_products())
@pytest.mark.parametrize("mode", MODES)
def test_bad_arguments_of_a_product_are_named(case, mode) -> None:
    error, message, options = bad_products()[case]
    batch = Batch("cpu")
    plain = {"policy": batch.policy, "params": batch.params, "vector": flat(batch.params)}
    with pytest.raises(error, match=f"^{message}"):
        fisher_vector_product(**plain | options, mode=mode)


def test_a_tensor_can_stand_for_params_only_in_a_list() -> None:
    batch = Batch("cpu")
    with pytest.raises((TypeError, ValueError), match=r"^params: "):
        fisher_vector_product(batch.policy, batch.params[0], flat(batch.params))
