"""Packed sequences, (N,) or (1, N) with cu_seqlens: what comes out is what the padded form gives.

The padded form is the oracle: it is tested against formulas elsewhere, and knows nothing of
cu_seqlens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate
from support.policy_formulas import FORMS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import fastrlhf as fr
from fastrlhf.losses.policy_arguments import PolicyOptions, policy_batch
from fastrlhf.losses.preference import LOSS_TYPES
from fastrlhf.ops.layout import checked_cu_seqlens, layout_of
from fastrlhf.reference import MARGIN_LOSSES, ROWS

BACKENDS = pytest.mark.parametrize("impl", ["eager", "triton"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("leading", [(), (1,)], ids=["(N,)", "(1, N)"])

# Empty sequences at both ends and in the middle, two in a row, single tokens, and sequences that
# fill groups of 32 of the tree exactly, nearly, and many times.
LENGTHS = [0, 1, 32, 31, 0, 0, 33, 1, 97, 64, 5, 0]
LENGTH_SETS = {
    "mixed": LENGTHS,
    "one": [7],
    "one token": [1],
    "single tokens": [1] * 40,
    "empty ones alone": [0, 0, 0],
    "none": [],
    "a long one between": [3, 1100, 2],
    "a thousand and 24 exactly": [512, 512],
    "no group": [5, 6],
}

# Of kernels, which know no tree, those that the interpreter goes through in a second.
WITH_LENGTHS = pytest.mark.parametrize(
    ("impl", "lengths"),
    [("eager", name) for name in LENGTH_SETS]
    + [("triton", name) for name, lengths in LENGTH_SETS.items() if sum(lengths) < 300],
)


class Packing(NamedTuple):
    """The borders of sequences, and which cells of the padded form (B, T) hold their tokens."""

    cu_seqlens: Tensor
    there: Tensor

    def packed(self, x: Tensor, leading: tuple[int, ...] = ()) -> Tensor:
        """The tokens of a padded tensor, one sequence after the other."""
        return x[self.there].reshape(*leading, -1)

    def random(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return (torch.randn(self.there.shape, device=self.there.device) * scale).to(dtype)


def packing(
    lengths: list[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.int64
) -> Packing:
    sizes = torch.tensor(lengths, dtype=torch.int64)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0))).to(dtype)
    there = torch.arange(max(lengths, default=0)) < sizes.unsqueeze(1)
    return Packing(cu_seqlens.to(device), there.to(device))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


class Found(NamedTuple):
    """Values by name, and the gradients of a weighted sum of those that have one."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def found(
    function: Callable[..., dict[str, Tensor]], trained: dict[str, Tensor], seed: int = 3
) -> Found:
    """Call a function of tensors, and go back from values weighted unevenly."""
    leaves = {name: leaf(x) for name, x in trained.items()}
    values = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    total = None
    for x in values.values():
        if x.requires_grad:
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            part = (x * weights.to(x)).sum()
            total = part if total is None else total + part
    if total is not None:
        total.backward()
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return Found({name: x.detach() for name, x in values.items()}, gradients)


def assert_agree(packed: Found, plain: Found, exact: Found, pack: Packing) -> None:
    """Assert that packed values and gradients are as accurate as those of the padded form in the
    same dtype, against those in fp64; gradients of tokens in the shape that went in.
    """
    assert packed.values.keys() == plain.values.keys()
    assert packed.gradients.keys() == plain.gradients.keys()
    for name, value in packed.values.items():
        assert value.dtype == plain.values[name].dtype
        # Losses and metrics are means of terms of about 1, which may cancel.
        size = max(1.0, exact.values[name].abs().item()) if value.ndim == 0 else None
        assert_as_accurate(value, plain.values[name], exact.values[name], size=size, of=name)
    for name, gradient in packed.gradients.items():
        of_plain, of_exact = plain.gradients[name], exact.gradients[name]
        if of_plain.ndim == 2:
            of_plain, of_exact = pack.packed(of_plain), pack.packed(of_exact)
        assert gradient.dtype == of_plain.dtype
        assert_as_accurate(gradient.reshape(-1), of_plain, of_exact, of=f"gradient of {name}")


