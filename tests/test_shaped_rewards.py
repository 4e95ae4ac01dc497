"""shaped_rewards against its formula in 150 digits."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advantage_cases import (
    FINE,
    GARBAGE,
    HALF,
    MASKS,
    SHAPED_MASK,
    expected_rewards,
    to_shape,
)
from torch import Tensor

from fastrlhf import shaped_rewards

ESTIMATORS = ["k1", "k2", "k3", "abs"]


@FINE
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kl_coef", [0.05, 0, 2.0])
@pytest.mark.parametrize("gap", [1.0, 1e-3], ids=["far from the reference", "close to it"])
def test_rewards_are_the_penalty_and_at_the_last_token_the_score(
    gap: float, kl_coef: float, estimator: str, dtype: torch.dtype
) -> None:
    inputs = to_shape(dtype, gap=gap)
    found = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=kl_coef, kl_estimator=estimator)
    assert found.dtype == dtype and found.shape == SHAPED_MASK.shape
    expected_rewards(*inputs, kl_coef, estimator).assert_losses(found[SHAPED_MASK])
    assert (found[~SHAPED_MASK] == 0).all()


def test_an_example_of_shaping_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, 7.0, -2.0, 7.0], [-2.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    found = shaped_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, mask, kl_coef=0.5)
    # The penalty k1 is ln π - ln ref: 0.5 and -1; and 1.
    assert found.tolist() == [[-0.25, 0, 10.5, 0], [19.5, 0, 0, 0]]


@GARBAGE
@MASKS
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_garbage_changes_no_bit_of_the_rewards(
    estimator: str, mask_dtype: torch.dtype, garbage: float
) -> None:
    dirty = to_shape(torch.float32, garbage)
    clean = [torch.where(SHAPED_MASK, x, 0.0) for x in dirty[1:]]
    scores = torch.where(SHAPED_MASK.any(1), dirty[0], 0.0)
    options = {"kl_coef": 0.1, "kl_estimator": estimator}
    found = shaped_rewards(*dirty, SHAPED_MASK.to(mask_dtype), **options)
    assert torch.equal(found, shaped_rewards(scores, *clean, SHAPED_MASK, **options))


def test_a_nan_that_counts_is_not_hidden() -> None:
    scores, logprobs, ref = to_shape(torch.float32)
    clean = shaped_rewards(scores, logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    scores[0] = logprobs[1, 1] = ref[5, 0] = math.nan
    found = shaped_rewards(scores, logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    assert found.isnan().nonzero().tolist() == [[0, 4], [1, 1], [5, 0]]
    assert torch.equal(torch.where(found.isnan(), clean, found), clean)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_each_sequence_with_tokens_gets_its_score_once_and_at_its_last(
    rows: list[list[bool]],
) -> None:
    zeros, scores = torch.zeros(len(rows), 9), 1 + torch.arange(len(rows))
    found = shaped_rewards(scores.float(), zeros, zeros, torch.tensor(rows), kl_coef=1.0)
    for score, row, rewards in zip(scores.tolist(), rows, found.tolist(), strict=True):
        last = max((t for t, keep in enumerate(row) if keep), default=None)
        assert rewards == [score if t == last else 0 for t in range(9)]


def test_k1_is_what_is_meant_unless_another_is_named() -> None:
    inputs = to_shape(torch.float32)
    found = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1)
    k1 = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1, kl_estimator="k1")
    assert torch.equal(found, k1)


def test_rewards_are_constants_of_the_training_step() -> None:
    inputs = [x.requires_grad_() for x in to_shape(torch.float32)]
    assert not shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1).requires_grad


@HALF
def test_half_precision_is_shaped_in_fp32(dtype: torch.dtype) -> None:
    inputs = to_shape(dtype)
    found = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1, kl_estimator="k3")
    assert found.dtype == torch.float32
    wide = [x.float() for x in inputs]
    assert torch.equal(found, shaped_rewards(*wide, SHAPED_MASK, kl_coef=0.1, kl_estimator="k3"))


@pytest.mark.parametrize("scores_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_the_log_probs(scores_dtype: torch.dtype) -> None:
    scores, logprobs, ref = to_shape(torch.float32)
    scores = scores.bfloat16()
    expected = shaped_rewards(scores.float(), logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    found = shaped_rewards(scores.to(scores_dtype), logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_without_tokens_there_are_no_rewards(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape)
    assert shaped_rewards(torch.ones(shape[0]), empty, empty, empty, kl_coef=0.1).shape == shape


def _score_at(mask: Tensor) -> Callable[..., Tensor]:
    """Put the score where the mask ends that somebody else took for that of the completion."""

    def mutant(scores: Tensor, logprobs: Tensor, ref: Tensor) -> Tensor:
        nothing = torch.zeros_like(scores)
        penalty = shaped_rewards(nothing, logprobs, ref, SHAPED_MASK, kl_coef=0.1)
        zeros = torch.zeros_like(logprobs)
        return penalty + shaped_rewards(scores, zeros, zeros, mask, kl_coef=0.0)

    return mutant


SHAPING_MUTANTS: dict[str, Callable[..., Tensor]] = {
    "score at the last column": _score_at(torch.ones_like(SHAPED_MASK)),
    "score at the number of tokens": _score_at(torch.arange(5) < SHAPED_MASK.sum(1, keepdim=True)),
    "score at the first token": _score_at(SHAPED_MASK & (SHAPED_MASK.cumsum(1) == 1)),
    "score everywhere": lambda s, lp, ref: (
        shaped_rewards(0 * s, lp, ref, SHAPED_MASK, kl_coef=0.1) + s[:, None]
    ),
    "no score": lambda s, lp, ref: shaped_rewards(0 * s, lp, ref, SHAPED_MASK, kl_coef=0.1),
    "sign": lambda s, lp, ref: shaped_rewards(s, lp, ref, SHAPED_MASK, kl_coef=-0.1),
    "policies swapped": lambda s, lp, ref: shaped_rewards(s, ref, lp, SHAPED_MASK, kl_coef=0.1),
    "k3": lambda s, lp, ref: shaped_rewards(
        s, lp, ref, SHAPED_MASK, kl_coef=0.1, kl_estimator="k3"
    ),
    "coefficient off": lambda s, lp, ref: shaped_rewards(
        s, lp, ref, SHAPED_MASK, kl_coef=0.1 * (1 + 1e-4)
    ),
    "rounded": lambda s, lp, ref: shaped_rewards(
        s, lp.bfloat16(), ref.bfloat16(), SHAPED_MASK, kl_coef=0.1
    ),
}


@pytest.mark.parametrize("mutant", SHAPING_MUTANTS)
def test_the_comparison_of_fp32_rewards_rejects(mutant: str) -> None:
    inputs = to_shape(torch.float32, garbage=0.0)
    expected = expected_rewards(*inputs, 0.1, "k1")
    expected.assert_losses(shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1)[SHAPED_MASK])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(SHAPING_MUTANTS[mutant](*inputs)[SHAPED_MASK])
