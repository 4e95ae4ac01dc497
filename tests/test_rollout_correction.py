"""Rollout corrections, rejections and their metrics, against their definitions in 60 digits."""

import inspect
import math
import textwrap
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from support import rollout_formulas as formulas
from support.compare import assert_as_accurate
from support.no_waiting import NoWaiting
from torch import Tensor

from fastrlhf import policy_loss, rollout_correction, rollout_metrics, rollout_rejection
from fastrlhf.losses.rejection import RejectionEstimator, RejectionLevel
from fastrlhf.losses.rollout import RolloutMode

MODES = get_args(RolloutMode)
LEVELS, ESTIMATORS = get_args(RejectionLevel), get_args(RejectionEstimator)
ALL_MODES = pytest.mark.parametrize("mode", MODES)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
GARBAGE = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
B, T = 6, 9

Batch = tuple[Tensor, Tensor, Tensor]


def batch(
    dtype: torch.dtype = torch.float64, scale: float = 0.4, garbage: float = math.nan
) -> Batch:
    """Log-probs of both sides, and which count: none of the third sequence, one of the fourth."""
    mask = torch.rand(B, T) < 0.7
    mask[2], mask[3] = False, torch.arange(T) == 4
    logprobs = -4 * torch.rand(B, T, dtype=torch.float64)
    rollout = logprobs + scale * torch.randn(B, T, dtype=torch.float64)
    kept = (torch.where(mask, x, garbage).to(dtype) for x in (logprobs, rollout))
    return *kept, mask  # type: ignore[return-value]