class Example(NamedTuple):
    """A function of trained tensors and others, each padded, and where it differs when packed."""

    function: Callable[..., dict[str, Tensor]]
    trained: dict[str, Tensor]
    others: dict[str, Any]


def check(example: Example, pack: Packing, dtype: torch.dtype, leading: tuple[int, ...]) -> Found:
    """Assert that an example gives the same packed as padded, and return what that is."""

    def converted(x: Any, to: torch.dtype) -> Any:
        return x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x

    def moved(x: Any) -> Any:
        of_tokens = isinstance(x, Tensor) and x.shape == pack.there.shape
        return pack.packed(x, leading) if of_tokens and x.ndim == 2 else x

    def run(to: torch.dtype, packed: bool) -> Found:
        # Rounded first, so that the oracle sees the same numbers.
        trained, others = (
            {name: converted(converted(x, dtype), to) for name, x in part.items()}
            for part in (example.trained, example.others)
        )
        if packed:
            trained, others = (
                {name: moved(x) for name, x in part.items()} for part in (trained, others)
            )
            others["cu_seqlens"] = pack.cu_seqlens
        result = found(lambda **leaves: example.function(**leaves, **others), trained)
        return result

    result = run(dtype, True)
    for name, gradient in result.gradients.items():
        assert gradient.shape == moved(example.trained[name]).shape
    assert_agree(result, run(dtype, False), run(torch.float64, False), pack)
    return result


def masked(pack: Packing, share: float = 0.7, garbage: float = math.nan) -> Callable[..., Tensor]:
    """Make tensors of tokens with garbage outside of a mask, which is an attribute."""
    mask = pack.there & (torch.rand(pack.there.shape, device=pack.there.device) < share)

    def tokens(scale: float = 1.0) -> Tensor:
        return torch.where(mask, pack.random(scale=scale), garbage)

    tokens.mask = mask  # type: ignore[attr-defined]
    return tokens


