"""Losses and advantages of packed sequences, (N,) or (1, N) with cu_seqlens: what comes out is what
the padded form gives.

The padded form is the oracle: it is tested against formulas elsewhere, and knows nothing of
cu_seqlens.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate
from support.packings import (
    BACKENDS,
    DTYPES,
    LENGTH_SETS,
    LENGTHS,
    SHAPES,
    Example,
    check,
    leaf,
    masked,
    packing,
    policy,
    preference,
)
from support.policy_formulas import FORMS
from torch import Tensor

import fastrlhf as fr
from fastrlhf.losses.policy_arguments import PolicyOptions, policy_batch
from fastrlhf.losses.preference import LOSS_TYPES
from fastrlhf.ops.layout import layout_of
from fastrlhf.reference import MARGIN_LOSSES

# Of kernels, which know no tree, those that the interpreter goes through in a second.
WITH_LENGTHS = pytest.mark.parametrize(
    ("impl", "lengths"),
    [("eager", name) for name in LENGTH_SETS]
    + [("triton", name) for name, lengths in LENGTH_SETS.items() if sum(lengths) < 300],
)


@BACKENDS
@SHAPES
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("ref_per_token", [True, False], ids=["token ref", "summed ref"])
def test_preference_losses_of_every_type(loss_type, leading, impl, ref_per_token, device) -> None:
    pack = packing(LENGTHS, device, torch.int32)
    example = preference(pack, loss_type, impl, ref_per_token=ref_per_token)
    check(example, pack, torch.float64, leading)


@DTYPES
@WITH_LENGTHS
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "aot"])
def test_preference_losses_of_any_lengths(loss_type, lengths, dtype, impl, device) -> None:
    pack = packing(LENGTH_SETS[lengths], device)
    check(preference(pack, loss_type, impl), pack, dtype, ())


@BACKENDS
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_without_a_mask_all_packed_tokens_count(loss_type, impl, device) -> None:
    pack = packing(LENGTHS, device)
    pi, ref = pack.packed(pack.random()), pack.packed(pack.random())
    pairs = torch.tensor([2, 3], device=device), torch.tensor([6, 0], device=device)
    options = {"loss_type": loss_type, "impl": impl, "cu_seqlens": pack.cu_seqlens}
    ones = torch.ones_like(pi)
    # The lengths are counted; what is given besides is not looked at.
    lengths = torch.ones(len(LENGTHS), device=device)
    with_mask = fr.dpo_loss(pi, ref, *pairs, mask=ones, **options)
    for without in (
        fr.dpo_loss(pi, ref, *pairs, **options),
        fr.dpo_loss(pi, ref, *pairs, lengths=lengths, **options),
    ):
        assert all(torch.equal(a, b) for a, b in zip(with_mask, without, strict=True))
    for average in (False, True):
        sums = fr.sequence_logprobs(pi, ones, average=average, cu_seqlens=pack.cu_seqlens)
        all_of_them = fr.sequence_logprobs(pi, average=average, cu_seqlens=pack.cu_seqlens)
        assert torch.equal(sums, all_of_them)


def test_the_kernels_bits_are_those_of_rows(device) -> None:
    pack = packing(LENGTHS, device)
    tokens = masked(pack)
    pi, ref = tokens().float(), tokens().float()
    pairs = torch.tensor([2, 3, 8], device=device), torch.tensor([6, 0, 9], device=device)
    up = torch.tensor([1.0, -0.3, 2.0], device=device)
    results = []
    for move in (lambda x: x, pack.packed):
        x = leaf(move(pi))
        cu_seqlens = pack.cu_seqlens if move == pack.packed else None
        losses, rewards = fr.dpo_loss(
            x, move(ref), *pairs, mask=move(tokens.mask), cu_seqlens=cu_seqlens, impl="triton"
        )
        (losses * up).sum().backward()
        gradient = x.grad if move == pack.packed else pack.packed(x.grad)
        estimates = fr.gae(
            move(pi), move(ref), move(tokens.mask), gamma=0.9, cu_seqlens=cu_seqlens, impl="triton"
        )
        estimates = [x if move == pack.packed else pack.packed(x) for x in estimates]
        results.append((losses.detach(), rewards, gradient, *estimates))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


POLICIES = [
    {"reduction": reduction, "ratio_level": level, "normalizer": normalizer}
    for reduction in ("token-mean", "sequence-mean", "sequence-sum", "constant")
    for level in ("token", "sequence")
    for normalizer in (None, 5.0, torch.tensor(7.0))
    if not (reduction == "constant" and normalizer is None)
]


@SHAPES
@pytest.mark.parametrize("per_sequence", [True, False], ids=["of sequences", "of tokens"])
@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_policy_losses_of_every_reduction(options, per_sequence, leading) -> None:
    pack = packing(LENGTHS, dtype=torch.int32)
    result = check(policy(pack, per_sequence=per_sequence, **options), pack, torch.float64, leading)
    if options["ratio_level"] == "token":
        assert result.values["clip_ratio/low_mean"] > 0
        assert result.values["clip_ratio/high_mean"] > 0


@DTYPES
@pytest.mark.parametrize("lengths", LENGTH_SETS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_losses_of_any_lengths(level, lengths, dtype) -> None:
    pack = packing(LENGTH_SETS[lengths])
    bounds = {"clip_low": 0.05, "clip_high": 0.05} if level == "sequence" else {}
    options = {"ratio_level": level, "reduction": "sequence-mean", **bounds}
    check(policy(pack, **options), pack, dtype, ())


@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_policy_losses_of_every_surrogate(level, surrogate) -> None:
    pack = packing(LENGTHS)
    options = {"surrogate": surrogate, "ratio_level": level, "kl_bias_correction": True}
    for threshold in (None, 0.0):
        case = policy(pack, **options, off_policy_mask_threshold=threshold)
        check(case, pack, torch.float64, ())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "cispo"])
def test_the_named_losses_pass_the_borders_on(loss_type) -> None:
    pack = packing(LENGTHS)
    x, old = pack.random(scale=0.1), pack.random(scale=0.1)
    advantages = torch.randn(len(LENGTHS))
    packed = pack.packed(x), pack.packed(old), advantages, pack.packed(pack.there)
    for function, options in ((fr.ppo_loss, {}), (fr.grpo_loss, {"loss_type": loss_type})):
        loss, _ = function(x, old, advantages, pack.there, **options)
        found, _ = function(*packed, cu_seqlens=pack.cu_seqlens, **options)
        torch.testing.assert_close(found, loss, rtol=1e-14, atol=0)


def test_the_shares_of_clipped_sequences_are_of_sequences() -> None:
    # Of four sequences one has no token of the mask, one is clipped from above and one from below.
    cu_seqlens = torch.tensor([0, 3, 5, 6, 10])
    log_ratio = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 9.0, -1.0, -1.0, -1.0, -1.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1, 1])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0])
    _, metrics = fr.policy_loss(
        log_ratio, torch.zeros(10), advantages, mask, ratio_level="sequence", cu_seqlens=cu_seqlens
    )
    third = pytest.approx(1 / 3)
    assert metrics["clip_ratio/high_mean"].item() == third
    assert metrics["clip_ratio/low_mean"].item() == third
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(2 / 3)


def test_a_tensor_of_the_tokens_shape_is_of_tokens() -> None:
    # Two tokens, two sequences: of tokens, though the second sequence has none.
    cu_seqlens, advantages = torch.tensor([0, 2, 2]), torch.tensor([1.0, 3.0])

    def of_tokens(mask: Tensor) -> list:
        batch = policy_batch(
            PolicyOptions(), torch.float32, mask, None, advantages, None, None,
            with_entropy=False, layout=layout_of("mask", mask, cu_seqlens),
        )  # fmt: skip
        return batch.tokens.advantages.tolist()

    assert of_tokens(torch.ones(2)) == [1.0, 3.0]
    assert of_tokens(torch.ones(1, 2)) == [[1.0, 1.0]]
    pairs = torch.tensor([0]), torch.tensor([1])
    ref = torch.tensor([0.25, 0.5])
    _, rewards = fr.dpo_loss(torch.zeros(2), ref, *pairs, 1.0, cu_seqlens=cu_seqlens)
    assert rewards.tolist() == [-0.75, 0.0]


@DTYPES
@SHAPES
@pytest.mark.parametrize("lengths", LENGTH_SETS)
@pytest.mark.parametrize("clip_range", [0.2, None])
def test_value_losses(clip_range, lengths, leading, dtype) -> None:
    pack = packing(LENGTH_SETS[lengths])
    tokens = masked(pack)

    def function(values: Tensor, **rest: Any) -> dict[str, Tensor]:
        loss, metrics = fr.value_loss(values, clip_range=clip_range, normalizer=None, **rest)
        return {"loss": loss, **metrics}

    others = {"old_values": tokens(), "returns": tokens(), "mask": tokens.mask}
    check(Example(function, {"values": tokens()}, others), pack, dtype, leading)


@DTYPES
@SHAPES
@WITH_LENGTHS
def test_advantages_stop_at_the_borders(lengths, leading, dtype, impl, device) -> None:
    pack = packing(LENGTH_SETS[lengths], device, torch.int32)
    tokens = masked(pack)
    rewards, values = tokens().to(dtype), tokens().to(dtype)
    packed = [pack.packed(x, leading) for x in (rewards, values, tokens.mask)]
    options = {"gamma": 0.97, "lam": 0.9, "impl": impl}
    estimates = fr.gae(*packed, cu_seqlens=pack.cu_seqlens, **options)
    plain = fr.gae(rewards, values, tokens.mask, **options)
    exact = fr.gae(rewards.double(), values.double(), tokens.mask, gamma=0.97, lam=0.9, impl=impl)
    for one, of_plain, of_exact in zip(estimates, plain, exact, strict=True):
        assert one.shape == packed[0].shape and one.dtype == of_plain.dtype
        assert (one[packed[2] == 0] == 0).all()
        moved = pack.packed(of_plain), pack.packed(of_exact)
        assert_as_accurate(one.reshape(-1), *moved)


@BACKENDS
def test_advantages_are_constants_under_transforms_too(impl, device) -> None:
    pack = packing([3, 0, 40], device)
    x = pack.packed(pack.random())

    def total(x: Tensor) -> Tensor:
        advantages, returns = fr.gae(x, x, x < 9, cu_seqlens=pack.cu_seqlens, impl=impl)
        return (advantages + returns).sum()

    _, slope = torch.func.jvp(total, (x,), (torch.ones_like(x),))
    assert slope == 0 and not torch.func.grad(total)(x).any()
    samples = torch.stack((x, -x))
    for found, sample in zip(torch.func.vmap(total)(samples), samples, strict=True):
        torch.testing.assert_close(found, total(sample), rtol=1e-12, atol=1e-12)


@BACKENDS
def test_a_sequence_that_is_nan_taints_no_other_ones_advantages(impl, device) -> None:
    pack = packing(LENGTHS, device)
    rewards, values = (pack.packed(pack.random()) for _ in range(2))
    ones, borders = torch.ones_like(rewards), pack.cu_seqlens
    expected = fr.gae(rewards, values, ones, cu_seqlens=borders, impl=impl)
    start, stop = borders[6], borders[7]
    rewards[stop - 1] = math.nan
    for one, clean in zip(
        fr.gae(rewards, values, ones, cu_seqlens=borders, impl=impl), expected, strict=True
    ):
        assert one[start:stop].isnan().all()
        one[start:stop] = clean[start:stop]
        assert torch.equal(one, clean)


@SHAPES
@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_the_score_goes_to_the_last_token_of_the_mask(lengths, leading) -> None:
    pack = packing(LENGTH_SETS[lengths])
    tokens = masked(pack, share=0.4)
    logprobs, ref, scores = tokens(), tokens(), torch.randn(pack.there.shape[0])
    expected = fr.shaped_rewards(scores, logprobs, ref, tokens.mask, kl_coef=0.1)
    packed = [pack.packed(x, leading) for x in (logprobs, ref, tokens.mask)]
    rewards = fr.shaped_rewards(scores, *packed, kl_coef=0.1, cu_seqlens=pack.cu_seqlens)
    assert torch.equal(rewards, pack.packed(expected, leading))


@SHAPES
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_no_target_crosses_a_border(lengths, with_mask, leading) -> None:
    pack = packing(LENGTH_SETS[lengths])
    ids = torch.randint(9, pack.there.shape)
    mask = pack.there & (torch.rand(ids.shape) < 0.6) if with_mask else pack.there
    expected = pack.packed(fr.shift_targets(ids, mask, ignore_index=-7), leading)
    given = pack.packed(mask, leading) if with_mask else None
    targets = fr.shift_targets(
        pack.packed(ids, leading), given, cu_seqlens=pack.cu_seqlens, ignore_index=-7
    )
    assert torch.equal(targets, expected)


@given(
    lengths=st.lists(st.integers(0, 80), max_size=12),
    seed=st.integers(0, 999),
    wide=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    leading=st.sampled_from([(), (1,)]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_any_packing(lengths, seed, wide, dtype, leading, share) -> None:
    torch.manual_seed(seed)
    pack = packing(lengths, dtype=torch.int64 if wide else torch.int32)
    tokens = masked(pack, share)
    others = {"mask": tokens.mask}

    def sums(x: Tensor, **rest: Any) -> dict[str, Tensor]:
        return {"sums": fr.sequence_logprobs(x, **rest)}

    check(Example(sums, {"x": tokens()}, others), pack, dtype, leading)
    check(preference(pack, "ipo", "eager"), pack, dtype, leading)
    options = {"ratio_level": "sequence", "reduction": "sequence-mean"}
    check(policy(pack, **options), pack, dtype, leading)


@pytest.mark.parametrize("loss_type", list(MARGIN_LOSSES))
def test_strides_and_expanded_tensors_change_nothing(loss_type, device) -> None:
    pack = packing(LENGTHS, device)
    pi, ref = (pack.packed(pack.random(torch.float32)) for _ in range(2))
    borders = torch.stack((pack.cu_seqlens, pack.cu_seqlens), 1)[:, 1]
    mask = torch.ones(1, device=device).expand(len(pi))
    pairs = torch.tensor([2, 3], device=device), torch.tensor([6, 8], device=device)
    options = {"loss_type": loss_type, "impl": "triton"}
    expected = fr.dpo_loss(pi, ref, *pairs, cu_seqlens=pack.cu_seqlens, **options)
    spaced = [torch.stack((x, x), 1)[:, 0] for x in (pi, ref)]
    results = fr.dpo_loss(*spaced, *pairs, mask=mask, cu_seqlens=borders, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
