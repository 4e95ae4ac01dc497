"""The loss of supervised fine-tuning from logits, with weights of tokens and as DFT."""

from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate, assert_gradient_as_accurate
from support.kept import everything, random_support
from support.supervised_formulas import TokenLoss, token_losses
from support.traffic import counted_traffic
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import cross_entropy, linear_cross_entropy

TOKENS, VOCAB = 12, 7
LOSSES = {
    "nll": {},
    "smoothed": {"label_smoothing": 0.2},
    "all smooth": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.03},
    "both": {"label_smoothing": 0.1, "z_loss": 0.01},
    "dft": {"loss_type": "dft"},
    "dft and z-loss": {"loss_type": "dft", "z_loss": 0.01},
}  # fmt: skip
TRANSFORMS = {
    "plain": {},
    "all": {"temperature": 0.7, "softcap": 3.0, "scale": 1.5},
}  # fmt: skip
IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])


def batch(dtype=torch.float64, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 6, V) with garbage where the target is ignored, targets, and weights of which some
    are 0, some negative, and those of ignored tokens garbage.
    """
    targets = torch.randint(vocab, (TOKENS,))
    targets[1::3] = -100
    logits, weights = 2 * torch.randn(TOKENS, vocab), torch.randn(TOKENS)
    logits[1], logits[4], weights[1], weights[4] = torch.nan, torch.inf, torch.nan, torch.inf
    weights[2] = 0
    shaped = (x.unflatten(0, (2, 6)) for x in (logits.to(dtype), targets, weights))
    logits, targets, weights = shaped
    return logits.requires_grad_(), targets, weights


def plain(logits, targets, weights=None, **options) -> Tensor:
    """The losses (...) of tokens by torch's own cross-entropy."""
    live = targets != -100
    z = torch.where(live.unsqueeze(-1), logits, 0.0)
    smoothing = options.get("label_smoothing", 0.0)
    losses = F.cross_entropy(
        z.flatten(0, -2), targets.flatten(), reduction="none", label_smoothing=smoothing
    ).view(targets.shape)
    if options.get("loss_type") == "dft":
        losses = losses * (-losses).exp().detach()
    losses = losses + torch.where(live, options.get("z_loss", 0.0) * z.logsumexp(-1).square(), 0.0)
    return losses if weights is None else losses * torch.where(live, weights, 0.0)


