"""Preference losses against TRL's own methods, called on a stand-in for their trainers, and against
Liger's, so that none of their formulas is repeated here.
"""

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrlhf import cpo_loss, dpo_loss, kto_kl, kto_loss, simpo_loss, tpo_loss

pytest.importorskip("trl", reason="needs trl")

P, T = 4, 6
LENGTHS = torch.tensor([4, 2, 6, 3, 1, 5, 6, 2])  # of chosen sequences, then of rejected ones
YW, YL = torch.arange(P), P + torch.arange(P)
MASK = torch.arange(T) < LENGTHS[:, None]
ACCELERATOR = SimpleNamespace(
    device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, parallelism_config=None
)


def tokens(dtype: torch.dtype) -> dict[str, Tensor]:
    """Log-probs of tokens, 0 outside of the mask, as the head of TRL makes them."""
    pi = -2 * torch.rand(2 * P, T, dtype=torch.float64)
    ref = pi + 0.5 * torch.randn(2 * P, T, dtype=torch.float64)
    squares = -torch.rand(2 * P, T, dtype=torch.float64)
    made = {"pi": pi, "ref": ref, "squares": squares}
    made = {k: (v * MASK).to(dtype) for k, v in made.items()}
    made["pi"].requires_grad_()
    return made


def outputs_of(x: dict[str, Tensor]) -> SimpleNamespace:
    zeros = torch.zeros(2 * P, T)
    return SimpleNamespace(
        log_probs=x["pi"], log_sum_sq_probs=x["squares"], entropy=zeros, mean_logits=zeros,
        is_top1=zeros > 0,
    )  # fmt: skip


