"""The loss of supervised fine-tuning from hidden states against that of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate
from support.matmuls import MatmulAudit
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import linear_cross_entropy

SEQUENCES, TOKENS, WIDTH, VOCAB = 3, 9, 6, 37
NEEDS = {
    "all": (True, True, True),
    "hidden": (True, False, False),
    "weight": (False, True, False),
    "bias": (False, False, True),
}
LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "all smooth": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.03},
    "both": {"label_smoothing": 0.1, "z_loss": 0.01},
}
TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.3, "temperature": 1.7},
    "capped": {"softcap": 2.0, "scale": 1.5},
    "warm": {"temperature": torch.linspace(0.5, 2, SEQUENCES)},
    "capped and warm": {
        "softcap": 2.0, "temperature": torch.linspace(0.5, 2, SEQUENCES * TOKENS).view(3, 9),
    },
}  # fmt: skip


def inputs(needs=NEEDS["all"], dtype=torch.float64) -> tuple[list[Tensor], Tensor]:
    """Hidden states with garbage in ignored rows, weight and bias; targets."""
    torch.manual_seed(0)
    targets = torch.randint(VOCAB, (SEQUENCES, TOKENS))
    targets[:, :4] = -100
    hidden = torch.randn(SEQUENCES, TOKENS, WIDTH)
    hidden[:, 1] = torch.nan
    tensors = [hidden, torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)]
    return [
        x.to(dtype).requires_grad_(need) for x, need in zip(tensors, needs, strict=True)
    ], targets  # fmt: skip


def plain(
    tensors, targets, reduction="mean", label_smoothing=0.0, z_loss=0.0,
    temperature=1.0, softcap=None, scale=1.0,
) -> Tensor:  # fmt: skip
    """From whole logits, by torch's own cross-entropy."""
    hidden, weight, bias = tensors
    live = targets != -100
    logits = scale * F.linear(torch.where(live.unsqueeze(-1), hidden, 0.0), weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.view(3, -1, 1).to(logits)
    logits = logits / temperature
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing, reduction="none"
    ).view(targets.shape)
    losses = losses + torch.where(live, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (live.sum() if reduction == "mean" else 1)


def assert_right(needs, dtype, impl="eager", place="cpu", weights=None, **options) -> None:
    """Compare the loss and the gradients in fp64, within the error of the plain formula."""
    tensors, targets = inputs(needs, dtype)
    sums = torch.promote_types(dtype, torch.float32)
    results = []
    for kind in (torch.float64, sums, None):
        to = [x.detach().to(kind or dtype).requires_grad_(x.requires_grad) for x in tensors]
        if kind is not None:
            loss = plain(to, targets, **options)
        else:
            to = [x.detach().to(place).requires_grad_(x.requires_grad) for x in to]
            moved = {k: x.to(place) if isinstance(x, Tensor) else x for k, x in options.items()}
            loss = linear_cross_entropy(
                to[0], to[1], targets.to(place), bias=to[2], chunk_size=4, impl=impl, **moved
            )
            assert loss.dtype == sums
        upstream = torch.ones_like(loss) if weights is None else weights.to(loss)
        wanted = [x for x in to if x.requires_grad]
        results.append((loss, *autograd.grad(loss, wanted, upstream)))
    exact, formula, found = results
    size = max(1.0, float(exact[0].detach().abs().max()))
    assert_as_accurate(found[0], formula[0], exact[0], size=size)
    for a, b, c in zip(found[1:], formula[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, b, c, size=2 * float(c.abs().max()))
        assert a.ndim < 3 or not a[(targets == -100).to(a.device)].any()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("needs", NEEDS)
def test_a_loss_is_that_of_the_logits(needs, loss, transform) -> None:
    assert_right(NEEDS[needs], torch.float64, **LOSSES[loss], **TRANSFORMS[transform])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_as_accurate_as_the_plain_formula(impl, dtype, loss, device) -> None:
    place = device if impl == "triton" else "cpu"
    assert_right(NEEDS["all"], dtype, impl, place, **LOSSES[loss], **TRANSFORMS["warm"])


@pytest.mark.parametrize("weights", ["alike", "where it counts", "by token"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss, reduction, weights) -> None:
    upstream = None
    if reduction == "none":
        upstream = torch.full((SEQUENCES, TOKENS), 0.7)
        if weights == "where it counts":
            upstream[:, :4] = torch.randn(SEQUENCES, 4)  # of ignored tokens
        elif weights == "by token":
            upstream = torch.randn(SEQUENCES, TOKENS)
    assert_right(NEEDS["all"], torch.float64, weights=upstream, reduction=reduction, **LOSSES[loss])


@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_a_normalizer_replaces_the_number_of_tokens(normalizer) -> None:
    tensors, targets = inputs()
    total = linear_cross_entropy(*tensors[:2], targets, reduction="sum")
    found = linear_cross_entropy(*tensors[:2], targets, normalizer=normalizer)
    assert torch.equal(found, total / 7)
    for gradient, of_sum in zip(
        *(autograd.grad(x, tensors[:2]) for x in (found, total)), strict=True
    ):
        torch.testing.assert_close(gradient, of_sum / 7, rtol=1e-14, atol=0)


def test_without_any_target_the_loss_and_its_gradient_are_zero() -> None:
    tensors, targets = inputs()
    for options in LOSSES.values():
        for reduction in ("mean", "sum", "none"):
            loss = linear_cross_entropy(
                tensors[0], tensors[1], torch.full_like(targets, -100), bias=tensors[2],
                reduction=reduction, **options,
            )  # fmt: skip
            assert not loss.any()
            assert not any(g.any() for g in autograd.grad(loss.sum(), tensors))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("needs", "cost"), [("all", 3), ("hidden", 2), ("weight", 2), (None, 1)])
def test_as_many_matmuls_as_stated(needs, cost, loss, softcap, reduction) -> None:
    vocab, width, tokens = 1000, 32, 64
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width)
    hidden.requires_grad_(needs in ("all", "hidden"))
    weight.requires_grad_(needs in ("all", "weight"))
    targets = torch.randint(vocab, (tokens,))
    targets[::2] = -100
    with MatmulAudit() as audit:
        losses = linear_cross_entropy(
            hidden,
            weight,
            targets,
            reduction=reduction,
            chunk_size=8,
            softcap=softcap,
            **LOSSES[loss],
        )
        if needs is not None:
            # Of losses one by one, those of ignored tokens need not be weighed like the others.
            losses = losses if reduction == "mean" else losses[targets != -100]
            losses.mean().backward()
    assert audit.largest <= vocab * width
    assert audit.operations / (tokens * vocab * width) == pytest.approx(cost, rel=1e-6)


def test_words_that_are_ruled_out() -> None:
    tensors, targets = inputs()
    with torch.no_grad():
        tensors[2][VOCAB - 5 :] = -torch.inf
    targets = torch.where(targets >= VOCAB - 5, 0, targets)
    for options in ({}, {"z_loss": 0.1}):
        wanted = plain(tensors, targets, **options)
        found = linear_cross_entropy(*tensors[:2], targets, bias=tensors[2], **options)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(*(autograd.grad(x, tensors) for x in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_rounds_operands_and_not_sums() -> None:
    tensors, targets = inputs(dtype=torch.float32)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in tensors]
    for options in LOSSES.values():
        with torch.autocast("cpu", torch.bfloat16):
            losses = linear_cross_entropy(
                *tensors[:2], targets, bias=tensors[2], reduction="none", **options
            )
        assert losses.dtype == torch.float32
        wanted = plain([*rounded[:2], tensors[2].double()], targets, "none", **options)
        torch.testing.assert_close(losses.double(), wanted, rtol=2e-2, atol=2e-2)
        weights = torch.randn(SEQUENCES, TOKENS)
        # Outside of autocast. A gradient of hidden states is rounded, as they are.
        bounds = 2e-2, 1e-5
        found = autograd.grad(losses, tensors[:2], weights)
        expected = autograd.grad(wanted, rounded[:2], weights.double())
        for a, b, bound in zip(found, expected, bounds, strict=True):
            assert float((a - b).norm()) <= bound * float(b.norm())


def test_a_second_derivative_and_transforms_are_refused() -> None:
    tensors, targets = inputs()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(*tensors[:2], targets, reduction=reduction)
        with pytest.raises(RuntimeError, match=r"linear_token_stats"):
            autograd.grad(loss.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_cross_entropy: .*fastrlhf\.cross_entropy"):
        torch.func.grad(lambda h: linear_cross_entropy(h, tensors[1], targets))(tensors[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"^label_smoothing: expected a number in \[0, 1\]"),
        ({"label_smoothing": "a lot"}, TypeError, "^label_smoothing: expected a number"),
        ({"z_loss": -1.0}, ValueError, "^z_loss: expected a number of at least 0"),
        ({"reduction": "batchmean"}, ValueError, "^reduction: expected one of mean, sum, none"),
        ({"reduction": "sum", "normalizer": 2}, ValueError, "^normalizer: expected None .*'sum'"),
        ({"normalizer": 0}, ValueError, "^normalizer: expected a positive"),
        ({"normalizer": torch.ones(2)}, ValueError, "^normalizer: expected a number or a 0-d"),
        ({"reduction": None}, TypeError, "^reduction: expected a string"),
        ({"targets": torch.zeros(2, 9, dtype=torch.long)}, ValueError, "^targets: expected shape"),
        ({"weight": torch.zeros(37, 5)}, ValueError, "^hidden: expected shape"),
    ],
)
def test_errors_name_the_argument(change, error, message) -> None:
    tensors, targets = inputs(dtype=torch.float32)
    given = {"hidden": tensors[0], "weight": tensors[1], "targets": targets, **change}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)


def test_the_name_by_which_it_is_looked_for() -> None:
    assert fastrlhf.sft_loss is fastrlhf.model_cross_entropy
