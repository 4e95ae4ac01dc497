"""Preference losses from hidden states against the same losses from fp64 log-softmax."""

import pytest
import torch
from support.matmuls import MatmulAudit
from torch import Tensor

import fastrlhf

PAIRED = [
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip
OF_THE_BATCH = ["aot", "aot_unpaired"]
REFERENCE_FREE = ["simpo", "cpo", "orpo"]
ALL = PAIRED + OF_THE_BATCH + REFERENCE_FREE

SEQUENCES, TOKENS, WIDTH, VOCAB = 8, 6, 7, 37
# A sequence in two pairs, one in none (7), a pair of sequences without tokens (4 and 5).
CHOSEN, REJECTED = torch.tensor([0, 1, 4, 0]), torch.tensor([2, 3, 5, 6])
OPTIONS = {"label_smoothing": 0.1, "discopop_tau": 0.5}
HEADS = {
    "plain": {},
    "transformed": {"softcap": 3.0, "scale": 0.5, "temperature": 0.7},
}


def inputs(bias: bool = True, *, trained: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias; targets; reference log-probs."""
    hidden = torch.randn(SEQUENCES, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=trained)
    offset = torch.randn(VOCAB, dtype=torch.float64, requires_grad=trained)
    targets = torch.randint(VOCAB, (SEQUENCES, TOKENS))
    targets[:, :2] = -100
    targets[4:6] = -100
    with torch.no_grad():
        hidden[targets == -100] = torch.nan
    ref = torch.randn(SEQUENCES, dtype=torch.float64) - 10
    return [hidden, weight, *([offset] if bias else [])], targets, ref


def plain(tensors: list[Tensor], targets: Tensor, ref: Tensor, loss_type: str, **head):
    """The same from whole logits."""
    hidden, weight, *bias = tensors
    live = targets != -100
    logits = torch.where(live[..., None], hidden, 0.0) @ weight.T + (bias[0] if bias else 0.0)
    if head:
        scaled = head["scale"] * logits / head["softcap"]
        logits = head["softcap"] * torch.tanh(scaled) / head["temperature"]
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, torch.where(live, targets, 0)[..., None])[..., 0] * live
    if loss_type not in REFERENCE_FREE:
        return fastrlhf.dpo_loss(
            logprobs, ref, CHOSEN, REJECTED, 0.3, mask=live, loss_type=loss_type, impl="eager",
            **OPTIONS,
        )  # fmt: skip
    sums, lengths = logprobs.sum(-1), live.sum(-1)
    if loss_type == "simpo":
        return fastrlhf.simpo_loss(
            sums, lengths, CHOSEN, REJECTED, 0.3, gamma=0.7, label_smoothing=0.1
        )
    if loss_type == "cpo":
        return fastrlhf.cpo_loss(sums, CHOSEN, REJECTED, 0.3, alpha=0.6, label_smoothing=0.1)
    return fastrlhf.orpo_loss(sums, lengths, CHOSEN, REJECTED, 0.3)


def linear(tensors: list[Tensor], targets: Tensor, ref: Tensor, loss_type: str, **head):
    hidden, weight, *bias = tensors
    head["bias"] = bias[0] if bias else None
    head.setdefault("chunk_size", 5)
    head.setdefault("impl", "eager")
    given = None if loss_type in REFERENCE_FREE else ref
    return fastrlhf.linear_dpo_loss(
        hidden, weight, targets, given, CHOSEN, REJECTED, 0.3, loss_type=loss_type, gamma=0.7,
        alpha=0.6, **OPTIONS, **head,
    )  # fmt: skip


REDUCTIONS = {
    "mean": lambda losses: losses.mean(),
    "scaled sum": lambda losses: -3 * losses.sum(),
    "weighted": lambda losses: (losses * torch.tensor([1.0, 2.0, -3.0, 0.0])).sum(),
    "one of them": lambda losses: losses[1],
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_type", ALL)
def test_values_and_gradients(loss_type, reduction) -> None:
    tensors, targets, ref = inputs()
    losses, rewards = linear(tensors, targets, ref, loss_type)
    expected, expected_rewards = plain(tensors, targets, ref, loss_type)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(rewards, expected_rewards)
    assert not rewards.requires_grad
    reduce = REDUCTIONS[reduction]
    found = torch.autograd.grad(reduce(losses), tensors)
    wanted = torch.autograd.grad(reduce(expected), tensors)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not found[0][targets == -100].any()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_kernels_give_the_same(loss_type, device) -> None:
    tensors, targets, ref = inputs()
    expected, _ = plain(tensors, targets, ref, loss_type)
    wanted = torch.autograd.grad(expected.mean(), tensors)
    moved = [x.detach().to(device).requires_grad_() for x in tensors]
    losses, _ = fastrlhf.linear_dpo_loss(
        moved[0], moved[1], targets.to(device), ref.to(device), CHOSEN.to(device),
        REJECTED.to(device), 0.3, loss_type=loss_type, bias=moved[2], chunk_size=5, impl="triton",
        **OPTIONS,
    )  # fmt: skip
    torch.testing.assert_close(losses.cpu(), expected)
    for a, b in zip(torch.autograd.grad(losses.mean(), moved), wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
def test_heads_and_chunks(chunk_size, head, trained) -> None:
    tensors, targets, ref = inputs(bias=False, trained=trained)
    losses, _ = linear(tensors, targets, ref, "sigmoid", chunk_size=chunk_size, **HEADS[head])
    expected, _ = plain(tensors, targets, ref, "sigmoid", **HEADS[head])
    torch.testing.assert_close(losses, expected)
    wanted = [x for x in tensors if x.requires_grad]
    for a, b in zip(
        torch.autograd.grad(losses.mean(), wanted),
        torch.autograd.grad(expected.mean(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("empty", [0, 2], ids=["chosen", "rejected"])
def test_a_pair_of_which_one_sequence_has_no_tokens(empty) -> None:
    tensors, targets, ref = inputs()
    targets[empty] = -100
    losses, _ = linear(tensors, targets, ref, "sigmoid")
    expected, _ = plain(tensors, targets, ref, "sigmoid")
    torch.testing.assert_close(losses, expected)
    found, wanted = (torch.autograd.grad(x.mean(), tensors) for x in (losses, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert found[0][2 - empty].nan_to_num().any()  # the other sequence of the pair


def test_the_bias_alone_and_the_weight_alone() -> None:
    for alone in (1, 2):
        tensors, targets, ref = inputs()
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i == alone)
        losses = linear(tensors, targets, ref, "sigmoid")[0]
        expected = plain(tensors, targets, ref, "sigmoid")[0]
        for reduce in REDUCTIONS.values():
            (found,) = torch.autograd.grad(reduce(losses), tensors[alone], retain_graph=True)
            (wanted,) = torch.autograd.grad(reduce(expected), tensors[alone], retain_graph=True)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_reference_may_be_per_token_and_differentiable() -> None:
    tensors, targets, _ = inputs()
    ref = torch.randn(SEQUENCES, TOKENS, dtype=torch.float64, requires_grad=True)
    losses = linear(tensors, targets, ref, "sigmoid")[0]
    expected = plain(tensors, targets, ref, "sigmoid")[0]
    for a, b in zip(
        torch.autograd.grad(losses.mean(), [*tensors, ref]),
        torch.autograd.grad(expected.mean(), [*tensors, ref]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def matmuls(loss_type: str, reduce, *, trained: bool) -> float:
    """Matmuls of forward and backward, in units of G."""
    vocab, width, tokens = 1000, 64, 16
    hidden = torch.randn(8, tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=trained)
    targets = torch.randint(vocab, (8, tokens))
    targets[:, : tokens // 2] = -100
    ref = None if loss_type in REFERENCE_FREE else torch.zeros(8)
    with MatmulAudit() as audit:
        losses, _ = fastrlhf.linear_dpo_loss(
            hidden, weight, targets, ref, torch.arange(4), torch.arange(4, 8),
            loss_type=loss_type, chunk_size=16,
        )  # fmt: skip
        reduce(losses).backward()
    assert audit.largest <= max(16 * vocab, vocab * width)
    return audit.operations / (2 * int((targets != -100).sum()) * vocab * width)


def test_as_many_matmuls_as_the_plan_says() -> None:
    def mean(losses):
        return losses.mean()

    assert matmuls("sigmoid", mean, trained=True) == pytest.approx(3, rel=0.01)
    assert matmuls("orpo", mean, trained=True) == pytest.approx(3, rel=0.01)
    assert matmuls("sigmoid", mean, trained=False) == pytest.approx(2, rel=0.01)
    assert matmuls("aot", mean, trained=False) == pytest.approx(2, rel=0.01)
    assert matmuls("aot", mean, trained=True) == pytest.approx(4, rel=0.01)
    # Backward, all log-probs are made again, and then the gradient of one pair in four.
    assert matmuls("sigmoid", lambda x: x[0], trained=True) == pytest.approx(
        3 + 1 + 3 / 4, rel=0.01
    )


def test_without_gradients_and_without_tokens() -> None:
    tensors, targets, ref = inputs()
    expected = plain(tensors, targets, ref, "ipo")[0]
    with torch.no_grad():
        losses = linear(tensors, targets, ref, "ipo")[0]
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach())
    losses = linear(tensors, torch.full_like(targets, -100), ref, "sigmoid")[0]
    margins = 0.3 * (ref[REJECTED] - ref[CHOSEN])
    torch.testing.assert_close(
        losses, -0.9 * torch.nn.functional.logsigmoid(margins)
        - 0.1 * torch.nn.functional.logsigmoid(-margins),
    )  # fmt: skip
    for gradient in torch.autograd.grad(losses.mean(), tensors):
        assert not gradient.any()


def test_a_second_derivative_is_right_or_refused() -> None:
    tensors, targets, ref = inputs()
    loss = linear(tensors, targets, ref, "sigmoid")[0].mean()
    with pytest.raises(RuntimeError, match=r"^linear_dpo_loss: .*cannot be differentiated"):
        torch.autograd.grad(loss, tensors[1], create_graph=True)
    tensors, targets, ref = inputs(trained=False)
    with torch.no_grad():
        tensors[0][targets == -100] = 0.0  # finite differences cannot step from NaN

    def losses(hidden):
        return linear([hidden, *tensors[1:]], targets, ref, "sigmoid")[0]

    assert torch.autograd.gradgradcheck(losses, (tensors[0],), fast_mode=True)


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "ref_logps", "yw_idxs"])
def test_what_is_no_tensor_is_named(name) -> None:
    tensors, targets, ref = inputs()
    arguments = {
        "hidden": tensors[0], "weight": tensors[1], "targets": targets, "ref_logps": ref,
        "yw_idxs": CHOSEN, "yl_idxs": REJECTED, name: [1.0],
    }  # fmt: skip
    with pytest.raises(TypeError, match=f"^{name}: "):
        fastrlhf.linear_dpo_loss(**arguments)


def test_no_pairs() -> None:
    tensors, targets, ref = inputs()
    none = torch.zeros(0, dtype=torch.long)
    losses, rewards = fastrlhf.linear_dpo_loss(tensors[0], tensors[1], targets, ref, none, none)
    assert losses.shape == (0,) and rewards.shape == (SEQUENCES,)
    losses.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "weighted"])
def test_autocast(reduction) -> None:
    tensors, targets, ref = inputs()
    tensors = [x.detach().float().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear(tensors, targets, ref.float(), "sigmoid")[0]
    expected = plain([x.bfloat16().float() for x in tensors], targets, ref.float(), "sigmoid")[0]
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)  # the bias is not rounded
    reduce = REDUCTIONS[reduction]
    found = torch.autograd.grad(reduce(losses), tensors)
    wanted = torch.autograd.grad(reduce(expected), tensors)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "dpo"}, "^loss_type: "),
        ({"ref_logps": None}, "^ref_logps: expected a tensor"),
        ({"loss_type": "simpo"}, "^ref_logps: expected None"),
        ({"ref_logps": torch.zeros(3)}, "^ref_logps: "),
        ({"yw_idxs": torch.tensor([0, 9, 1, 2])}, "^yw_idxs: "),
        ({"yl_idxs": torch.tensor([0])}, "^yl_idxs: "),
        ({"beta": 0.0}, "^beta: "),
        ({"targets": torch.zeros(SEQUENCES, dtype=torch.long)}, "^targets: "),
        ({"targets": torch.full((SEQUENCES, TOKENS), VOCAB)}, "^targets: "),
        ({"weight": torch.zeros(VOCAB, WIDTH + 1).double()}, "^hidden: "),
        ({"chunk_size": 0}, "^chunk_size: "),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_bad_arguments_are_named(changes, message, trained) -> None:
    tensors, targets, ref = inputs(trained=trained)
    arguments = {
        "hidden": tensors[0], "weight": tensors[1], "targets": targets, "ref_logps": ref,
        "yw_idxs": CHOSEN, "yl_idxs": REJECTED, **changes,
    }  # fmt: skip
    arguments["weight"] = arguments["weight"].detach().requires_grad_(trained)
    with pytest.raises(ValueError, match=message):
        fastrlhf.linear_dpo_loss(**arguments)