def of_trls_dpo(
    x: dict[str, Tensor], ref_sums: Tensor, beta: float, **options: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss of DPOTrainer, and its metrics, with reference log-probs that it has already."""
    trainer = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer
    types = options.pop("loss_type", ["sigmoid"])
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False,
        precompute_ref_logps=True, loss_types=types, beta=beta, _metrics=metrics,
        loss_weights=options.pop("loss_weights", None) or [1.0] * len(types),
        f_divergence_type=options.pop("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.pop("f_alpha_divergence_coef", 0.5),
        ld_alpha=options.pop("ld_alpha", None), use_weighting=options.pop("use_weighting", False),
        label_smoothing=options.pop("label_smoothing", 0.0), _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    assert not options
    whole_mask = torch.nn.functional.pad(MASK.long(), (1, 0))
    batch = {
        "input_ids": torch.zeros(2 * P, T + 1).long(), "completion_mask": whole_mask,
        "attention_mask": torch.ones(2 * P, T + 1),
        "ref_chosen_logps": ref_sums[:P], "ref_rejected_logps": ref_sums[P:],
    }  # fmt: skip
    loss = trainer._compute_loss(stand_in, lambda **_: outputs_of(x), batch, False)
    return loss, metrics["train"]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MPO": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {},
    ),
    "equal weights": ({"loss_type": ["hinge", "apo_down", "ipo"]}, {}),
    "sft alone": ({"loss_type": ["sft"]}, {}),
    "forward KL": ({"f_divergence_type": "forward_kl"}, {"f_divergence": "forward_kl"}),
    "JS of IPO": (
        {"f_divergence_type": "js_divergence", "loss_type": ["ipo", "sigmoid_norm"]},
        {"f_divergence": "js"},
    ),
    # TRL's exponent is u^(c - 1), the paper's u^-α.
    "alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence": "alpha", "f_alpha": 0.7},
    ),
    "LD": ({"ld_alpha": 0.4}, {}),
    "LD of IPO and aot": ({"ld_alpha": 0.4, "loss_type": ["ipo", "aot", "aot_unpaired"]}, {}),
    # (Of a hinge, TRL's product in place has no gradient.)
    "WPO": ({"use_weighting": True, "loss_type": ["sigmoid", "nca_pair"]}, {}),
    "robust": ({"loss_type": ["robust", "discopop"], "label_smoothing": 0.1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_options_have_the_loss_and_gradient_of_trls_dpo(name: str) -> None:
    theirs, ours = CASES[name]
    # TRL's alpha divergence does not take fp64.
    dtype = torch.float32 if name == "alpha" else torch.float64
    x, tight = tokens(dtype), 1e-5 if dtype == torch.float32 else 1e-12
    shared = {k: v for k, v in theirs.items() if not k.startswith("f_")}
    public = torch.minimum(LENGTHS[:P], LENGTHS[P:]).repeat(2)
    weights = torch.ones(2 * P, T, dtype=torch.float64)
    weights[torch.arange(T) >= public[:, None]] = theirs.get("ld_alpha", 1.0)
    ref_sums = (x["ref"] * weights).sum(-1).to(dtype)
    squares = x["squares"] if "use_weighting" in theirs else None
    losses, rewards = dpo_loss(
        x["pi"], x["ref"], YW, YL, 0.3, mask=MASK, log_sum_sq_probs=squares, **shared, **ours
    )
    expected, metrics = of_trls_dpo(x, ref_sums, 0.3, **theirs)
    torch.testing.assert_close(losses.mean(), expected, rtol=tight, atol=tight)
    found, wanted = (torch.autograd.grad(loss, x["pi"])[0] for loss in (losses.mean(), expected))
    # TRL adds up what the head gives outside of the mask too, which is 0.
    torch.testing.assert_close(found, wanted * MASK, rtol=10 * tight, atol=tight)
    if "ld_alpha" not in theirs and "f_divergence" not in ours:
        assert rewards[YW].mean().item() == pytest.approx(metrics["rewards/chosen"][0], rel=tight)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(loss_type: str) -> None:
    trainer = importlib.import_module("trl.trainer.kto_trainer").KTOTrainer
    x, label = tokens(torch.float64), torch.rand(2 * P) < 0.5
    ref_sums, mismatched = x["ref"].sum(-1), -20 * torch.rand(2, 2 * P, dtype=torch.float64)
    mismatched[0] += 3.0
    with_kl = loss_type == "kto"
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False,
        precompute_ref_logps=True, calculate_KL=with_kl, loss_type=loss_type, beta=0.3,
        desirable_weight=1.5, undesirable_weight=0.7, _metrics={"train": defaultdict(list)},
        _compute_kl_logps=lambda model, batch: mismatched[0], _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    batch = {
        "input_ids": torch.zeros(2 * P, T + 1).long(), "label": label, "ref_logps": ref_sums,
        "completion_mask": torch.nn.functional.pad(MASK.long(), (1, 0)),
        "attention_mask": torch.ones(2 * P, T + 1), "ref_KL_logps": mismatched[1],
    }  # fmt: skip
    expected = trainer._compute_loss(stand_in, lambda **_: outputs_of(x), batch, False)
    losses, _ = kto_loss(
        x["pi"].sum(-1), ref_sums, label, kto_kl(*mismatched) if with_kl else None, 0.3,
        loss_type=loss_type, desirable_weight=1.5, undesirable_weight=0.7,
    )  # fmt: skip
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(loss, x["pi"])[0] for loss in (losses.mean(), expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.1)],
)
def test_losses_without_reference_are_those_of_trls_cpo(loss_type: str, smoothing: float) -> None:
    module = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    x = tokens(torch.float64)["pi"]
    sums, averaged = x.sum(-1), loss_type in ("ipo", "simpo")
    given = sums / LENGTHS if averaged else sums
    stand_in = SimpleNamespace(
        alpha=0.0, accelerator=ACCELERATOR, loss_type=loss_type, beta=0.3, simpo_gamma=0.7,
        label_smoothing=smoothing,
    )  # fmt: skip
    expected, *_ = module.CPOTrainer.cpo_loss(stand_in, given[:P], given[P:])
    if loss_type == "simpo":
        losses, _ = simpo_loss(sums, LENGTHS, YW, YL, 0.3, 0.7, label_smoothing=smoothing)
    else:
        losses, _ = cpo_loss(
            sums, YW, YL, 0.3, alpha=0.0, loss_type=loss_type, lengths=LENGTHS,
            label_smoothing=smoothing,
        )  # fmt: skip
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo_is_trls(loss_type: str) -> None:
    module = importlib.import_module("trl.experimental.tpo.tpo_trainer")
    lengths = torch.cat((LENGTHS, torch.tensor([3, 1, 6, 2])))
    mask = torch.arange(T) < lengths[:, None]
    logits = torch.randn(3 * P, T + 1, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (3 * P, T + 1))
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, tpo_alpha=0.6, beta=0.3,
        loss_type=loss_type, label_smoothing=0.0, tpo_l_gamma=0.7, aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    batch = {
        "input_ids": ids, "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
        "attention_mask": torch.ones(3 * P, T + 1),
    }  # fmt: skip
    expected = module.TPOTrainer._compute_loss(
        stand_in, lambda **_: SimpleNamespace(logits=logits), batch, False
    )
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sums, gold = (logprobs * mask).sum(-1), 2 * P + torch.arange(P)
    losses, _ = tpo_loss(
        sums, YW, YL, gold, 0.3, nll=-sums[gold].sum() / lengths[gold].sum(), alpha=0.6,
        loss_type=loss_type, lengths=lengths, gamma=0.7,
    )  # fmt: skip
    torch.testing.assert_close(losses.mean(), expected)
    found, wanted = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0]
        for loss in (losses.mean(), expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["simpo", "cpo", "kto"])
def test_ligers_functions_have_the_same_losses(kind: str) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss.functional", reason="needs liger-kernel")
    assert liger is not None
    x = tokens(torch.float64)["pi"].detach()
    sums, target = x.sum(-1), torch.zeros(2 * P, T)
    if kind == "kto":
        from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction as Liger

        label, ref = torch.rand(2 * P) < 0.5, sums - 1
        expected = Liger.preference_loss_fn(
            sums, label, target, ref_log_prob_chunk=ref, beta=0.3, kl=torch.tensor(0.2)
        )[0]
        found = kto_loss(sums, ref, label, 0.2, 0.3)[0].mean()
    elif kind == "simpo":
        from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction as Liger

        means = sums / LENGTHS
        expected = Liger.preference_loss_fn(
            means[:P], means[P:], target, beta=2.0, gamma=0.7, label_smoothing=0.1
        )[0]
        found = simpo_loss(sums, LENGTHS, YW, YL, 2.0, 0.7, label_smoothing=0.1)[0].mean()
    else:
        from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction as Liger

        expected = Liger.preference_loss_fn(
            sums[:P], sums[P:], target, beta=0.3, label_smoothing=0.1
        )[0]
        found = cpo_loss(sums, YW, YL, 0.3, alpha=0.0, label_smoothing=0.1)[0].mean()
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-7)
