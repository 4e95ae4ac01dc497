"""The options of dpo_loss from hidden states, and of a model, against the same from log-softmax."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compare import relative_error
from support.tiny_models import make
from torch import Tensor

import fastrlhf

SEQUENCES, TOKENS, WIDTH, VOCAB = 8, 6, 7, 37
# A sequence in two pairs, one in none (7), a pair of sequences without tokens (4 and 5).
CHOSEN, REJECTED = torch.tensor([0, 1, 4, 0]), torch.tensor([2, 3, 5, 6])
LENGTHS = torch.tensor([4, 2, 3, 4, 0, 0, 1, 2])
WEIGHTS = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)

OPTIONS: dict[str, dict[str, Any]] = {
    "MPO": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "RPO": {"rpo_alpha": 0.7, "loss_type": "ipo"},
    "without reference": {"reference_free": True, "loss_type": "hinge"},
    "averaged": {"average": True},
    "JS": {"f_divergence": "js"},
    "alpha": {"f_divergence": "alpha", "f_alpha": 0.3},
    "LD": {"ld_alpha": 0.3},
    "WPO": {"use_weighting": True, "loss_type": ("sigmoid", "sft")},
    "WPO and LD": {"use_weighting": True, "ld_alpha": 0.3},
    "DPOP": {"dpop_lambda": 5.0},
    "sorted": {"loss_type": ("aot", "sft"), "rpo_alpha": 0.1},
}


def inputs(trained: bool = True) -> dict[str, Tensor]:
    targets = torch.randint(VOCAB, (SEQUENCES, TOKENS))
    targets[torch.arange(TOKENS) >= 2 + LENGTHS[:, None]] = -100
    targets[:, :2] = -100
    hidden = torch.randn(SEQUENCES, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        hidden[targets == -100] = torch.nan
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=trained)
    ref = -4 * torch.rand(SEQUENCES, TOKENS, dtype=torch.float64)
    return {"hidden": hidden, "weight": weight, "targets": targets, "ref": ref}


def plain(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    live = x["targets"] != -100
    logits = torch.where(live[..., None], x["hidden"], 0.0) @ x["weight"].T
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, torch.where(live, x["targets"], 0)[..., None])[..., 0]
    squares = (2 * log_p).logsumexp(-1) if options.get("use_weighting") else None
    return fastrlhf.dpo_loss(
        logprobs, x["ref"], CHOSEN, REJECTED, 0.3, mask=live, log_sum_sq_probs=squares,
        impl="eager", **options,
    )  # fmt: skip


def assert_same(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], of: list[Tensor], weights: Tensor
) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad((found[0] * weights).sum(), of),
        torch.autograd.grad((wanted[0] * weights).sum(), of),
        strict=True,
    ):
        torch.testing.assert_close(a, b.nan_to_num(0.0), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("weights", [torch.ones(4).double() / 4, WEIGHTS], ids=["mean", "weighed"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_from_hidden_states(name: str, trained: bool, weights: Tensor) -> None:
    x, options = inputs(trained), OPTIONS[name]
    of = [x["hidden"], *([x["weight"]] if trained else [])]
    found = fastrlhf.linear_dpo_loss(
        x["hidden"], x["weight"], x["targets"], x["ref"], CHOSEN, REJECTED, 0.3, chunk_size=4,
        impl="eager", **options,
    )  # fmt: skip
    assert_same(found, plain(x, **options), of, weights)


@pytest.mark.parametrize("name", OPTIONS)
def test_from_packed_hidden_states(name: str) -> None:
    x, options = inputs(), OPTIONS[name]
    wanted = plain(x, **options)
    lengths = 2 + LENGTHS
    keep = torch.arange(TOKENS) < lengths[:, None]
    packed = {k: x[k][keep][None] for k in ("hidden", "targets", "ref")}
    found = fastrlhf.linear_dpo_loss(
        packed["hidden"], x["weight"], packed["targets"], packed["ref"], CHOSEN, REJECTED, 0.3,
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), chunk_size=4, impl="eager", **options,
    )  # fmt: skip
    assert_same(found, wanted, [x["hidden"], x["weight"]], WEIGHTS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_takes_a_label_smoothing(smoothing: float) -> None:
    x = inputs()
    live = x["targets"] != -100
    found, _ = fastrlhf.linear_dpo_loss(
        x["hidden"], x["weight"], x["targets"], None, CHOSEN, REJECTED, 2.0, loss_type="simpo",
        label_smoothing=smoothing, impl="eager",
    )  # fmt: skip
    logprobs = fastrlhf.linear_token_logprobs(x["hidden"], x["weight"], x["targets"], impl="eager")
    means = torch.where(live, logprobs, 0.0).sum(-1) / live.sum(-1).clamp(min=1)
    d = 2.0 * (means[CHOSEN] - means[REJECTED]) - 0.5
    wanted = -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["MPO", "WPO and LD", "without reference"])
def test_of_a_model(name: str, layout: str) -> None:
    model, options = make("Llama").double(), OPTIONS[name]
    ids = torch.randint(3, 30, (4, 7))
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[:, 3:] = True
    attention = torch.ones(4, 7, dtype=torch.long)
    ref = -4 * torch.rand(4, 6, dtype=torch.float64)
    pairs = torch.tensor([0, 2]), torch.tensor([1, 3])
    stats = fastrlhf.model_token_stats(
        model, ids, attention, mask=mask, with_stats=("log_sum_sq_probs",)
    )
    squares = stats.log_sum_sq_probs if options.get("use_weighting") else None
    wanted, _ = fastrlhf.dpo_loss(
        stats.logprob, ref, *pairs, 0.3, mask=mask[:, 1:], log_sum_sq_probs=squares, **options
    )
    if layout == "packed":
        given = {"cu_seqlens": torch.arange(5) * 7, "mask": mask.view(1, -1)}
        of_tokens = F.pad(ref, (1, 0)).view(1, -1)[:, 1:]
        call = (ids.view(1, -1), None, of_tokens)
    else:
        given, call = {"mask": mask}, (ids, attention, ref)
    found, _ = fastrlhf.model_dpo_loss(model, *call, *pairs, 0.3, **given, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found.mean(), parameters),
        torch.autograd.grad(wanted.mean(), parameters),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5  # packed positions are embedded in fp32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss_type": ("simpo", "sigmoid")}, ValueError, "loss_type: expected one of .*'simpo'"),
        ({"loss_type": "simpo", "rpo_alpha": 1.0}, ValueError, "rpo_alpha: .*'simpo' does not"),
        ({"loss_type": "cpo", "average": True}, ValueError, "average: .*'cpo' does not"),
        ({"loss_type": "orpo", "loss_weights": [2.0]}, ValueError, "loss_weights: .*'orpo'"),
        ({"margin": 1.0}, TypeError, "linear_dpo_loss: unexpected option 'margin'"),
        ({"ld_alpha": 0.5}, ValueError, "ref_logps: expected log-probs of tokens"),
        ({"loss_type": ("hinge", "ipo"), "ref": None}, ValueError, "ref_logps: .*'hinge', 'ipo'"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, free = inputs(), changed.get("loss_type") in ("simpo", "cpo", "orpo")
    ref = None if free or "ref" in changed else x["ref"].sum(-1)
    options = {k: v for k, v in changed.items() if k != "ref"}
    with pytest.raises(error, match=f"^{message}"):
        fastrlhf.linear_dpo_loss(
            x["hidden"], x["weight"], x["targets"], ref, CHOSEN, REJECTED, **options
        )