@IMPLS
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighed", [False, True])
def test_losses_and_gradients_are_those_of_the_formula(
    weighed, loss, transform, impl, device
) -> None:
    logits, targets, weights = batch()
    options = LOSSES[loss] | TRANSFORMS[transform]
    of_tokens, slopes = token_losses(
        TokenLoss(**options), logits.detach().flatten(0, 1), targets.flatten(),
        weights.flatten() if weighed else None,
    )  # fmt: skip
    given = logits.to(device if impl == "triton" else "cpu")
    more = {"weights": weights.to(given.device)} if weighed else {}
    losses = cross_entropy(
        given, targets.to(given.device), reduction="none", impl=impl, **more, **options
    )
    torch.testing.assert_close(losses.cpu().flatten(), of_tokens, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(losses.shape, dtype=losses.dtype)
    (gradient,) = autograd.grad(losses, logits, upstream.to(given.device))
    expected = slopes * upstream.flatten().unsqueeze(1)
    torch.testing.assert_close(gradient.flatten(0, 1), expected, rtol=1e-11, atol=1e-13)
    assert not gradient[targets == -100].any()


@pytest.mark.parametrize(
    ("impl", "loss", "dtype"),
    [
        *product(["eager", "triton"], LOSSES, [torch.float32, torch.bfloat16, torch.float16]),
        ("compiled", "both", torch.float32),
    ],
)
def test_as_accurate_as_the_plain_formula(impl, loss, dtype, device) -> None:
    logits, targets, weights = batch(dtype, 300)
    place, options = device if impl == "triton" else "cpu", LOSSES[loss]
    found = []
    for wide in (torch.float64, torch.float32, None):
        x = logits.detach().to(wide or dtype).to(place if wide is None else "cpu").requires_grad_()
        if wide is None:
            losses = cross_entropy(
                x, targets.to(place), weights=weights.to(place), reduction="none", impl=impl,
                **options,
            )  # fmt: skip
            assert losses.dtype == torch.float32
        else:
            losses = plain(x, targets, weights, **options)
        (gradient,) = autograd.grad(losses.sum(), x)
        found.append((losses.cpu(), gradient.cpu().flatten(0, 1)))
    (exact, d_exact), (formula, d_formula), (ours, d_ours) = found
    assert_as_accurate(ours, formula, exact)
    # What weighs nothing has no gradient, by which an error could be measured.
    counted = torch.where(weights.flatten() == 0, -1, targets.flatten())
    assert_gradient_as_accurate(d_ours, d_formula.to(dtype), d_exact, counted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_torchs_cross_entropy(reduction, smoothing) -> None:
    logits, targets, _ = batch()
    clean = torch.where((targets == -100).unsqueeze(-1), 0.0, logits)
    wanted = F.cross_entropy(
        clean.flatten(0, 1), targets.flatten(), reduction=reduction, label_smoothing=smoothing
    )
    found = cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(found, wanted.view(found.shape), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("zeta", [0.0, 1e-2])
def test_it_is_ligers_cross_entropy(zeta, smoothing, device) -> None:
    liger = pytest.importorskip("liger_kernel.transformers.functional", reason="needs liger-kernel")
    logits, targets, _ = batch(torch.float32, 130)
    logits = torch.where((targets == -100).unsqueeze(-1), 0.0, logits.detach()).flatten(0, 1)
    targets = targets.flatten()
    exact = plain(logits.double(), targets, label_smoothing=smoothing, z_loss=zeta)
    live = (targets != -100).sum()
    given = logits.to(device).clone().requires_grad_()  # which Liger overwrites
    theirs = liger.liger_cross_entropy(
        given * 1, targets.to(device), label_smoothing=smoothing, lse_square_scale=zeta
    )
    (d_theirs,) = autograd.grad(theirs, given)
    x = logits.clone().requires_grad_()
    ours = cross_entropy(x, targets, label_smoothing=smoothing, z_loss=zeta)
    (d_ours,) = autograd.grad(ours, x)
    assert_as_accurate(ours, theirs, exact.sum() / live)
    assert_as_accurate(theirs, ours, exact.sum() / live)
    wide = logits.double().requires_grad_()
    (d_exact,) = autograd.grad(
        plain(wide, targets, label_smoothing=smoothing, z_loss=zeta).sum() / live, wide
    )
    assert_gradient_as_accurate(d_theirs.cpu(), d_ours, d_exact, targets)


def test_dft_is_that_of_trl() -> None:
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="needs trl")
    logits, targets, _ = batch()
    logprob = fastrlhf.token_logprobs(logits, targets)
    live = targets != -100
    outputs = SimpleNamespace(
        log_probs=logprob, label_mask=live, entropy=logprob.detach(), is_top1=live
    )
    trainer = MagicMock(aux_loss_enabled=False, compute_loss_func=None, label_smoother=None)
    trainer.args = MagicMock(loss_type="dft", average_tokens_across_devices=False)
    trainer.accelerator = MagicMock(parallelism_config=None, gather_for_metrics=lambda x: x)
    for count in (None, torch.tensor(5)):
        inputs = {"labels": targets, "attention_mask": live}
        theirs = sft.SFTTrainer.compute_loss(
            trainer, MagicMock(return_value=outputs), inputs, num_items_in_batch=count
        )
        ours = cross_entropy(logits, targets, loss_type="dft", normalizer=count)
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
        for a, b in zip(
            autograd.grad(ours, logits, retain_graph=True),
            autograd.grad(theirs, logits, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_both_forms_weigh_alike(loss, reduction, form) -> None:
    """Against the formula in fp64; for a loss one by one, with slopes of its own from upstream."""
    torch.manual_seed(1)
    _, targets, weights = batch(vocab=19)
    tensors = [torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(19, 5, dtype=torch.float64)]
    tensors = [x.requires_grad_() for x in tensors]
    options, upstream = LOSSES[loss], torch.randn(2, 6, dtype=torch.float64)
    losses = plain(F.linear(*tensors), targets, weights, **options)
    count = {"mean": (targets != -100).sum(), "sum": 1}
    wanted = (losses * upstream).sum() if reduction == "none" else losses.sum() / count[reduction]
    if form == "linear":
        found = linear_cross_entropy(
            *tensors, targets, weights=weights, reduction=reduction, chunk_size=3, **options
        )
    else:
        logits = F.linear(*tensors)
        found = cross_entropy(logits, targets, weights=weights, reduction=reduction, **options)
    found = (found * upstream).sum() if reduction == "none" else found
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(autograd.grad(x, tensors) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.bfloat16])
def test_weights_of_any_kind_are_constants(kind) -> None:
    logits, targets, _ = batch()
    weights = torch.randint(2, targets.shape).to(kind)
    found = cross_entropy(logits, targets, weights=weights)
    wanted = plain(logits, targets, weights.double()).sum() / (targets != -100).sum()
    torch.testing.assert_close(found, wanted)
    trained = torch.rand(targets.shape, requires_grad=True)
    loss = cross_entropy(logits, targets, weights=trained)
    assert autograd.grad(loss, trained, allow_unused=True) == (None,)
    by_weight = cross_entropy(
        logits, targets, weights=trained, normalizer=trained[targets != -100].sum()
    )
    assert by_weight.detach() != loss.detach()
    torch.testing.assert_close(
        by_weight * trained[targets != -100].sum(), loss * (targets != -100).sum()
    )


@pytest.mark.parametrize("loss", LOSSES)
@IMPLS
def test_weight_zero_is_no_loss_even_where_it_would_be_infinite(impl, loss, device) -> None:
    logits = torch.randn(3, VOCAB, device=device)
    logits[0, 2], logits[1] = -torch.inf, torch.nan
    logits.requires_grad_()
    targets = torch.tensor([2, 1, 3], device=device)
    weights = torch.tensor([0.0, 0.0, 2.0], device=device)
    losses = cross_entropy(
        logits, targets, weights=weights, reduction="none", impl=impl, **LOSSES[loss]
    )
    assert losses[:2].tolist() == [0, 0] and float(losses[2].detach()) > 0
    (gradient,) = autograd.grad(losses.sum(), logits)
    assert not gradient[:2].any() and gradient[2].isfinite().all() and gradient[2].any()


def test_a_token_without_probability_has_no_dft_loss() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, 2], logits[1, 2] = -torch.inf, -300.0
    logits.requires_grad_()
    losses = cross_entropy(logits, torch.tensor([2, 2]), loss_type="dft", reduction="none")
    assert losses.tolist() == [0, 0]
    assert not autograd.grad(losses.sum(), logits)[0].any()
    certain = torch.tensor([[60.0, 0.0]], requires_grad=True)  # 1 - p rounds to 0
    loss = cross_entropy(certain, torch.tensor([0]), loss_type="dft")
    d_certain = autograd.grad(loss, certain)[0][0, 0]
    for x, wanted in ((loss, 8.7565e-27), (d_certain, -8.7565e-27)):
        assert float(x.detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("loss", ["both", "z-loss", "nll"])
def test_second_derivatives(loss) -> None:
    logits, targets, weights = batch()
    logits = torch.where(logits.detach().isfinite(), logits.detach(), 0.0)[0, ::3].requires_grad_()
    options = {"weights": weights[0, ::3], "reduction": "none", **LOSSES[loss]}

    def function(x: Tensor) -> Tensor:
        return cross_entropy(x, targets[0, ::3], temperature=0.7, softcap=3.0, **options)

    autograd.gradcheck(function, (logits,))
    autograd.gradgradcheck(function, (logits,))
    # What is differentiated again is the gradient itself.
    once, to_go_on = (
        autograd.grad(function(logits).sum(), logits, create_graph=again)[0]
        for again in (False, True)
    )
    torch.testing.assert_close(to_go_on.detach(), once)


def test_under_transforms() -> None:
    logits, targets, weights = batch()
    logits = torch.where(logits.detach().isfinite(), logits.detach(), 0.0).requires_grad_()
    for options in LOSSES.values():

        def loss(x, t, w, options=options) -> Tensor:
            return cross_entropy(x, t, weights=w, reduction="sum", **options)

        found = torch.func.vmap(torch.func.grad(loss))(logits, targets, weights)
        wanted = autograd.grad(loss(logits, targets, weights), logits)[0]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_in_a_compiled_graph(loss) -> None:
    logits, targets, weights = batch(torch.float32)

    def function(x: Tensor) -> Tensor:
        return cross_entropy(x, targets, weights=weights, **LOSSES[loss])

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(*((f(logits),) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(a, b)
        found, wanted = autograd.grad(a, logits)[0], autograd.grad(b, logits)[0]
        torch.testing.assert_close(found, wanted)


@IMPLS
@pytest.mark.parametrize("loss", LOSSES)
def test_over_kept_ids(loss, impl, device) -> None:
    """With all ids it is that of the vocabulary; with some, that of logits which are -inf else."""
    logits, targets, weights = (x.to(device) for x in batch(vocab=19))
    logits = torch.where((targets == -100).unsqueeze(-1), 0.0, logits.detach()).requires_grad_()
    options = {"weights": weights, "impl": impl, **LOSSES[loss]}
    whole = cross_entropy(logits, targets, **options)
    same = cross_entropy(logits, targets, support=everything(TOKENS, 19, device), **options)
    for a, b in zip(*((x, *autograd.grad(x, logits)) for x in (whole, same)), strict=True):
        torch.testing.assert_close(a, b)
    if options.get("label_smoothing", 0) == 0:
        ids, offsets = support = random_support(targets, 19)
        kept = torch.zeros(TOKENS, 19, dtype=torch.bool, device=device)
        kept[torch.repeat_interleave(offsets.diff()), ids.clamp(0, 18)] = True
        kept = torch.where((targets == -100).view(-1, 1), True, kept).view(logits.shape)
        found = cross_entropy(logits, targets, support=support, **options)
        wanted = cross_entropy(torch.where(kept, logits, -torch.inf), targets, **options)
        for a, b in zip(*((x, *autograd.grad(x, logits)) for x in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)


def test_without_any_target_or_token() -> None:
    for shape in ((2, 3), (0, 3), (0,)):
        logits = torch.full((*shape, VOCAB), torch.nan, requires_grad=True)
        for options in LOSSES.values():
            for reduction in ("mean", "sum", "none"):
                loss = cross_entropy(
                    logits, torch.full(shape, -100), weights=torch.full(shape, torch.nan),
                    reduction=reduction, **options,
                )  # fmt: skip
                assert loss.shape == (shape if reduction == "none" else ())
                assert not loss.any() and not autograd.grad(loss.sum(), logits)[0].any()


@pytest.mark.parametrize("vocab", [1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_are_read_once_forward_and_once_backward(loss, dtype, vocab, monkeypatch) -> None:
    pytest.importorskip("triton", reason="needs triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter counts bytes on machines without a GPU")
    logits = torch.randn(4, vocab, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (4,))
    with counted_traffic(monkeypatch) as forward:
        value = cross_entropy(
            logits, targets, weights=torch.tensor([1.0, 0.0, 2.0, 3.0]), impl="triton",
            **LOSSES[loss],
        )  # fmt: skip
    with counted_traffic(monkeypatch) as backward:
        (gradient,) = autograd.grad(value, logits)
    # Each row's target is looked up once more: 4 logits in all.
    assert forward.loaded(logits) == logits.nbytes + 4 * dtype.itemsize
    assert forward.stored(logits) == 0
    # A token without a weight is not read.
    assert backward.loaded(logits) == logits.nbytes * 3 // 4
    assert backward.stored(gradient) == logits.nbytes
    assert forward.loaded() + forward.stored() <= 1.01 * logits.nbytes + 4 * 250
    assert backward.loaded() + backward.stored() <= 2.01 * logits.nbytes + 4 * 300


@IMPLS
def test_the_gradient_can_overwrite_the_logits(impl, device) -> None:
    logits, targets, _ = batch(torch.float32)
    leaf = logits.detach().to(device).requires_grad_()
    wanted = autograd.grad(cross_entropy(leaf, targets.to(device), **LOSSES["both"]), leaf)[0]
    copy = leaf * 1.0
    loss = cross_entropy(
        copy, targets.to(device), inplace_backward=True, impl=impl, **LOSSES["both"]
    )
    (found,) = autograd.grad(loss, copy)
    assert found.data_ptr() == copy.data_ptr()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"^label_smoothing: expected a number in \[0, 1\]"),
        ({"z_loss": -1.0}, ValueError, "^z_loss: expected a number of at least 0"),
        ({"loss_type": "focal"}, ValueError, "^loss_type: expected one of nll, dft, got 'focal'"),
        ({"loss_type": None}, TypeError, "^loss_type: expected a string"),
        (
            {"loss_type": "dft", "label_smoothing": 0.1}, ValueError,
            "^label_smoothing: expected 0 with loss_type 'dft'.* got 0.1",
        ),
        ({"reduction": "batchmean"}, ValueError, "^reduction: expected one of mean, sum, none"),
        ({"reduction": "sum", "normalizer": 2}, ValueError, "^normalizer: expected None .*'sum'"),
        ({"weights": torch.ones(2, 5)}, ValueError, r"^weights: expected shape \(2, 6\)"),
        ({"weights": torch.ones(12)}, ValueError, r"^weights: expected shape \(2, 6\)"),
        ({"weights": [1.0]}, TypeError, "^weights: expected a tensor"),
        ({"weights": torch.ones(2, 6, device="meta")}, ValueError, "^weights: expected on cpu"),
        ({"weights": torch.ones(2, 6, dtype=torch.cfloat)}, TypeError, "^weights: expected a real"),
        ({"targets": torch.zeros(2, 5, dtype=torch.long)}, ValueError, "^targets: expected shape"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message, form) -> None:
    logits, targets, _ = batch(torch.float32)
    given = {"targets": targets, **change}
    with pytest.raises(error, match=message):
        if form == "logits":
            cross_entropy(logits, **given)
        else:
            linear_cross_entropy(logits, torch.zeros(9, VOCAB), **given)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match=r"^linear_cross_entropy: unexpected option 'smoothing'"):
        linear_cross_entropy(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long), smoothing=0.1
        )
