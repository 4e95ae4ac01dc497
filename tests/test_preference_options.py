"""The options of dpo_loss against their papers' formulas, and against TRL's trainer."""

import math
from typing import Any

import pytest
import torch
from support.preference_option_formulas import expected_losses
from torch import Tensor

import fastrlhf
from fastrlhf import dpo_loss

# A sequence in two pairs, one in none (6), one without tokens (5), pairs of unlike lengths.
YW, YL = torch.tensor([0, 1, 4, 0]), torch.tensor([2, 3, 5, 4])
LENGTHS = [4, 2, 3, 5, 1, 0, 3]
B, T = len(LENGTHS), 6
FINE = [torch.float64, torch.float32]

OPTIONS: dict[str, dict[str, Any]] = {
    "MPO": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "a list": {"loss_type": ["hinge", "ipo"], "loss_weights": [0.5, -2.0]},
    "equal weights": {"loss_type": ("apo_zero", "sigmoid_norm")},
    "sft alone": {"loss_type": "sft"},
    "one weight": {"loss_type": ("robust",), "loss_weights": (3.0,), "label_smoothing": 0.1},
    "RPO": {"rpo_alpha": 0.7},
    "RPO and SPPO": {"rpo_alpha": 0.7, "loss_type": "sppo_hard"},
    "reference-free": {"reference_free": True},
    "reference-free NCA": {"reference_free": True, "loss_type": "nca_pair"},
    "averaged": {"average": True},
    "averaged APO": {"average": True, "loss_type": "apo_down", "rpo_alpha": 0.3},
    "averaged and free": {"average": True, "reference_free": True, "loss_type": "hinge"},
    "forward KL": {"f_divergence": "forward_kl"},
    "forward KL, averaged": {"f_divergence": "forward_kl", "average": True},
    "JS": {"f_divergence": "js"},
    "JS of IPO": {"f_divergence": "js", "loss_type": "ipo"},
    "JS of EXO": {"f_divergence": "js", "loss_type": "exo_pair", "label_smoothing": 1e-2},
    "alpha": {"f_divergence": "alpha", "f_alpha": 0.3},
    "alpha of DiscoPOP": {"f_divergence": "alpha", "loss_type": "discopop", "discopop_tau": 0.5},
    "alpha and sft": {"f_divergence": "alpha", "loss_type": ("sigmoid_norm", "sft")},
    "LD": {"ld_alpha": 0.4},
    "LD, public tokens alone": {"ld_alpha": 0},
    "LD of IPO": {"ld_alpha": 0.4, "loss_type": "ipo"},
    "LD of SPPO, without reference": {
        "ld_alpha": 0.4, "loss_type": "sppo_hard", "reference_free": True,
    },
    "WPO": {"use_weighting": True},
    "WPO of NCA and sft": {
        "use_weighting": True, "loss_type": ("nca_pair", "sft"), "ld_alpha": 0.3,
    },
    "DPOP": {"dpop_lambda": 5.0},
    "DPOP of averages": {"dpop_lambda": 5.0, "loss_type": "sigmoid_norm"},
    "DPOP of everything": {
        "dpop_lambda": 2.0, "ld_alpha": 0.2, "rpo_alpha": 1.0, "loss_type": "hinge",
    },
}  # fmt: skip
NEEDS_TOKENS = ("ld_alpha", "use_weighting")


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Token log-probs (B, T), whose mask has holes and garbage around it."""
    mask = torch.stack([torch.randperm(T) < n for n in LENGTHS])
    pi = -2 * torch.rand(B, T, dtype=torch.float64)
    ref = pi + 0.5 * torch.randn(B, T, dtype=torch.float64)
    squares = -torch.rand(B, T, dtype=torch.float64)
    for x in (pi, ref, squares):
        x[~mask] = torch.nan
    pi, ref, squares = (x.to(dtype) for x in (pi, ref, squares))
    return {
        "pi": pi.requires_grad_(), "ref": ref.requires_grad_(), "mask": mask, "squares": squares,
    }  # fmt: skip


def call(x: dict[str, Tensor], options: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    squares = x["squares"] if options.get("use_weighting") else None
    return dpo_loss(
        x["pi"], x["ref"], YW, YL, 0.3, mask=x["mask"], log_sum_sq_probs=squares, **options, **more
    )


def gradients(losses: Tensor, x: dict[str, Tensor], weights: Tensor) -> list[Tensor]:
    """Of the weighted sum, with respect to policy and reference; zeros where there is none."""
    inputs = [x["pi"], x["ref"]]
    found = torch.autograd.grad(losses, inputs, weights, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_are_those_of_the_papers(name: str, dtype: torch.dtype) -> None:
    x, options = batch(dtype), OPTIONS[name]
    losses, rewards = call(x, options)
    assert losses.dtype == rewards.dtype == dtype and not rewards.requires_grad
    mask = x["mask"]
    expected = expected_losses(
        x["pi"], x["ref"], mask, YW, YL, 0.3, log_sum_sq_probs=x["squares"], **options
    )
    expected.assert_losses(losses, ulps=8, floor=1.0)
    upstream = torch.randn(4, dtype=torch.float64).to(dtype)
    found = gradients(losses, x, upstream)
    assert all(not g[~mask].any() for g in found)
    expected.assert_gradients(*(g[mask] for g in found), weights=upstream.tolist(), floor=1.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_tokens_are_the_same(name: str) -> None:
    x, options = batch(torch.float64), OPTIONS[name]
    lengths = torch.tensor([T, 2, T, 5, T, 0, T])  # packed, with padding or without
    keep = torch.arange(T) < lengths[:, None]
    x = {k: v.detach() for k, v in x.items()}
    for v in x.values():
        v[~keep] = 0
    padded = {**x, "pi": x["pi"].clone().requires_grad_(), "ref": x["ref"].clone().requires_grad_()}
    losses, rewards = call(padded, options)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    wanted = gradients(losses, padded, weights)
    packed = {k: v[keep] for k, v in x.items()}
    for shape in ((-1,), (1, -1)):
        of_shape = {k: v.reshape(shape) for k, v in packed.items()}
        of_shape["pi"].requires_grad_(), of_shape["ref"].requires_grad_()
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        found, of_packed = call(of_shape, options, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(found, losses, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(of_packed, rewards, rtol=1e-12, atol=1e-13)
        for g, expected in zip(gradients(found, of_shape, weights), wanted, strict=True):
            torch.testing.assert_close(g.flatten(), expected[keep], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in OPTIONS if not set(NEEDS_TOKENS) & {*OPTIONS[n]}])
def test_sums_with_lengths_are_the_same_as_tokens(name: str) -> None:
    x, options = batch(torch.float64), OPTIONS[name]
    sums = {k: torch.where(x["mask"], x[k], 0.0).sum(-1) for k in ("pi", "ref")}
    lengths = x["mask"].sum(-1)
    found = dpo_loss(sums["pi"], sums["ref"], YW, YL, 0.3, lengths=lengths, **options)
    mixed = dpo_loss(x["pi"], sums["ref"], YW, YL, 0.3, mask=x["mask"], **options)
    for of_sums, of_mixed, of_tokens in zip(found, mixed, call(x, options), strict=True):
        torch.testing.assert_close(of_sums, of_tokens, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(of_mixed, of_tokens, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_of_both_orders_are_right(name: str) -> None:
    x, options = batch(torch.float64), OPTIONS[name]
    # The hinge's and DPOP's corners are far enough away; weights are constants.
    x = {k: torch.where(x["mask"], v, torch.zeros_like(v)).detach() for k, v in x.items()}
    if options.get("use_weighting"):
        options = {k: v for k, v in options.items() if k != "use_weighting"}

    def losses_of(pi: Tensor, ref: Tensor) -> Tensor:
        return call({**x, "pi": pi, "ref": ref}, options, impl="eager")[0]

    inputs = (x["pi"].requires_grad_(), x["ref"].requires_grad_())
    assert torch.autograd.gradcheck(losses_of, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(losses_of, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_is_computed_in_fp32(name: str) -> None:
    x, options = batch(torch.bfloat16), OPTIONS[name]
    losses, rewards = call(x, options)
    assert losses.dtype == rewards.dtype == torch.float32
    wide = {k: v if k == "mask" else v.detach().float() for k, v in x.items()}
    expected = call(wide, options)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert x["pi"].grad is not None and x["pi"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPTIONS)
def test_without_pairs_there_are_no_losses(name: str) -> None:
    x, options, none = batch(torch.float32), OPTIONS[name], torch.zeros(0, dtype=torch.long)
    squares = x["squares"] if options.get("use_weighting") else None
    losses, rewards = dpo_loss(
        x["pi"], x["ref"], none, none, mask=x["mask"], log_sum_sq_probs=squares, **options
    )
    assert losses.shape == (0,) and rewards.shape == (B,)
    losses.sum().backward()
    assert not x["pi"].grad.any()


@pytest.mark.parametrize("name", ["MPO", "LD", "WPO"])
def test_it_compiles_whole(name: str) -> None:
    x, options = batch(torch.float64), OPTIONS[name]
    compiled = torch.compile(
        lambda pi: call({**x, "pi": pi}, options)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x["pi"]), call(x, options)[0])


@pytest.mark.parametrize(
    "name", ["MPO", "RPO", "JS", "LD", "WPO", "DPOP", "averaged", "reference-free"]
)
def test_it_works_under_transforms(name: str) -> None:
    x, options = batch(torch.float64), OPTIONS[name]
    pi = torch.where(x["mask"], x["pi"], 0.0).detach()
    ref = torch.where(x["mask"], x["ref"], 0.0).detach()

    def total(pi: Tensor) -> Tensor:
        return call({**x, "pi": pi, "ref": ref}, options)[0].square().sum()

    leaf = pi.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(pi), wanted)
    many = torch.stack((pi, 0.5 * pi))
    found = torch.func.vmap(torch.func.grad(total))(many)
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], torch.func.grad(total)(0.5 * pi))


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("score", [-12.0, -3.0, -1e-5, 1e-5, 3.0, 20.0, 200.0])
def test_scores_of_divergences_in_the_tails(
    score: float, divergence: str, dtype: torch.dtype
) -> None:
    pi = torch.tensor([[score], [0.0]], dtype=dtype).requires_grad_()
    ref, mask = torch.zeros(2, 1, dtype=dtype), torch.ones(2, 1, dtype=torch.bool)
    pair, options = (torch.tensor([0]), torch.tensor([1])), {"f_divergence": divergence}
    losses, rewards = dpo_loss(pi, ref, *pair, 1e-3, mask=mask, **options)
    expected = expected_losses(pi, ref, mask, *pair, 1e-3, **options)
    expected.assert_losses(losses)
    (found,) = torch.autograd.grad(losses, pi)
    expected.assert_gradients(found.flatten(), torch.zeros(2, dtype=dtype) - found.flatten())
    # The score itself keeps its relative accuracy at 0, where it is nearly s or s/2.
    if abs(score) < 1e-3:
        size = score * (0.5 if divergence == "js" else 1.0) * 1e-3
        assert rewards[0].item() == pytest.approx(size, rel=1e-4)


def test_the_divergences_meet_in_their_limits() -> None:
    x = batch(torch.float64)
    reverse = call(x, {})[0]
    near = call(x, {"f_divergence": "alpha", "f_alpha": 1e-9})[0]
    torch.testing.assert_close(near, reverse, rtol=1e-7, atol=0)
    forward = call(x, {"f_divergence": "forward_kl"})[0]
    assert torch.equal(call(x, {"f_divergence": "alpha", "f_alpha": 1.0})[0], forward)


def test_a_length_desensitized_loss_at_1_is_the_plain_one() -> None:
    x = batch(torch.float64)
    for loss_type in ("sigmoid", "nca_pair", "aot", "aot_unpaired", "ipo"):
        found = call(x, {"ld_alpha": 1.0, "loss_type": loss_type})
        expected = call(x, {"loss_type": loss_type})
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_tokens_that_cannot_be_have_infinite_losses_and_no_nan() -> None:
    pi, ref = torch.full((2, 3), -1.0), torch.full((2, 3), -1.0)
    pi[0, 2], mask = -math.inf, torch.tensor([[True] * 3, [True, True, False]])
    pair = torch.tensor([0]), torch.tensor([1])
    for alpha, expected in ((0, math.log(2)), (0.5, math.inf), (1, math.inf)):
        losses, _ = dpo_loss(pi, ref, *pair, mask=mask, ld_alpha=alpha)
        assert losses.item() == pytest.approx(expected)


def test_a_plain_call_keeps_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls = batch(torch.float32), []
    real = fastrlhf.losses.preference.preference_loss

    def seen(*args: Any, **options: Any) -> Any:
        calls.append(options["loss_type"])
        return real(*args, **options)

    monkeypatch.setattr("fastrlhf.losses.preference.preference_loss", seen)
    for options in ({}, {"loss_type": ("ipo",)}, {"reference_free": True}, {"loss_weights": [1]}):
        call(x, options)
    assert calls == ["sigmoid", "ipo", "sigmoid", "sigmoid"]
    for options in ({"loss_weights": [2]}, {"loss_type": ("ipo", "hinge")}, {"dpop_lambda": 1.0}):
        call(x, options)
    assert len(calls) == 4


def test_weights_of_sequences() -> None:
    x = batch(torch.float64)
    mask = x["mask"]
    for squares in (None, x["squares"]):
        terms = x["pi"].detach() - (0.0 if squares is None else squares)
        expected = [
            math.exp(row[m].mean()) if m.any() else 1.0 for row, m in zip(terms, mask, strict=True)
        ]
        found = fastrlhf.wpo_weights(x["pi"], mask, log_sum_sq_probs=squares)
        assert not found.requires_grad and found.tolist() == pytest.approx(expected, rel=1e-13)
    losses, _ = call(x, {"use_weighting": True})
    torch.testing.assert_close(losses, call(x, {})[0] * found[YW] * found[YL])


_SUMS, _TOKENS = torch.zeros(B), torch.zeros(B, T)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss_type": ()}, ValueError, "loss_type: expected at least one"),
        ({"loss_type": ("sigmoid", "dpo")}, ValueError, "loss_type: expected one of .*'dpo'"),
        ({"loss_type": ("hinge", "hinge")}, ValueError, "loss_type: expected different ones"),
        ({"loss_type": {"sigmoid"}}, TypeError, "loss_type: expected a string or a tuple.*set"),
        ({"loss_type": ("hinge", 1)}, TypeError, "loss_type: expected a string, got int"),
        ({"loss_weights": (1.0, 2.0)}, ValueError, "loss_weights: expected 1, .*got 2"),
        ({"loss_weights": 1.0}, TypeError, "loss_weights: expected a tuple"),
        ({"loss_weights": (math.inf,)}, ValueError, "loss_weights: .*finite"),
        ({"loss_type": "sft"}, ValueError, "lengths: .*'sft' averages"),
        ({"rpo_alpha": 1.0}, ValueError, "lengths: .*rpo_alpha averages"),
        ({"rpo_alpha": -1.0}, ValueError, "rpo_alpha: .*at least 0"),
        ({"rpo_alpha": math.inf}, ValueError, "rpo_alpha: .*finite"),
        ({"average": True}, ValueError, "lengths: .*average averages"),
        ({"average": 1}, TypeError, "average: expected a bool"),
        ({"reference_free": 1}, TypeError, "reference_free: expected a bool"),
        ({"use_weighting": 1}, TypeError, "use_weighting: expected a bool"),
        ({"ref_logps": None}, TypeError, "ref_logps: expected a tensor"),
        ({"f_divergence": "kl"}, ValueError, "f_divergence: expected one of"),
        ({"f_alpha": 0.0}, ValueError, "f_alpha: expected a positive"),
        ({"f_alpha": 1.5}, ValueError, r"f_alpha: .*\[0, 1\]"),
        ({"ld_alpha": 1.5}, ValueError, r"ld_alpha: .*\[0, 1\]"),
        ({"ld_alpha": 0.5}, ValueError, "mask: expected a tensor with ld_alpha"),
        ({"dpop_lambda": -1.0}, ValueError, "dpop_lambda: .*at least 0"),
        ({"dpop_lambda": 1.0, "loss_type": "apo_zero"}, ValueError, "dpop_lambda: .*'apo_zero'"),
        ({"f_divergence": "js", "loss_type": ("hinge", "aot")}, ValueError, ".*'aot'"),
        ({"f_divergence": "js", "dpop_lambda": 1.0}, ValueError, "dpop_lambda: .*'js'"),
        ({"average": True, "loss_type": "ipo"}, ValueError, "average: expected False .*'ipo'"),
        ({"use_weighting": True, "loss_type": "aot"}, ValueError, "use_weighting: .*'aot'"),
        ({"use_weighting": True}, ValueError, "mask: expected a tensor with use_weighting"),
        ({"log_sum_sq_probs": _SUMS}, ValueError, "log_sum_sq_probs: .*without use_weighting"),
        ({"log_sum_sq_probs": [0.0]}, TypeError, "log_sum_sq_probs: expected a tensor"),
        ({"gamma": 1.0}, TypeError, "dpo_loss: unexpected option 'gamma'; expected one"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"pi_logps": _SUMS, "ref_logps": _SUMS, "yw_idxs": YW, "yl_idxs": YL, **changed}
    with pytest.raises(error, match=f"^{message}"):
        dpo_loss(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ld_alpha": 0.5, "ref_logps": _SUMS}, r"ref_logps: .*with ld_alpha, got \(7,\)"),
        ({"ld_alpha": 0.5, "average": True}, "average: expected False with ld_alpha"),
        ({"use_weighting": True}, "log_sum_sq_probs: expected a tensor with use_weighting"),
        (
            {"use_weighting": True, "log_sum_sq_probs": _SUMS},
            r"log_sum_sq_probs: expected shape \(7, 6\)",
        ),
    ],
)
def test_errors_of_tokens_name_the_argument(changed: dict[str, Any], message: str) -> None:
    arguments = {"pi_logps": _TOKENS, "ref_logps": _TOKENS, "yw_idxs": YW, "yl_idxs": YL}
    with pytest.raises(ValueError, match=f"^{message}"):
        dpo_loss(**{**arguments, "mask": _TOKENS == 0, **changed})


@pytest.mark.parametrize("mutant", ["no penalty", "rate off", "public length off", "weight off"])
def test_the_comparison_rejects(mutant: str) -> None:
    x = batch(torch.float32)
    right, wrong = {
        "no penalty": ({"dpop_lambda": 5.0}, {}),
        "rate off": ({"f_divergence": "alpha"}, {"f_divergence": "alpha", "f_alpha": 0.501}),
        "public length off": ({"ld_alpha": 0.5}, {"ld_alpha": 0.501}),
        "weight off": ({"rpo_alpha": 1.0}, {"rpo_alpha": 1.001}),
    }[mutant]
    expected = expected_losses(x["pi"], x["ref"], x["mask"], YW, YL, 0.3, **right)
    expected.assert_losses(call(x, right)[0], ulps=8, floor=1.0)
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(call(x, wrong)[0], ulps=8, floor=1.0)


@pytest.mark.parametrize("f_divergence", ["forward_kl", "alpha", "js"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust", "exo_pair", "discopop"])
def test_pairs_that_are_far_apart_have_a_direction_and_no_nan(loss_type, f_divergence) -> None:
    options = {"f_divergence": f_divergence, "loss_type": loss_type, "f_alpha": 1.0}
    options |= {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair") else {}
    for chosen, rejected in ((1.0, -100.0), (1.0, -1e4), (-100.0, 1.0), (-100.0, -101.0)):
        scores = torch.tensor([chosen, rejected], requires_grad=True)
        losses, _ = fastrlhf.dpo_loss(
            scores, torch.zeros(2), torch.tensor([0]), torch.tensor([1]), **options
        )
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        assert gradient.isfinite().all()
        if chosen > 0 and loss_type in ("sigmoid", "hinge"):  # won, by whatever margin
            assert f_divergence == "js" or not gradient.any()
        elif chosen < 0 and loss_type in ("sigmoid", "hinge") and f_divergence != "js":
            assert gradient[0] < 0
