"""dpo_loss of random batches: what holds for any of them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.preference_batches import (
    AVERAGED_TYPES,
    IMPLS,
    MARGIN_TYPES,
    WITH_IMPL,
    Batch,
    gradients,
)

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Sums of up to 5 sequences in multiples of 1/8, and any pairs of them."""
    size, pairs = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    eighths = st.lists(st.integers(-800, 0), min_size=size, max_size=size)
    index = st.lists(st.integers(0, size - 1), min_size=pairs, max_size=pairs)
    lengths = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    return Batch(
        torch.tensor(draw(eighths), dtype=torch.float64) / 8,
        torch.tensor(draw(eighths), dtype=torch.float64) / 8,
        torch.tensor(draw(index), dtype=torch.int64),
        torch.tensor(draw(index), dtype=torch.int64),
        lengths=torch.tensor(lengths),
    )


MARGIN_AND_IMPL = st.tuples(st.sampled_from(MARGIN_TYPES), st.sampled_from(IMPLS))


@PROPERTY
@given(batch=batches(), choice=st.sampled_from(WITH_IMPL), beta=st.floats(0.01, 2))
def test_any_batch_agrees_with_the_oracle(
    batch: Batch, choice: tuple[str, str], beta: float, device: torch.device
) -> None:
    batch = batch.to(device)
    options: dict[str, Any] = {"loss_type": choice[0], "beta": beta, "label_smoothing": 0.1}
    losses, rewards = batch.loss(impl=choice[1], **options)
    expected = batch.expected(**options)
    # Where a pair is a sequence against itself, all sizes cancel, so an absolute floor remains.
    for value, exact in zip(losses.tolist(), expected.losses, strict=True):
        assert value == pytest.approx(float(exact), rel=1e-11, abs=1e-12)
    batch.expected_rewards(beta).assert_losses(rewards)


@PROPERTY
@given(batch=batches(), impl=st.sampled_from(IMPLS))
def test_a_label_that_is_a_coin_flip_prefers_neither(
    batch: Batch, impl: str, device: torch.device
) -> None:
    batch = batch.to(device)
    swapped = batch._replace(yw_idxs=batch.yl_idxs, yl_idxs=batch.yw_idxs)
    one, other = (x.loss(label_smoothing=0.5, impl=impl)[0] for x in (batch, swapped))
    torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@PROPERTY
@given(batch=batches(), choice=st.sampled_from(WITH_IMPL), seed=st.integers(0, 99))
def test_renumbering_the_sequences_changes_no_loss(
    batch: Batch, choice: tuple[str, str], seed: int, device: torch.device
) -> None:
    batch = batch.to(device)
    assert batch.lengths is not None
    order = torch.randperm(len(batch.pi_logps), generator=torch.Generator().manual_seed(seed)).to(
        device
    )  # new position → old
    position = order.argsort()
    moved = Batch(
        batch.pi_logps[order],
        batch.ref_logps[order],
        position[batch.yw_idxs],
        position[batch.yl_idxs],
        lengths=batch.lengths[order],
    )
    options = {"loss_type": choice[0], "impl": choice[1], "label_smoothing": 0.1}
    losses, rewards = batch.loss(**options)
    moved_losses, moved_rewards = moved.loss(**options)
    assert torch.equal(losses, moved_losses)
    assert torch.equal(rewards[order], moved_rewards)


@PROPERTY
@given(
    batch=batches(),
    choice=st.sampled_from([x for x in WITH_IMPL if x[0] != "aot"]),
    shift=st.integers(-400, 400),
)
def test_what_policy_and_reference_share_of_a_sequence_cancels(
    batch: Batch, choice: tuple[str, str], shift: int, device: torch.device
) -> None:
    batch = batch.to(device)
    # Of single sequences, except for aot, which compares policy and reference by rank.
    shifts = torch.zeros_like(batch.pi_logps)
    shifts[0] = shift / 8
    moved = batch._replace(pi_logps=batch.pi_logps + shifts, ref_logps=batch.ref_logps + shifts)
    options = {"loss_type": choice[0], "impl": choice[1], "label_smoothing": 0.1}
    assert all(map(torch.equal, batch.loss(**options), moved.loss(**options)))


@PROPERTY
@given(batch=batches(), choice=MARGIN_AND_IMPL)
def test_gradients_of_margin_losses_cancel_in_every_pair(
    batch: Batch, choice: tuple[str, str], device: torch.device
) -> None:
    batch = batch.to(device)
    loss_type, impl = choice
    leaves = batch._replace(
        pi_logps=batch.pi_logps.requires_grad_(), ref_logps=batch.ref_logps.requires_grad_()
    )
    *_, d_pi, d_ref = gradients(leaves, impl=impl, loss_type=loss_type)
    assert torch.equal(d_pi, -d_ref)
    assert batch.lengths is not None
    size = batch.lengths.clamp(min=1) if loss_type in AVERAGED_TYPES else 1
    assert (d_pi * size).sum().item() == pytest.approx(0, abs=1e-9)