def plain(
    logprobs: Tensor, rollout: Tensor, mask: Tensor, mode: str, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formulas as they are usually written: weights, and those metrics that round most."""
    x = torch.where(mask, logprobs - rollout, 0.0)
    lengths = mask.sum(-1).clamp(min=1)
    there = mask.sum(-1) > 0
    level, treatment = mode.split("_")
    sums = {"token": x, "sequence": x.sum(-1), "geometric": x.sum(-1) / lengths}[level]
    ratio = sums.exp()
    outside = (ratio < low) | (ratio > high)
    weights = ratio.clamp(low, high) if treatment == "truncate" else ratio.masked_fill(outside, 0.0)
    units = mask if level == "token" else there
    metrics = {}
    for name, values in (("ratio", ratio[units]), ("rollout_is", weights[units])):
        metrics |= {
            f"rollout_corr/{name}_mean": values.mean(),
            f"rollout_corr/{name}_std": values.std(correction=0),
            f"rollout_corr/{name}_min": values.min(), f"rollout_corr/{name}_max": values.max(),
            f"rollout_corr/{name}_eff_sample_size": values.mean() ** 2 / values.square().mean(),
        }  # fmt: skip
    own, engine = (torch.where(mask, v, 0.0).sum(-1)[there] for v in (logprobs, rollout))
    own, engine = own / lengths[there], engine / lengths[there]
    metrics |= {
        "rollout_corr/kl": -x[mask].mean(),
        "rollout_corr/k3_kl": (x.exp() - 1 - x)[mask].mean(),
        "rollout_corr/chi2_token": x[mask].exp().square().mean() - 1,
        "rollout_corr/chi2_seq": (2 * x.sum(-1)).exp()[there].mean() - 1,
        "rollout_corr/training_ppl": (-own).exp().mean(),
        "rollout_corr/training_log_ppl": -own.mean(),
        "rollout_corr/rollout_ppl": (-engine).exp().mean(),
        "rollout_corr/rollout_log_ppl": -engine.mean(),
        "rollout_corr/log_ppl_diff": (engine - own).mean(),
        "rollout_corr/log_ppl_abs_diff": (engine - own).abs().mean(),
        "rollout_corr/ppl_ratio": (engine - own).exp().mean(),
        "sampling/sampling_logp_difference/mean": x.abs()[mask].mean(),
        "sampling/sampling_logp_difference/max": x.abs()[mask].max(),
    }  # fmt: skip
    return weights if level == "token" else weights.unsqueeze(-1).expand(mask.shape), metrics


def flat(rows: list[list[Any]]) -> Tensor:
    return torch.tensor([float(x) for row in rows for x in row], dtype=torch.float64)


# rollout_correction


@ALL_MODES
@DTYPES
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalised"])
def test_weights_and_metrics_are_those_of_the_definitions(mode, dtype, normalize) -> None:
    logprobs, rollout, mask = batch(dtype)
    low, high = (0.9, 1.15) if mode.startswith("geometric") else (0.7, 1.5)
    weights, metrics = rollout_correction(
        logprobs, rollout, mask, mode=mode, clip_min=low, clip_max=high, batch_normalize=normalize
    )
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert weights.dtype == wanted and weights.shape == mask.shape and not weights[~mask].any()
    expected, described = formulas.correction(
        logprobs, rollout, mask, mode, low, high, normalize
    )  # fmt: skip
    exact = flat(expected)
    if mode.endswith("mask"):
        assert 0 < (exact == 0).sum() < len(exact), "both kinds"
    usual, usual_metrics = plain(logprobs.to(wanted), rollout.to(wanted), mask, mode, low, high)
    if normalize:
        usual = usual / usual_metrics["rollout_corr/rollout_is_mean"]
    assert_as_accurate(weights[mask], usual[mask], exact, of="weights")
    assert metrics.keys() == described.keys()
    for name, value in metrics.items():
        assert value.shape == () and value.dtype == wanted and not value.requires_grad, name
        truth = torch.tensor(float(described[name]), dtype=torch.float64)
        as_usual = usual_metrics.get(name, truth)
        assert_as_accurate(value, as_usual, truth, size=max(2.0, abs(float(truth))), of=name)


def test_an_example_by_hand() -> None:
    log2 = math.log(2)
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64)
    rollout = torch.tensor([[-1 - 2 * log2, -1.0, -1 + log2]], dtype=torch.float64)
    mask = torch.ones(1, 3)
    near = pytest.approx  # ratios 4, 1 and 1/2, of product 2

    def weights(mode: str, **bounds: float | None) -> list[float]:
        return rollout_correction(logprobs, rollout, mask, mode=mode, **bounds)[0][0].tolist()

    assert weights("token_truncate") == near([2, 1, 0.5])
    assert weights("token_truncate", clip_min=0.8) == near([2, 1, 0.8])
    assert weights("token_mask", clip_max=3, clip_min=0.8) == near([0, 1, 0])
    assert weights("token_mask", clip_max=None) == near([4, 1, 0.5])
    assert weights("token_mask", clip_max=None, clip_min=0.8) == near([4, 1, 0])
    assert weights("sequence_truncate", clip_max=1.5) == near([1.5] * 3)
    assert weights("sequence_mask", clip_max=3) == near([2] * 3)
    assert weights("sequence_mask", clip_max=1.9) == [0, 0, 0]
    assert weights("geometric_truncate") == near([2 ** (1 / 3)] * 3)
    assert weights("geometric_mask", clip_max=1.25) == [0, 0, 0]
    _, metrics = rollout_correction(logprobs, rollout, mask)
    assert metrics["rollout_corr/rollout_is_mean"].item() == near(3.5 / 3)
    assert metrics["rollout_corr/ratio_mean"].item() == near(5.5 / 3)
    assert metrics["rollout_corr/rollout_is_eff_sample_size"].item() == near(3.5**2 / (3 * 5.25))
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"].item() == near(1 / 3)


def from_trl(mode: str, low: float | None, high: float | None, batch: Batch) -> Tensor:
    """What the lines of TRL's GRPOTrainer between its log-probs and its reference model compute."""
    pytest.importorskip("trl", reason="needs trl")
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    start = source.index(
        "            if self.use_vllm and self.vllm_importance_sampling_correction:"
    )
    stop = source.index("            # Compute the per-token log probabilities for the reference")
    trainer = SimpleNamespace(
        use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    names = {
        "self": trainer, "torch": torch, "math": math, "tool_mask": None,
        "old_per_token_logps": batch[0], "sampling_per_token_logps": batch[1],
        "completion_mask": batch[2].long(),
    }  # fmt: skip
    exec(textwrap.dedent(source[start:stop]), names)
    return names["vllm_importance_sampling_ratio"].expand(B, T)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bounds", [(None, 3.0), (0.5, 2.0), (0.8, None)], ids=str)
@pytest.mark.parametrize("mode", [m for m in MODES if not m.startswith("geometric")])
def test_modes_of_trl_have_its_weights(mode, bounds) -> None:
    x = batch(garbage=0.0)
    found, _ = rollout_correction(*x, mode=mode, clip_min=bounds[0], clip_max=bounds[1])
    expected = from_trl(mode, *bounds, x)[x[2]]
    torch.testing.assert_close(found[x[2]], expected, rtol=1e-13, atol=0)


@ALL_MODES
@pytest.mark.parametrize("leading", [(), (1,)], ids=["(N,)", "(1, N)"])
@pytest.mark.parametrize(
    "lengths",
    [[9, 3, 2, 0, 7, 0], [3, 0, 1, 2, 0, 0]],
    ids=["unequal", "as many tokens as sequences"],
)
def test_packed_tokens_have_the_weights_of_rows(mode, leading, lengths) -> None:
    logprobs, rollout, mask = batch()
    there = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    cu_seqlens = torch.nn.functional.pad(there.sum(-1).cumsum(0), (1, 0))
    packed = [x[there].reshape(*leading, -1) for x in (logprobs, rollout, mask)]
    options = {"mode": mode, "clip_max": 1.1, "clip_min": 0.9, "batch_normalize": True}
    calls = [(rollout_correction, options)]
    calls += [(rollout_rejection, {"level": level, "upper": 0.1}) for level in LEVELS]
    for function, options in calls:
        found, metrics = function(*packed, cu_seqlens=cu_seqlens, **options)
        whole, of_whole = function(logprobs, rollout, mask & there, **options)
        assert found.shape == packed[0].shape
        torch.testing.assert_close(found.reshape(-1), whole[there], rtol=1e-13, atol=0)
        for name, value in metrics.items():
            torch.testing.assert_close(value, of_whole[name], rtol=1e-12, atol=1e-14, msg=name)


@ALL_MODES
@GARBAGE
def test_what_is_outside_of_the_mask_can_be_anything(mode, garbage) -> None:
    torch.manual_seed(1)
    clean = batch(garbage=0.0)
    torch.manual_seed(1)
    dirty = batch(garbage=garbage)
    for function, options in (
        (rollout_correction, {"mode": mode}),
        (rollout_rejection, {"upper": 0.1, "level": "sequence_mean"}),
    ):
        found, metrics = function(*dirty, **options)
        expected, of_clean = function(*clean, **options)
        assert torch.equal(found, expected)
        assert all(torch.equal(metrics[name], value) for name, value in of_clean.items())


@ALL_MODES
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5)], ids=str)
def test_without_tokens_there_is_nothing_to_correct(mode, shape) -> None:
    x = torch.full(shape, math.nan)
    mask = torch.zeros(shape)
    weights, metrics = rollout_correction(x, x, mask, mode=mode, batch_normalize=True)
    assert weights.shape == shape and not weights.any()
    assert metrics.pop("rollout_corr/rollout_is_batch_norm_factor") == 1
    keep, more = rollout_rejection(x, x, mask, upper=1.0)
    assert not keep.any() and not any({**metrics, **more}.values())
    none = torch.zeros(0)
    rollout_correction(none, none, none, mode=mode, cu_seqlens=torch.tensor([0, 0]))
    rollout_correction(none, none, none, mode=mode, cu_seqlens=torch.tensor([0]))


