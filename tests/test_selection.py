"""Which tokens a policy loss is of, against sorted lists of numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.no_waiting import NoWaiting
from torch import Tensor

from fastrlhf import clip_cov_mask, kl_cov_mask, policy_loss, top_entropy_mask

GARBAGE = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
SHARES = pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.29, 0.3, 0.7, 0.99, 1.0])
B, T = 7, 20


def entropies(
    dtype: torch.dtype = torch.float64, garbage: float = math.nan
) -> tuple[Tensor, Tensor]:
    mask = torch.rand(B, T) < 0.7
    mask[1] = False
    return torch.where(mask, 3 * torch.rand(B, T), garbage).to(dtype), mask


# top_entropy_mask


@DTYPES
@SHARES
def test_the_highest_entropies_are_chosen(share, dtype) -> None:
    entropy, mask = entropies(dtype)  # in half precision, some of them equal
    found = top_entropy_mask(entropy, mask, share=share)
    assert found.dtype == torch.bool and found.shape == mask.shape and not found[~mask].any()
    in_order = sorted(entropy[mask].tolist(), reverse=True)
    # As a decimal number: 0.29 of 100 is 29.
    least = in_order[round(share * 100) * (len(in_order) - 1) // 100]
    assert torch.equal(found, mask & (entropy >= least))
    assert found.sum() >= 1 and (share < 1 or torch.equal(found, mask))


@SHARES
@pytest.mark.parametrize("n", [1, 2, 11, 101])
def test_they_are_those_of_the_quantile(n, share) -> None:
    entropy = torch.randn(1, n, dtype=torch.float64).square()
    found = top_entropy_mask(entropy, torch.ones(1, n), share=share)
    # At whole ranks, the interpolation rounds away from the entropy that it is.
    threshold = torch.quantile(entropy, 1 - share) * (1 - 1e-12)
    assert torch.equal(found, entropy >= threshold)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.23, 0.71, 1.0])
def test_they_are_those_of_trl(share) -> None:
    pytest.importorskip("trl", reason="needs trl")
    from trl import GRPOTrainer

    accelerator = SimpleNamespace(
        pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x
    )
    entropy, mask = entropies(torch.float32, garbage=0.0)
    expected = GRPOTrainer.get_high_entropy_mask(
        SimpleNamespace(accelerator=accelerator), entropy, mask, 1 - share
    )
    assert torch.equal(top_entropy_mask(entropy, mask, share=share), expected)


def test_equal_entropies_are_chosen_together() -> None:
    entropy = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.5, 0.0]])
    mask = torch.ones(1, 6)
    assert top_entropy_mask(entropy, mask, share=0.0)[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert top_entropy_mask(entropy, mask, share=0.2)[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert top_entropy_mask(entropy * 0, mask, share=0.2).all()


@GARBAGE
def test_entropies_outside_of_the_mask_can_be_anything(garbage) -> None:
    torch.manual_seed(2)
    expected = top_entropy_mask(*entropies(garbage=0.0))
    torch.manual_seed(2)
    assert torch.equal(top_entropy_mask(*entropies(garbage=garbage)), expected)
    nothing = torch.full((2, 3), garbage)
    assert not top_entropy_mask(nothing, torch.zeros(2, 3)).any()
    assert top_entropy_mask(nothing[:0], torch.zeros(0, 3)).shape == (0, 3)


def test_more_tokens_than_the_quantile_of_torch_takes() -> None:
    n = 2**24 + 2
    entropy = torch.arange(n, dtype=torch.int32).flip(0).to(torch.float64)  # in order, and fast so
    found = top_entropy_mask(entropy, torch.ones(n, dtype=torch.bool), share=0.5)
    assert found.sum() == 1 + (n - 1) // 2 and found[: n // 2].all()


def test_the_loss_of_chosen_tokens_counts_all_in_its_means() -> None:
    entropy, mask = entropies(garbage=0.0)
    logprobs = -torch.rand(B, T, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(B, T, dtype=torch.float64)
    chosen = top_entropy_mask(entropy, mask)
    loss, _ = policy_loss(logprobs, None, advantages, mask, rollout_weights=chosen)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = torch.where(chosen, -advantages / mask.sum(), 0.0)
    torch.testing.assert_close(gradient, expected)


# Clip-Cov and KL-Cov


def covariances(
    garbage: float = math.nan, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Log-probs, advantages, a mask, and the covariances in the mask from their definition."""
    mask = torch.rand(B, T) < 0.8
    mask[4] = False
    logprobs, advantages = -3 * torch.rand(B, T), 2 * torch.randn(B, T)
    logprobs, advantages = (torch.where(mask, x, garbage).to(dtype) for x in (logprobs, advantages))
    own, gain = (x[mask].double() for x in (logprobs, advantages))
    found = torch.zeros(B, T, dtype=torch.float64)
    found[mask] = (gain - gain.sum() / len(gain)) * (own - own.sum() / len(own))
    return logprobs, advantages, mask, found


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.29, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_covariances_are_chosen(share, dtype) -> None:
    logprobs, advantages, mask, covariance = covariances(dtype=dtype)
    found = kl_cov_mask(logprobs, advantages, mask, share=share)
    n = int(mask.sum())
    wanted = max(round(share * 1000) * n // 1000, 1)
    least = sorted(covariance[mask].tolist(), reverse=True)[wanted - 1]
    assert found.sum() == wanted and not found[~mask].any()
    # Where rounding may have exchanged two, they are nearly equal.
    assert (covariance[found] >= least - 1e-5).all()


def reference_clip_cov(covariance: Tensor, mask: Tensor, share: float, low: float, high: float):
    candidates = mask & (covariance >= low) & (covariance <= high)
    return candidates, min(max(int(share * int(mask.sum())), 1), int(candidates.sum()))


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (0.2, 0.5), (0.0, 100.0), (50.0, 60.0)])
def test_as_many_as_wanted_of_the_candidates_are_dropped(share, low, high) -> None:
    logprobs, advantages, mask, covariance = covariances()
    found = clip_cov_mask(logprobs, advantages, mask, share=share, low=low, high=high)
    candidates, wanted = reference_clip_cov(covariance, mask, share, low, high)
    dropped = mask & ~found
    assert not found[~mask].any()
    assert dropped.sum() == wanted and not (dropped & ~candidates).any()


