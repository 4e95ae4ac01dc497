"""shift_targets: targets aligned with the logits that predict them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrlhf import sequence_logprobs, shift_targets, token_logprobs

IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def shifted_in_python(ids: list[int], mask: list[int] | None, ignore_index: int) -> list[int]:
    """The targets of one sequence, position by position."""
    targets = []
    for position in range(len(ids)):
        following = position + 1
        scored = following < len(ids) and (mask is None or bool(mask[following]))
        targets.append(ids[following] if scored else ignore_index)
    return targets


def test_each_position_gets_the_token_that_follows_and_the_last_none() -> None:
    assert shift_targets(IDS).tolist() == [[6, 7, 8, -100], [2, 3, 4, -100]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_the_mask_marks_the_tokens_to_score_not_the_positions_that_predict_them(
    dtype: torch.dtype,
) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]]).to(dtype)
    expected = [[-100, 7, 8, -100], [2, -100, 4, -100]]
    assert shift_targets(IDS, mask).tolist() == expected


def test_what_is_not_scored_takes_the_ignore_index_given() -> None:
    mask = torch.tensor([[True, True, False, True]] * 2)
    assert shift_targets(IDS, mask, ignore_index=-1).tolist() == [[6, -1, 8, -1], [2, -1, 4, -1]]
    assert shift_targets(IDS, ignore_index=0).tolist() == [[6, 7, 8, 0], [2, 3, 4, 0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_targets_are_int64_for_any_ids(dtype: torch.dtype, masked: bool) -> None:
    mask = torch.ones(2, 4) if masked else None
    targets = shift_targets(IDS.to(dtype), mask)
    assert targets.dtype == torch.int64
    assert targets.tolist() == [[6, 7, 8, -100], [2, 3, 4, -100]]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (0, 4), (2, 1), (1,), (2, 0), (0,)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_shape_stays(shape: tuple[int, ...], masked: bool) -> None:
    ids = torch.randint(9, shape)
    targets = shift_targets(ids, torch.ones(shape, dtype=torch.bool) if masked else None)
    assert targets.shape == shape
    assert (targets[..., -1:] == -100).all()


def test_the_ids_are_left_alone() -> None:
    ids = IDS.clone()
    shift_targets(ids, torch.zeros(2, 4))
    assert torch.equal(ids, IDS)


def test_strides_do_not_matter() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
    expected = shift_targets(IDS, mask)
    assert torch.equal(shift_targets(IDS.t().contiguous().t(), mask.t().contiguous().t()), expected)
    same = torch.tensor([[0, 1, 1, 0]]).expand(2, 4)
    assert torch.equal(shift_targets(IDS, same), shift_targets(IDS, same.clone()))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data(), ignore_index=st.integers(-100, 3), masked=st.booleans())
def test_any_sequence_is_shifted_position_by_position(
    data: st.DataObject, ignore_index: int, masked: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    flags = st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))
    mask = data.draw(flags) if masked else None
    targets = shift_targets(
        torch.tensor(ids), None if mask is None else torch.tensor(mask), ignore_index=ignore_index
    )
    assert targets.tolist() == shifted_in_python(ids, mask, ignore_index)


def test_targets_score_the_completion_and_nothing_else() -> None:
    # A bigram model: the logits of a position depend on its token alone, so that the log-prob of a
    # completion can be read off a table, transition by transition.
    table = torch.randn(10, 10, dtype=torch.float64)
    completion = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    targets = shift_targets(IDS, completion)
    logprobs = token_logprobs(table[IDS], targets, impl="eager")
    scored = targets != -100
    found = sequence_logprobs(logprobs, scored)
    ln_p = table.log_softmax(-1)
    expected = torch.stack((ln_p[6, 7] + ln_p[7, 8], ln_p[1, 2] + ln_p[2, 3]))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    # The mask of the log-probs is the completion, one position earlier.
    assert torch.equal(scored[:, :-1], completion[:, 1:] != 0) and not scored[:, -1].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2],), TypeError, "input_ids: expected a tensor, got list"),
        ((IDS.float(),), TypeError, "input_ids: .*integer.*float32"),
        ((IDS > 2,), TypeError, "input_ids: .*integer.*bool"),
        ((torch.tensor(3),), ValueError, r"input_ids: expected shape \(..., T\), got \(\)"),
        ((IDS, [1, 1]), TypeError, "mask: expected a tensor, got list"),
        ((IDS, torch.ones(2, 4, dtype=torch.complex64)), TypeError, "mask: .*boolean or 0/1"),
        ((IDS, torch.ones(2, 3)), ValueError, r"mask: .*\(2, 4\).*got \(2, 3\)"),
        ((IDS, torch.ones(4)), ValueError, r"mask: .*\(2, 4\).*got \(4,\)"),
        ((IDS, torch.ones(2, 4, device="meta")), ValueError, "mask: expected on cpu"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shift_targets(*arguments)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda ids, mask: torch.where(mask != 0, ids, -100),
        lambda ids, mask: torch.where(mask != 0, ids.roll(-1, -1), -100),
        lambda ids, mask: shift_targets(ids),
        lambda ids, mask: shift_targets(ids, 1 - mask),
        lambda ids, mask: torch.where(mask.roll(-1, -1) != 0, ids.roll(-1, -1), -100),
    ],
    ids=["unshifted", "mask unshifted", "mask ignored", "mask inverted", "wrapped around"],
)
def test_the_python_shift_tells_it_from(mutant: Any) -> None:
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]])
    expected = [
        shifted_in_python(*rows, -100) for rows in zip(IDS.tolist(), mask.tolist(), strict=True)
    ]
    found: Tensor = mutant(IDS, mask)
    assert shift_targets(IDS, mask).tolist() == expected
    assert found.tolist() != expected