@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("far", [1e4, -1e4], ids=["too likely", "too unlikely"])
def test_policies_far_apart_overflow_nowhere(mode, dtype, far) -> None:
    tokens = 20_000
    rollout = torch.full((2, tokens), -1.0, dtype=dtype)
    logprobs = rollout.clone()
    logprobs[0] += far / tokens if mode.startswith("sequence") else far
    ratio = 0.0 if far < 0 else math.exp(80 if dtype == torch.float32 else 700)
    for bound in (None, 3.0):
        weights, metrics = rollout_correction(
            logprobs, rollout, torch.ones(2, tokens), mode=mode, clip_max=bound
        )
        if bound is None:
            expected = ratio
        elif mode.endswith("mask"):
            expected = 0.0
        else:
            expected = min(ratio, bound)
        torch.testing.assert_close(
            weights[0], torch.full_like(weights[0], expected), rtol=1e-4, atol=0
        )
        assert torch.equal(weights[1], torch.ones_like(weights[1]))
        assert all(value.isfinite() for value in metrics.values()), metrics
    for level, estimator in product(LEVELS, ESTIMATORS):
        keep, metrics = rollout_rejection(
            logprobs, rollout, torch.ones(2, tokens), level=level, estimator=estimator, upper=1e-2
        )
        assert (
            not keep[0].any()
            and keep[1].all()
            and all(value.isfinite() for value in metrics.values())
        )