def preference(
    pack: Packing, loss_type: str, impl: str, *, ref_per_token: bool = True, **options: Any
) -> Example:
    """dpo_loss of random pairs, sequences that take part in two of them and in none included."""
    sequences = pack.there.shape[0]
    tokens = masked(pack)
    pairs = max(1, 2 * sequences // 3) if sequences else 0
    yw, yl = (
        torch.randint(max(sequences, 1), (pairs,), device=pack.there.device) for _ in range(2)
    )
    ref = tokens(0.3) if ref_per_token else pack.random()[:, :1].sum(1)

    def function(pi: Tensor, ref: Tensor, mask: Tensor, **rest: Any) -> dict[str, Tensor]:
        losses, rewards = fr.dpo_loss(
            pi, ref, yw, yl, 0.3, mask=mask, loss_type=loss_type, label_smoothing=0.1, impl=impl,
            **rest, **options,
        )  # fmt: skip
        return {"losses": losses, "rewards": rewards}

    return Example(function, {"pi": tokens(0.3), "ref": ref}, {"mask": tokens.mask})


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


def policy(pack: Packing, *, per_sequence: bool = True, **options: Any) -> Example:
    """policy_loss with everything that it takes, clipped tokens on either side."""
    tokens, sequences = masked(pack), pack.there.shape[0]
    device = pack.there.device
    advantages = torch.randn(sequences, device=device) if per_sequence else tokens()
    weights = torch.rand(sequences, 1, device=device) + 0.5 if per_sequence else tokens().abs()
    if per_sequence and sequences > 2:
        advantages[2] = 0.0
    others = {
        "old_logprobs": tokens(0.4), "advantages": advantages, "mask": tokens.mask,
        "ref_logprobs": tokens(0.4), "rollout_weights": weights,
    }  # fmt: skip

    def function(logprobs: Tensor, entropy: Tensor, **rest: Any) -> dict[str, Tensor]:
        loss, metrics = fr.policy_loss(
            logprobs, entropy=entropy, kl_coef=0.1, entropy_coef=0.2, **rest, **options
        )
        assert not any(x.requires_grad for x in metrics.values())
        return {"loss": loss, **metrics}

    return Example(function, {"logprobs": tokens(0.4), "entropy": tokens()}, others)


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


@DTYPES
@SHAPES
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_sums_of_sequences(lengths, average, leading, dtype) -> None:
    pack = packing(LENGTH_SETS[lengths])
    tokens = masked(pack)

    def function(x: Tensor, **rest: Any) -> dict[str, Tensor]:
        return {"sums": fr.sequence_logprobs(x, average=average, **rest)}

    check(Example(function, {"x": tokens()}, {"mask": tokens.mask}), pack, dtype, leading)


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


def test_counts_are_exact_and_ids_are_those_of_the_lengths() -> None:
    pack = packing(LENGTHS)
    tokens = pack.packed(pack.random(), (1,))
    layout = layout_of("x", tokens, pack.cu_seqlens.int())
    mask = tokens > 0
    assert layout.sequences(tokens) == len(LENGTHS)
    assert layout.cu_seqlens is not None and layout.cu_seqlens.dtype == torch.int64
    expected = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert torch.equal(layout.ids(tokens), expected.unsqueeze(0))
    counts = [int(x.sum()) for x in mask[0].split(LENGTHS)]
    assert layout.counts(mask).tolist() == counts
    values = torch.arange(len(LENGTHS))
    assert torch.equal(layout.spread(values), expected.unsqueeze(0))
    assert layout_of("x", torch.zeros(2, 3)) is ROWS
    ids = ROWS.ids(torch.zeros(2, 3))
    assert ids.tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_sums_and_spreads_are_each_others_transpose_to_any_order(lengths) -> None:
    pack = packing([min(n, 40) for n in LENGTH_SETS[lengths]][:12])
    tokens = pack.packed(pack.random()).requires_grad_()
    sequences = torch.randn(len(pack.cu_seqlens) - 1, dtype=torch.float64, requires_grad=True)
    if not tokens.numel():
        return
    layout = layout_of("x", tokens, pack.cu_seqlens)

    def function(x: Tensor, y: Tensor) -> Tensor:
        mean = layout.sums(x * layout.spread(y.square()))
        return (layout.spread(mean.square()) * x).sum()

    precision = {"rtol": 1e-6, "atol": 1e-6, "fast_mode": True}
    assert gradcheck(function, (tokens, sequences), check_forward_ad=True, **precision)
    assert gradgradcheck(function, (tokens, sequences), **precision)


def test_nothing_cancels_and_nothing_infinite_leaves_its_sequence() -> None:
    x = torch.cat((
        torch.full((40,), 1e30), torch.full((40,), 1e-3), torch.full((35,), -math.inf),
        torch.full((3,), 0.5), torch.full((60,), math.nan), torch.full((33,), 1.0),
    )).requires_grad_()  # fmt: skip
    cu_seqlens = torch.tensor([0, 40, 80, 115, 118, 178, 211])
    sums = fr.sequence_logprobs(x, cu_seqlens=cu_seqlens)
    assert sums[1].item() == pytest.approx(0.04, rel=1e-6)
    assert sums[2].item() == -math.inf and sums[3].item() == 1.5
    assert sums[4].isnan() and sums[5].item() == 33.0
    (sums * torch.arange(6.0)).sum().backward()
    expected = torch.repeat_interleave(torch.arange(6.0), cu_seqlens.diff())
    assert torch.equal(x.grad, expected)


def test_sums_of_a_hundred_thousand_tokens_have_the_accuracy_of_rows() -> None:
    lengths = [50_000, 1, 49_999]
    x = torch.rand(100_000) + 1.0
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    sums = fr.sequence_logprobs(x, cu_seqlens=cu_seqlens)
    exact = torch.stack([part.double().sum() for part in x.split(lengths)])
    relative = ((sums.double() - exact) / exact).abs().max()
    # One rounding for each level of the tree, and for the sums of few.
    assert relative <= 8 * torch.finfo(torch.float32).eps


@BACKENDS
def test_bits_do_not_change_from_run_to_run_or_with_the_company(impl, device) -> None:
    pack = packing([64, 96, 33], device)
    pi, ref = (pack.packed(pack.random(torch.float32)) for _ in range(2))
    pairs = torch.tensor([0], device=device), torch.tensor([1], device=device)

    def run(borders: list[int]) -> tuple[Tensor, ...]:
        x = leaf(pi[: borders[-1]])
        cu_seqlens = torch.tensor(borders, device=device)
        losses, rewards = fr.dpo_loss(
            x, ref[: borders[-1]], *pairs, cu_seqlens=cu_seqlens, impl=impl
        )
        (losses * 0.7).sum().backward()
        return losses.detach(), rewards[:2], x.grad[:160]

    first, again, fewer = run([0, 64, 160, 193]), run([0, 64, 160, 193]), run([0, 64, 160])
    for a, b, c in zip(first, again, fewer, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def packed_functions(impl: str) -> dict[str, Callable[..., Tensor]]:
    """Scalars of token log-probs (N,), numbers (B,) of sequences, a mask and borders."""

    def before(x: Tensor) -> Tensor:
        """Log-probs that do not depend on those that are trained."""
        return torch.arange(x.shape[0], dtype=x.dtype, device=x.device).cos() * 0.3

    def preference(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        index = torch.arange(borders.shape[0] - 1, device=x.device)
        losses, _ = fr.dpo_loss(
            x, of_sequences, index, index.flip(0), 0.3, mask=mask, cu_seqlens=borders, impl=impl
        )
        return (losses * of_sequences).sum()

    def without_a_kernel(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        index = torch.arange(borders.shape[0] - 1, device=x.device)
        options = {"loss_type": "apo_zero", "mask": mask, "cu_seqlens": borders}
        losses, _ = fr.dpo_loss(x, before(x), index, index.flip(0), **options)
        return (losses * of_sequences).sum()

    def policy(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        return fr.policy_loss(
            x, before(x), of_sequences, mask, surrogate="sapo", ratio_level="sequence",
            reduction="sequence-mean", cu_seqlens=borders,
        )[0]  # fmt: skip

    def value(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        estimates, returns = fr.gae(before(x), before(x), mask, cu_seqlens=borders, impl=impl)
        rewards = fr.shaped_rewards(
            of_sequences, before(x), returns, mask, kl_coef=0.1, cu_seqlens=borders
        )
        return fr.value_loss(x, rewards, estimates + returns, mask, cu_seqlens=borders)[0]

    def average(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        means = fr.sequence_logprobs(x, mask, average=True, cu_seqlens=borders)
        targets = fr.shift_targets(mask.long(), mask, cu_seqlens=borders)
        return (means.square() * of_sequences).sum() + targets.sum()

    return {
        "preference": preference, "preference without a kernel": without_a_kernel,
        "policy": policy, "value": value, "average": average,
    }  # fmt: skip


# Those that have a kernel, with it too.
FUNCTIONS = pytest.mark.parametrize(
    ("name", "impl"),
    [*((name, "eager") for name in packed_functions("eager")), ("preference", "triton"),
     ("value", "triton")],
)  # fmt: skip


@FUNCTIONS
def test_transforms_give_what_autograd_gives(name, impl, device) -> None:
    function = packed_functions(impl)[name]
    pack = packing([3, 0, 40, 1, 2], device)
    of_sequences = torch.randn(5, dtype=torch.float64, device=device)
    samples = torch.stack([pack.packed(pack.random()) for _ in range(3)])
    mask = torch.rand(46, device=device) < 0.8
    rest = of_sequences, mask, pack.cu_seqlens

    def gradient(x: Tensor) -> Tensor:
        x = leaf(x)
        return torch.autograd.grad(function(x, *rest), x)[0]

    expected = torch.stack([gradient(x) for x in samples])
    grad, vmap = torch.func.grad, torch.func.vmap
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(grad(function)(samples[0], *rest), expected[0], **close)
    by_sample = vmap(grad(function), (0, None, None, None))(samples, *rest)
    torch.testing.assert_close(by_sample, expected, **close)
    tangent = torch.randn_like(samples[0])
    _, slope = torch.func.jvp(lambda x: function(x, *rest), (samples[0],), (tangent,))
    torch.testing.assert_close(slope, (expected[0] * tangent).sum(), **close)
    leaves = leaf(samples[0])
    many = torch.autograd.grad(
        function(leaves, *rest).expand(2), leaves, torch.eye(2).to(samples), is_grads_batched=True
    )[0]
    torch.testing.assert_close(many, expected[:1].expand(2, -1), **close)


@FUNCTIONS
def test_first_and_second_derivatives(name, impl, device) -> None:
    function = packed_functions(impl)[name]
    pack = packing([3, 0, 40, 1, 2], device)
    x = pack.packed(pack.random(scale=0.1)).requires_grad_()
    of_sequences = torch.randn(5, dtype=torch.float64, device=device)
    mask = torch.rand(46, device=device) < 0.8
    # Of what is given besides, only a reference is more than a constant.
    of_sequences.requires_grad_(name == "preference")
    inputs = (x, of_sequences, mask, pack.cu_seqlens)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


BATCHES = [[3, 0, 5, 1], [2, 9], [7, 7, 7, 2], [30, 1, 1, 60], [100, 200, 3, 4, 5], [300, 400, 1]]


@FUNCTIONS
def test_a_graph_serves_batches_of_other_lengths(name, impl, device) -> None:
    """Compiled once for fixed shapes, once for any, and once more where the tree of sums has a
    level that it has not for a few tokens.
    """
    function = packed_functions(impl)[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for lengths in BATCHES:
        pack = packing(lengths, device)
        x = pack.packed(pack.random())
        rest = (
            torch.randn(len(lengths), dtype=torch.float64, device=device),
            torch.rand(x.shape, device=device) < 0.8,
            pack.cu_seqlens,
        )
        gradients = []
        for one in (function, compiled):
            y = leaf(x)
            result = one(y, *rest)
            result.backward()
            gradients.append((result.detach(), y.grad))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    assert counter.frame_count <= 3


def test_wrong_borders_are_found_in_a_graph_too() -> None:
    compiled = torch.compile(
        lambda x, borders: fr.sequence_logprobs(x, cu_seqlens=borders),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    x = torch.ones(5)
    assert compiled(x, torch.tensor([0, 2, 5])).tolist() == [2.0, 3.0]
    with pytest.raises(RuntimeError, match="cu_seqlens: expected to start at 0"):
        compiled(x, torch.tensor([0, 3, 4]))


X, ONES = torch.zeros(5), torch.ones(5)
PAIR = torch.tensor([0]), torch.tensor([1])
CALLS: dict[str, Callable[..., Any]] = {
    "dpo_loss": lambda x, ones, **kw: fr.dpo_loss(x, x, *PAIR, mask=ones, **kw),
    "sequence_logprobs": fr.sequence_logprobs,
    "policy_loss": lambda x, ones, **kw: fr.policy_loss(x, x, x, ones, **kw),
    "ppo_loss": lambda x, ones, **kw: fr.ppo_loss(x, x, x, ones, **kw),
    "grpo_loss": lambda x, ones, **kw: fr.grpo_loss(x, x, x, ones, **kw),
    "value_loss": lambda x, ones, **kw: fr.value_loss(x, x, x, ones, **kw),
    "process_reward_loss": lambda x, ones, **kw: fr.process_reward_loss(x, x, ones, **kw),
    "process_reward_scores": lambda x, ones, **kw: fr.process_reward_scores(x, ones, **kw),
    "gae": lambda x, ones, **kw: fr.gae(x, x, ones, **kw),
    "shaped_rewards": lambda x, ones, **kw: fr.shaped_rewards(
        torch.zeros(2), x, x, ones, kl_coef=0.1, **kw
    ),
    "shift_targets": lambda x, ones, **kw: fr.shift_targets(x.long(), ones, **kw),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("borders", "error", "message"),
    [
        ([0, 2, 5], TypeError, "expected a tensor, got list"),
        (torch.tensor([0.0, 2.0, 5.0]), TypeError, "expected int32 or int64, got torch.float32"),
        (torch.tensor([0, 2, 5], dtype=torch.int16), TypeError, "int32 or int64, got torch.int16"),
        (torch.tensor([[0, 2, 5]]), ValueError, r"expected shape \(B \+ 1,\), got \(1, 3\)"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"expected shape \(B \+ 1,\), got \(0,"),
        (torch.tensor(5), ValueError, r"expected shape \(B \+ 1,\), got \(\)"),
        (torch.tensor([1, 2, 5]), ValueError, "expected to start at 0, got 1"),
        (torch.tensor([0, 2, 4]), ValueError, "expected to end at 5, .* got 4"),
        (torch.tensor([0, 2, 6]), ValueError, "expected to end at 5, .* got 6"),
        (torch.tensor([0, 4, 3, 5]), ValueError, "expected not to decrease, got 3 after 4"),
        (torch.tensor([0, 2, 5], device="meta"), ValueError, "expected on cpu, .* got meta"),
    ],
)
def test_wrong_borders_are_named(name, borders, error, message) -> None:
    with pytest.raises(error, match=f"^cu_seqlens: .*{message}"):
        CALLS[name](X, ONES, cu_seqlens=borders)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(2, 5), (5, 1), (1, 1, 5)])
def test_borders_do_not_go_with_rows(name, shape) -> None:
    x, ones = X.expand(shape[0], -1), ONES.expand(shape[0], -1)
    if shape == (5, 1):
        x, ones = X.unsqueeze(1), ONES.unsqueeze(1)
    if shape == (1, 1, 5):
        x, ones = X.view(shape), ONES.view(shape)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected None for .*packed tokens are"):
        CALLS[name](x, ones, cu_seqlens=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "shift_targets"])
def test_packed_tokens_need_borders(name) -> None:
    with pytest.raises(ValueError, match=r"\(B, T\).*got \(5,\); packed tokens .* cu_seqlens"):
        CALLS[name](X, ONES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fr.dpo_loss(X, torch.zeros(3), *PAIR, cu_seqlens=BORDERS), r"ref_logps: .*\(2,\)"),
        (
            lambda: fr.dpo_loss(X, torch.zeros(1, 5), *PAIR, cu_seqlens=BORDERS),
            r"ref_logps: .*\(5,\)",
        ),
        (
            lambda: fr.dpo_loss(X, X, torch.tensor([0]), torch.tensor([2]), cu_seqlens=BORDERS),
            r"yl_idxs: expected indices in \[0, 2\)",
        ),
        (
            lambda: fr.policy_loss(X, X, torch.zeros(3), ONES, cu_seqlens=BORDERS),
            r"advantages: expected shape \(5,\).*or \(B,\)",
        ),
        (
            lambda: fr.policy_loss(X, torch.zeros(2), X, ONES, cu_seqlens=BORDERS),
            r"old_logprobs: expected shape \(5,\)",
        ),
        (
            lambda: fr.value_loss(X, X, X, torch.ones(1, 5), cu_seqlens=BORDERS),
            r"mask: expected shape \(5,\)",
        ),
        (
            lambda: fr.shaped_rewards(X, X, X, ONES, kl_coef=0.1, cu_seqlens=BORDERS),
            r"scores: expected shape \(2,\)",
        ),
        (lambda: fr.gae(X, X, torch.ones(1, 5), cu_seqlens=BORDERS), r"mask: expected shape \(5,"),
    ],
)
def test_other_errors_name_their_argument(call, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


BORDERS = torch.tensor([0, 2, 5])


def test_checked_borders_are_int64_whatever_came() -> None:
    for dtype in (torch.int32, torch.int64):
        checked = checked_cu_seqlens("hidden", torch.zeros(5), BORDERS.to(dtype))
        assert checked.dtype == torch.int64 and torch.equal(checked, BORDERS)


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