def test_each_candidate_is_as_likely_to_be_dropped() -> None:
    logprobs, advantages, mask, covariance = covariances()
    generator = torch.Generator().manual_seed(3)
    options = {"share": 0.03, "low": 0.3, "high": 2.0, "generator": generator}
    candidates, wanted = reference_clip_cov(covariance, mask, 0.03, 0.3, 2.0)
    count = torch.zeros(B, T)
    for _ in range(2000):
        count += mask & ~clip_cov_mask(logprobs, advantages, mask, **options)
    share = wanted / int(candidates.sum())
    assert 0.05 < share < 0.5 and not count[~candidates].any()
    # Six standard deviations of a binomial distribution.
    width = 6 * math.sqrt(share * (1 - share) / 2000)
    assert (count[candidates] / 2000 - share).abs().max() < width


def test_the_choice_is_that_of_its_generator() -> None:
    logprobs, advantages, mask, _ = covariances()

    def chosen(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return clip_cov_mask(logprobs, advantages, mask, share=0.1, low=0.0, generator=generator)

    assert torch.equal(chosen(0), chosen(0)) and not torch.equal(chosen(0), chosen(1))


def test_bounds_are_within_and_tokens_that_are_not_eligible_are_left() -> None:
    logprobs = torch.tensor([[0.0, -2.0, -2.0, 0.0]], dtype=torch.float64)
    advantages, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4)  # ±1 each
    found = clip_cov_mask(logprobs, advantages, mask, share=1.0, low=1.0, high=1.0)
    assert found[0].tolist() == [False, False, True, True]
    eligible = torch.tensor([[0, 1, 1, 1]])
    found = clip_cov_mask(logprobs, advantages, mask, share=1.0, eligible=eligible)
    assert found[0].tolist() == [True, False, True, True]
    assert kl_cov_mask(logprobs, advantages, mask, share=0.25)[0].tolist() == [1, 0, 0, 0]


@GARBAGE
def test_what_is_outside_counts_nowhere(garbage) -> None:
    torch.manual_seed(4)
    clean = covariances(garbage=0.0)[:3]
    torch.manual_seed(4)
    dirty = covariances(garbage=garbage)[:3]
    assert torch.equal(kl_cov_mask(*dirty, share=0.1), kl_cov_mask(*clean, share=0.1))
    found = (
        clip_cov_mask(*x, share=0.1, low=0.1, generator=torch.Generator().manual_seed(0))
        for x in (dirty, clean)
    )
    assert torch.equal(*found)
    for shape in ((2, 3), (0, 3), (2, 0)):
        nothing = torch.full(shape, garbage)
        assert not kl_cov_mask(nothing, nothing, torch.zeros(shape)).any()
        assert not clip_cov_mask(nothing, nothing, torch.zeros(shape)).any()


