"""Process rewards: the cross-entropy of steps, and one score from all of them, in 60 digits."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate
from support.supervised_formulas import exactly, log_score, step_losses
from torch import Tensor, autograd

from fastrlhf import process_reward_loss, process_reward_scores
from fastrlhf.losses.process_reward import AGGREGATIONS

SEQUENCES, TOKENS = 4, 9
REDUCTIONS = ["token-mean", "sequence-mean", "sequence-sum", "constant"]
WIDTHS = pytest.mark.parametrize("classes", [1, 2])
HOW = pytest.mark.parametrize("how", AGGREGATIONS)


def batch(dtype=torch.float64, garbage: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels of which some are soft, and the ends of steps, garbage elsewhere; the second
    sequence has no step.
    """
    mask = torch.rand(SEQUENCES, TOKENS) < 0.5
    mask[1], mask[0, 0] = False, True
    labels = torch.randint(2, mask.shape).double()
    labels[0] = torch.rand(TOKENS)
    scores = 3 * torch.randn(mask.shape, dtype=torch.float64)
    scores, labels = (torch.where(mask, x, garbage).to(dtype) for x in (scores, labels))
    return scores.requires_grad_(), labels, mask


def token_weights(mask: Tensor, reduction: str, normalizer: float | None = None) -> Tensor:
    """What each step counts, by the words of the reductions."""
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(mask):
        for t in row.nonzero().view(-1):
            weights[i, t] = {
                "token-mean": 1 / (normalizer or float(mask.sum())),
                "sequence-mean": 1 / float(row.sum()) / (normalizer or len(mask)),
                "sequence-sum": 1 / (normalizer or len(mask)),
                "constant": 1 / (normalizer or 1),
            }[reduction]
    return weights


def two_classes(scores: Tensor) -> Tensor:
    """Logits of which the scores are the differences."""
    wrong = torch.randn_like(scores)
    return torch.stack((wrong, wrong + scores), -1).detach().requires_grad_()


@WIDTHS
@pytest.mark.parametrize("normalizer", [None, 7.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_is_that_of_the_formula(reduction, normalizer, classes) -> None:
    scores, labels, mask = batch()
    if reduction == "constant" and normalizer is None:
        return
    given = scores if classes == 1 else two_classes(scores)
    one = scores.detach() if classes == 1 else (given[..., 1] - given[..., 0]).detach()
    losses, slopes = step_losses(one[mask], labels[mask])
    weights = token_weights(mask, reduction, normalizer)
    loss, metrics = process_reward_loss(
        given, labels, mask, reduction=reduction, normalizer=normalizer
    )
    torch.testing.assert_close(loss, (losses * weights[mask]).sum(), rtol=1e-13, atol=0)
    (gradient,) = autograd.grad(loss, given)
    expected = torch.zeros_like(weights)
    expected[mask] = slopes * weights[mask]
    if classes == 2:
        torch.testing.assert_close(gradient[..., 0], -expected, rtol=1e-12, atol=1e-15)
        gradient = gradient[..., 1]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert not gradient[~mask].any()
    right = (one[mask] > 0) == (labels[mask] > 0.5)
    assert not any(x.requires_grad for x in metrics.values())
    torch.testing.assert_close(metrics["rewards/accuracies"], right.double().mean())
    torch.testing.assert_close(metrics["rewards/positives"], (labels[mask] > 0.5).double().mean())


def test_two_classes_are_the_cross_entropy_of_their_softmax() -> None:
    """As Hugging Face's token classification has it, by which process reward models are trained:
    labels of -100 are no steps.
    """
    scores, labels, mask = batch()
    logits = two_classes(torch.where(mask, scores, 0.0))
    classes = torch.where(mask, labels > 0.5, -100).long()
    wanted = F.cross_entropy(logits.view(-1, 2), classes.view(-1))
    for given in (None, mask):
        loss, metrics = process_reward_loss(logits, classes, given)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(
            *(autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, wanted))
        )
    right = (logits.argmax(-1) == classes)[mask].double().mean()
    torch.testing.assert_close(metrics["rewards/accuracies"], right)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 120.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_the_plain_formula_in_the_tails(dtype, scale) -> None:
    """Each step alone, of a label 0, 1 or ½: value and slope of a loss of 1e-52 too."""
    scores = (scale * torch.tensor([-1.0, -0.5, 0.01, 0.5, 1.0])).to(dtype).repeat_interleave(3)
    labels = torch.tensor([0.0, 0.5, 1.0]).repeat(5)
    losses, slopes = step_losses(scores, labels)
    x = scores.view(-1, 1).requires_grad_()
    for i in range(len(labels)):
        mask = torch.zeros(15, 1)
        mask[i] = 1
        loss, _ = process_reward_loss(x, labels.view(-1, 1), mask)
        (gradient,) = autograd.grad(loss, x)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        assert_as_accurate(loss, losses[i], losses[i], size=float(losses[i]))
        s, y = scores[i].double(), labels[i].double()
        terms = y * torch.sigmoid(-s) + (1 - y) * torch.sigmoid(s)  # which may cancel
        assert_as_accurate(gradient[i], slopes[i].to(dtype), slopes[i], size=float(terms))


@pytest.mark.parametrize("label", [0, 1])
def test_a_label_of_zero_or_one_has_one_term(label) -> None:
    """Which may be 0 where the other one is infinite."""
    sure = torch.tensor([[math.inf if label else -math.inf]], requires_grad=True)
    loss, metrics = process_reward_loss(sure, torch.tensor([[label]]))
    assert loss == 0 and metrics["rewards/accuracies"] == 1
    assert autograd.grad(loss, sure)[0] == 0
    wrong, _ = process_reward_loss(-sure, torch.tensor([[label]]))
    assert wrong == math.inf


def test_a_tie_is_taken_for_wrong() -> None:
    """As the first of two equal classes is."""
    for label in (0, 1):
        for scores in (torch.zeros(1, 1), torch.zeros(1, 1, 2)):
            _, metrics = process_reward_loss(scores, torch.tensor([[label]]))
            assert metrics["rewards/accuracies"] == 1 - label


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.bfloat16])
def test_labels_of_any_kind_and_masks_of_numbers(kind) -> None:
    scores, labels, mask = batch()
    labels = torch.where(mask, labels > 0.5, False)
    wanted, _ = process_reward_loss(scores, labels.double(), mask)
    for given in (mask, mask.long(), mask.float()):
        assert torch.equal(process_reward_loss(scores, labels.to(kind), given)[0], wanted)