def test_a_token_that_one_side_rules_out() -> None:
    none = -math.inf
    logprobs = torch.tensor([[none, -1.0], [-1.0, -1.0], [none, -1.0], [none, -1.0]])
    rollout = torch.tensor([[-1.0, -1.0], [none, -1.0], [none, -1.0], [-9.0, none]])
    mask = torch.ones(4, 2)

    def weights(mode: str, clip_max: float | None) -> list[list[float]]:
        found, metrics = rollout_correction(logprobs, rollout, mask, mode=mode, clip_max=clip_max)
        assert all(value.isfinite() for value in metrics.values())
        return found.tolist()

    assert weights("token_truncate", 2.0) == [[0, 1], [2, 1], [1, 1], [0, 2]]
    assert weights("token_mask", 2.0) == [[0, 1], [0, 1], [1, 1], [0, 0]]
    # A sequence that the trainer's policy cannot make has no weight, whatever the engine says.
    for level in ("sequence", "geometric"):
        assert weights(f"{level}_truncate", 2.0) == [[0, 0], [2, 2], [1, 1], [0, 0]]
        assert weights(f"{level}_mask", 2.0) == [[0, 0], [0, 0], [1, 1], [0, 0]]
    top = math.exp(80)
    assert weights("token_truncate", None)[1] == pytest.approx([top, 1], rel=1e-4)
    for level, estimator in product(LEVELS, ESTIMATORS):
        keep, metrics = rollout_rejection(
            logprobs, rollout, mask, level=level, estimator=estimator, upper=0.5
        )
        token = [[False, True], [False, True], [True, True], [False, False]]
        assert keep.tolist() == (token if level == "token" else [[all(k)] * 2 for k in token])
        assert all(value.isfinite() for value in metrics.values())


@ALL_MODES
def test_nan_is_not_hidden(mode) -> None:
    logprobs, rollout, mask = batch(garbage=0.0)
    rollout[0, 0], mask[0, 0] = math.nan, True
    weights, metrics = rollout_correction(logprobs, rollout, mask, mode=mode)
    hit = mask[0] if not mode.startswith("token") else torch.arange(T) == 0
    assert weights[0].isnan().equal(hit) and weights[1:].isfinite().all()
    assert metrics["rollout_corr/kl"].isnan() and metrics["rollout_corr/ratio_max"].isnan()
    assert not rollout_rejection(logprobs, rollout, mask, upper=1e9)[0][0, 0]


def test_bounds_are_within_and_may_be_equal() -> None:
    logprobs, rollout = torch.tensor([[0.0, 0.5, -0.5]]), torch.zeros(1, 3)
    options = {"clip_max": 1.0, "clip_min": 1.0}  # of which no exponential is away
    found, metrics = rollout_correction(
        logprobs, rollout, torch.ones(1, 3), mode="token_mask", **options
    )
    assert found[0].tolist() == [1, 0, 0]
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"].item() == pytest.approx(1 / 3)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_low"].item() == pytest.approx(1 / 3)
    found, _ = rollout_correction(logprobs, rollout, torch.ones(1, 3), **options)
    assert found[0].tolist() == [1, 1, 1]
    keep, _ = rollout_rejection(logprobs, rollout, torch.ones(1, 3), upper=0.5)
    assert keep.all()