def test_advantages_of_sequences_are_those_of_their_tokens() -> None:
    logprobs, _, mask, _ = covariances()
    advantages = torch.randn(B, dtype=torch.float64)
    each = advantages.unsqueeze(1).expand(B, T)
    found = kl_cov_mask(logprobs, advantages, mask, share=0.1)
    assert torch.equal(found, kl_cov_mask(logprobs, each, mask, share=0.1))
    lengths = torch.full((B,), T)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    for leading in ((), (1,)):
        packed = (x.reshape(*leading, -1) for x in (logprobs, mask))
        packed_logprobs, packed_mask = packed
        of_packed = kl_cov_mask(
            packed_logprobs, advantages, packed_mask, share=0.1, cu_seqlens=cu_seqlens
        )
        assert of_packed.shape == packed_mask.shape
        assert torch.equal(of_packed.view(B, T), found)
        generators = (torch.Generator().manual_seed(5) for _ in range(2))
        options = {"share": 0.1, "low": 0.1}
        kept = clip_cov_mask(
            packed_logprobs, advantages, packed_mask, cu_seqlens=cu_seqlens,
            generator=next(generators), **options,
        )  # fmt: skip
        expected = clip_cov_mask(logprobs, each, mask, generator=next(generators), **options)
        assert torch.equal(kept.view(B, T), expected)


def test_they_are_compiled_whole_and_have_no_gradient() -> None:
    logprobs, advantages, mask, _ = covariances(garbage=0.0)
    leaf = logprobs.clone().requires_grad_()

    def step(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        chosen = kl_cov_mask(logprobs, advantages, mask, share=0.1)
        return chosen, top_entropy_mask(logprobs, mask)

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf, advantages, mask)
    assert all(map(torch.equal, found, step(leaf, advantages, mask)))
    assert clip_cov_mask(leaf, advantages, mask).dtype == torch.bool
    pairs = (torch.stack((x, x.roll(1, 1))) for x in (logprobs, advantages, mask))
    for of_two, own in zip(torch.func.vmap(step)(*pairs), found, strict=True):
        assert torch.equal(of_two[0], own) and torch.equal(of_two[1], own.roll(1, 1))


def test_nobody_waits_for_the_device() -> None:
    logprobs, advantages, mask, _ = covariances(garbage=0.0)
    with NoWaiting():
        top_entropy_mask(logprobs, mask)
        kl_cov_mask(logprobs, advantages, mask)
        clip_cov_mask(logprobs, advantages, mask, eligible=mask)
        with pytest.raises(AssertionError, match="the host waits"):
            bool(mask.any())


# Arguments


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        (top_entropy_mask, {"share": 1.5}, ValueError, "share: "),
        (top_entropy_mask, {"share": "all"}, TypeError, "share: "),
        (top_entropy_mask, {"mask": torch.zeros(B)}, ValueError, "mask: "),
        (top_entropy_mask, {"entropy": torch.zeros(B, T).long()}, TypeError, "entropy: "),
        (top_entropy_mask, {"group": 3}, TypeError, "group: "),
        (kl_cov_mask, {"share": -0.1}, ValueError, "share: "),
        (kl_cov_mask, {"advantages": torch.zeros(B + 1)}, ValueError, "advantages: "),
        (kl_cov_mask, {"advantages": None}, TypeError, "advantages: "),
        (kl_cov_mask, {"group": 3}, TypeError, "group: "),
        (clip_cov_mask, {"share": math.nan}, ValueError, "share: "),
        (clip_cov_mask, {"low": 6.0}, ValueError, "low: expected at most high"),
        (clip_cov_mask, {"high": math.inf}, ValueError, "high: "),
        (clip_cov_mask, {"eligible": torch.ones(B)}, ValueError, "eligible: "),
        (clip_cov_mask, {"eligible": torch.full((B, T), 0.5)}, ValueError, "eligible: "),
        (clip_cov_mask, {"generator": 3}, TypeError, "generator: expected a torch.Generator"),
        (clip_cov_mask, {"cu_seqlens": torch.tensor([0, 1])}, ValueError, "cu_seqlens: "),
    ],
)
def test_what_does_not_fit_is_named(function, options, error, message) -> None:
    if function is top_entropy_mask:
        good = dict(zip(("entropy", "mask"), entropies(), strict=True))
    else:
        good = dict(zip(("logprobs", "advantages", "mask"), covariances()[:3], strict=True))
    with pytest.raises(error, match=f"^{message}"):
        function(**{**good, **options})


def test_entropies_that_are_no_numbers_are_not_counted() -> None:
    entropy = torch.tensor([5.0, 4, 3, 2, 1] + [math.nan] * 5)
    found = top_entropy_mask(entropy, torch.ones(10), share=0.5)
    assert found.tolist() == [True, True, True, *[False] * 7]
    assert not top_entropy_mask(entropy[5:], torch.ones(5)).any()