@WIDTHS
@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_is_padded(reduction, leading, classes) -> None:
    scores, labels, mask = batch(garbage=5.0)
    scores = scores if classes == 1 else two_classes(scores)
    lengths = torch.tensor([9, 3, 0, 7])
    inside = torch.arange(TOKENS) < lengths.unsqueeze(1)
    mask &= inside
    borders = F.pad(lengths.cumsum(0), (1, 0))
    packed = [x[inside].unsqueeze(0) if leading else x[inside] for x in (scores, labels, mask)]
    options = {"reduction": reduction, "normalizer": 3.0 if reduction == "constant" else None}
    wanted, of_rows = process_reward_loss(scores, labels, mask, **options)
    found, of_packed = process_reward_loss(*packed, cu_seqlens=borders, **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(of_packed, of_rows)
    gradients = [autograd.grad(x, scores, retain_graph=True)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)
    for how in AGGREGATIONS:
        of_rows = process_reward_scores(scores, mask, how)
        of_packed = process_reward_scores(packed[0], packed[2], how, cu_seqlens=borders)
        torch.testing.assert_close(of_packed, of_rows)
        gradients = [
            autograd.grad(x.sum(), scores, retain_graph=True)[0] for x in (of_packed, of_rows)
        ]
        torch.testing.assert_close(*gradients)


@HOW
@WIDTHS
def test_a_score_is_that_of_the_formula(classes, how) -> None:
    scores, _, mask = batch()
    given = scores if classes == 1 else two_classes(scores)
    one = scores.detach() if classes == 1 else (given[..., 1] - given[..., 0]).detach()
    found = process_reward_scores(given, mask, how)
    logs = process_reward_scores(given, mask, how, log=True)
    for i, row in enumerate(mask):
        if not row.any():
            assert found[i] == 0 and logs[i] == -math.inf
            continue
        wanted = log_score(exactly(one[i, row]), how)
        assert float(logs[i].detach()) == pytest.approx(float(wanted), rel=1e-13)
        assert float(found[i].detach()) == pytest.approx(math.exp(wanted), rel=1e-13)
    for x in (found[mask.any(1)], logs[mask.any(1)]):
        (gradient,) = autograd.grad(x.sum(), given, retain_graph=True)
        assert gradient[mask].any() and gradient.isfinite().all() and not gradient[~mask].any()


@HOW
@pytest.mark.parametrize("sign", [-1, 1])
def test_tokens_that_end_no_step_do_not_count(sign, how) -> None:
    """Whose score of 0 would be the least, or the largest, of all."""
    steps = sign * (0.5 + torch.rand(3, 4, dtype=torch.float64))
    alone = process_reward_scores(steps, torch.ones(3, 4), how)
    among = torch.full((3, 9), math.nan, dtype=torch.float64)
    mask = torch.zeros(3, 9)
    among[:, 1::2], mask[:, 1::2] = steps, 1
    torch.testing.assert_close(process_reward_scores(among, mask, how), alone)


@HOW
@pytest.mark.parametrize("scale", [1e-3, 40.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_the_tails(dtype, scale, how) -> None:
    """Ln of what is below the smallest number, or within a rounding of 1."""
    for sign in (-1, 1):
        scores = (sign * scale * (0.5 + torch.rand(3, 6))).to(dtype)
        logs = process_reward_scores(scores, torch.ones(3, 6), how, log=True)
        assert logs.dtype == torch.float32
        for row, found in zip(scores, logs, strict=True):
            exact = float(log_score(exactly(row), how))
            assert_as_accurate(found, torch.tensor(exact), exact, ulps=16)
        found = process_reward_scores(scores, torch.ones(3, 6), how)
        assert torch.equal(found, logs.exp())


def test_without_steps_or_tokens() -> None:
    for shape in ((2, 3), (2, 0), (0, 3)):
        scores = torch.full(shape, math.nan, requires_grad=True)
        for reduction in REDUCTIONS:
            loss, metrics = process_reward_loss(
                scores, torch.full(shape, -100), reduction=reduction,
                normalizer=2 if reduction == "constant" else None,
            )  # fmt: skip
            assert loss == 0 and not autograd.grad(loss, scores)[0].any()
            assert all(x == 0 for x in metrics.values())
        for how in AGGREGATIONS:
            for log in (False, True):
                found = process_reward_scores(scores, torch.zeros(shape), how, log=log)
                assert found.tolist() == [-math.inf if log else 0.0] * shape[0]
                assert not autograd.grad(found.sum(), scores)[0].any()


@HOW
def test_derivatives(how) -> None:
    scores, labels, mask = batch(garbage=0.3)

    def loss(x: Tensor) -> Tensor:
        return process_reward_loss(x, labels, mask, reduction="sequence-mean")[0]

    def score(x: Tensor) -> Tensor:
        return process_reward_scores(x, mask, how)

    for function in (loss, score) if how == "min" else (score,):
        autograd.gradcheck(function, (scores,))
        autograd.gradgradcheck(function, (scores,))


@HOW
def test_compiled_and_under_transforms(how) -> None:
    scores, labels, mask = batch(garbage=0.3)

    def function(x: Tensor) -> Tensor:
        return process_reward_loss(x, labels, mask)[0] + process_reward_scores(x, mask, how).sum()

    wanted = function(scores)
    (gradient,) = autograd.grad(wanted, scores)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(scores)
    torch.testing.assert_close(compiled, wanted)
    torch.testing.assert_close(autograd.grad(compiled, scores)[0], gradient)
    both = torch.stack((scores, scores)).detach()
    found = torch.func.vmap(torch.func.grad(function))(both)
    torch.testing.assert_close(found, torch.stack((gradient, gradient)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [1.0]}, TypeError, "^scores: expected a tensor"),
        ({"scores": torch.zeros(4, 9).long()}, TypeError, "^scores: expected a floating"),
        ({"scores": torch.zeros(4, 8)}, ValueError, r"^scores: expected shape \(4, 9\) .* or \(4"),
        ({"scores": torch.zeros(4, 9, 3)}, ValueError, r"^scores: .* or \(4, 9, 2\), got \(4, 9"),
        ({"labels": torch.full((4, 9), 1.5)}, ValueError, r"^labels: expected .*\[0, 1\].*1.5$"),
        ({"labels": torch.full((4, 9), -100)}, ValueError, r"^labels: expected .*got -100"),
        ({"labels": torch.full((4, 9), math.nan)}, ValueError, r"^labels: expected .*got nan"),
        ({"labels": None}, TypeError, "^labels: expected a tensor"),
        ({"labels": torch.zeros(4, 9, device="meta")}, ValueError, "^labels: expected on cpu"),
        ({"mask": torch.ones(4, 8)}, ValueError, r"^mask: expected shape \(4, 9\)"),
        ({"mask": 3 * torch.ones(4, 9)}, ValueError, "^mask: expected a mask of 0 and 1"),
        ({"reduction": "mean"}, ValueError, "^reduction: expected one of token-mean"),
        ({"reduction": "constant"}, ValueError, "^normalizer: expected a number"),
        ({"normalizer": -1}, ValueError, "^normalizer: expected a positive"),
        ({"cu_seqlens": torch.tensor([0, 36])}, ValueError, "^cu_seqlens: expected None"),
        ({"group": 3}, TypeError, "^group: "),
    ],
)
def test_errors_of_the_loss_name_the_argument(change, error, message) -> None:
    given = {"scores": torch.zeros(4, 9), "labels": torch.zeros(4, 9), "mask": torch.ones(4, 9)}
    with pytest.raises(error, match=message):
        process_reward_loss(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(4, 8)}, ValueError, r"^scores: .*the shape of mask"),
        ({"mask": None}, TypeError, "^mask: expected a tensor"),
        ({"mask": torch.full((4, 9), 0.5)}, ValueError, "^mask: expected a mask of 0 and 1"),
        ({"how": "sum"}, ValueError, "^how: expected one of min, product, last, mean"),
        ({"how": None}, TypeError, "^how: expected a string"),
        ({"log": 1}, TypeError, "^log: expected a bool"),
    ],
)
def test_errors_of_the_scores_name_the_argument(change, error, message) -> None:
    with pytest.raises(error, match=message):
        process_reward_scores(**{"scores": torch.zeros(4, 9), "mask": torch.ones(4, 9), **change})


def test_the_mean_of_steps_that_are_all_impossible_is_no_number_but_minus_infinity() -> None:
    scores = torch.full((1, 2), -math.inf)
    found = process_reward_scores(scores, torch.ones(1, 2), how="mean", log=True)
    assert found.tolist() == [-math.inf]