def test_no_weight_is_above_its_bound_by_rounding() -> None:
    bound = torch.linspace(1.01, 3.0, 2000)
    logprobs = bound.log().unsqueeze(0)
    for place in range(0, 2000, 50):
        most = float(bound[place])
        found, _ = rollout_correction(
            logprobs, torch.zeros(1, 2000), torch.ones(1, 2000), clip_max=most
        )
        assert found.max() <= most


def test_they_are_constants_of_the_loss_and_are_compiled_whole() -> None:
    logprobs, rollout, mask = batch(torch.float32, garbage=0.0)
    leaf = logprobs.clone().requires_grad_()
    weights, metrics = rollout_correction(leaf, rollout, mask)
    assert not weights.requires_grad and not any(v.requires_grad for v in metrics.values())

    def step(logprobs: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights, _ = rollout_correction(logprobs, rollout, mask, mode="sequence_truncate")
        return weights, rollout_rejection(logprobs, rollout, mask, upper=0.3)[0]

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(logprobs, rollout, mask)
    torch.testing.assert_close(found, step(logprobs, rollout, mask))
    of_samples = torch.func.vmap(step)(*(torch.stack((x, x)) for x in (logprobs, rollout, mask)))
    torch.testing.assert_close(of_samples[0][1], found[0])


def test_nobody_waits_for_the_device() -> None:
    x = batch()
    with NoWaiting():
        for mode in MODES:
            rollout_correction(*x, mode=mode, clip_min=0.5, batch_normalize=True)
        for level, estimator in product(LEVELS, ESTIMATORS):
            rollout_rejection(*x, level=level, estimator=estimator, upper=0.1)


def test_a_sequence_mask_with_token_weights_is_their_product() -> None:
    logprobs, rollout, mask = batch(garbage=0.0)
    low, high = 0.9, 1.1
    weights, _ = rollout_correction(logprobs, rollout, mask, clip_max=1.3)
    keep, _ = rollout_rejection(
        logprobs, rollout, mask, level="sequence_mean", upper=-math.log(low), lower=-math.log(high)
    )
    x = torch.where(mask, logprobs - rollout, 0.0)
    geometric = (x.sum(-1) / mask.sum(-1).clamp(min=1)).exp()
    within = (low <= geometric) & (geometric <= high)
    expected = torch.where(mask & within.unsqueeze(-1), x.exp().clamp(max=1.3), 0.0)
    assert 0 < within.sum() < B
    torch.testing.assert_close(weights * keep, expected)
    advantages = torch.randn(B, T, dtype=torch.float64)
    loss, _ = policy_loss(logprobs, None, advantages, mask, rollout_weights=weights * keep)
    torch.testing.assert_close(loss, -(expected * advantages)[mask].sum() / mask.sum())


# rollout_rejection, rollout_metrics


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@DTYPES
def test_what_is_kept_is_within_the_bounds(level, estimator, dtype) -> None:
    x = batch(dtype)
    upper = {"k1": 0.25, "k2": 0.08, "k3": 0.1}[estimator] * (2 if level == "sequence_sum" else 1)
    lower = -0.3 if estimator == "k1" else None
    keep, metrics = rollout_rejection(
        *x, level=level, estimator=estimator, upper=upper, lower=lower
    )
    expected, described = formulas.rejection(
        *x, level, estimator, -math.inf if lower is None else lower, upper
    )
    assert keep.dtype == torch.bool and not keep[~x[2]].any()
    assert keep[x[2]].tolist() == [k for row in expected for k in row]
    assert metrics.keys() == described.keys()
    for name, value in metrics.items():
        truth = torch.tensor(float(described[name]), dtype=torch.float64)
        assert value.shape == () and not value.requires_grad
        # Of a few terms of about 1, each of them rounded once.
        assert_as_accurate(value, truth.to(value.dtype), truth, size=8.0, of=name)


def test_bounds_of_k1_are_symmetric_unless_given() -> None:
    rollout = torch.tensor([[0.4, -0.4, -9.0, 0.6]])
    logprobs, mask = torch.zeros(1, 4), torch.ones(1, 4)
    for lower, expected in ((None, [1, 1, 0, 0]), (-math.inf, [1, 1, 1, 0]), (0.0, [1, 0, 0, 0])):
        keep, metrics = rollout_rejection(logprobs, rollout, mask, upper=0.5, lower=lower)
        assert keep[0].tolist() == expected
        share = metrics["rollout_corr/rollout_rs_token_k1_masked_fraction"]
        assert share == 1 - sum(expected) / 4
    keep, _ = rollout_rejection(logprobs, rollout, mask, upper=-8.0, lower=-10.0)
    assert keep[0].tolist() == [False, False, True, False]


def test_metrics_alone_are_those_of_a_correction() -> None:
    x = batch()
    alone, more = rollout_metrics(*x), rollout_correction(*x)[1]
    assert all(torch.equal(more[name], value) for name, value in alone.items())
    assert not rollout_correction(*x, mode="token_mask")[1].keys() - more.keys()


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_metrics_are_accurate_where_both_sides_nearly_agree(gap) -> None:
    rollout = torch.linspace(-0.5, -0.25, 64).view(2, 32)
    logprobs = rollout + gap * torch.linspace(-1, 1, 64).view(2, 32)
    mask = torch.ones(2, 32)
    found = rollout_metrics(logprobs, rollout, mask)
    exact = rollout_metrics(logprobs.double(), rollout.double(), mask)
    # Each of these is a sum of what was e^x - 1, and not of ones.
    for name, size in (("k3_kl", gap**2), ("chi2_token", gap), ("chi2_seq", 32 * gap)):
        value, truth = found[f"rollout_corr/{name}"], exact[f"rollout_corr/{name}"]
        assert_as_accurate(value, truth.float(), truth, size=4 * size, of=name)


def test_either_side_may_be_in_another_dtype() -> None:
    logprobs, rollout, mask = batch()
    both = rollout_correction(logprobs.float(), rollout, mask)[0]
    assert both.dtype == torch.float64
    torch.testing.assert_close(
        both, rollout_correction(logprobs.float().double(), rollout, mask)[0]
    )
    assert rollout_correction(logprobs.bfloat16(), rollout.half(), mask)[0].dtype == torch.float32


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "token"}, ValueError, "mode: expected one of token_truncate"),
        ({"clip_max": 0.0}, ValueError, "clip_max: "),
        ({"clip_max": math.inf}, ValueError, "clip_max: "),
        ({"clip_max": "2"}, TypeError, "clip_max: "),
        ({"clip_min": -0.5}, ValueError, r"clip_min: expected a number in \[0, clip_max\]"),
        ({"clip_min": 2.5}, ValueError, r"clip_min: expected a number in \[0, clip_max\]"),
        ({"clip_min": math.nan}, ValueError, "clip_min: "),
        ({"batch_normalize": 1}, TypeError, "batch_normalize: "),
        ({"rollout_logprobs": torch.zeros(B, T - 1)}, ValueError, "rollout_logprobs: "),
        ({"rollout_logprobs": torch.zeros(B, T).long()}, TypeError, "rollout_logprobs: "),
        ({"mask": torch.zeros(B)}, ValueError, "mask: "),
        ({"group": "world"}, TypeError, "group: "),
    ],
)
def test_what_does_not_fit_a_correction_is_named(options, error, message) -> None:
    good = dict(zip(("logprobs", "rollout_logprobs", "mask"), batch(), strict=True))
    with pytest.raises(error, match=f"^{message}"):
        rollout_correction(**{**good, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "sequence"}, ValueError, "level: "),
        ({"estimator": "abs"}, ValueError, "estimator: "),
        ({"upper": -1.0}, ValueError, "upper: "),
        ({"upper": 0.0, "estimator": "k3"}, ValueError, "upper: "),
        ({"upper": math.nan}, ValueError, "upper: "),
        ({"lower": 2.0}, ValueError, "lower: "),
        ({"lower": 0.0, "estimator": "k2"}, ValueError, "lower: expected None for estimator 'k2'"),
    ],
)
def test_what_does_not_fit_a_rejection_is_named(options, error, message) -> None:
    with pytest.raises(error, match=f"^{message}"):
        rollout_rejection(*batch(), **{"upper": 1.0, **options})
