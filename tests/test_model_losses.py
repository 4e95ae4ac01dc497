"""Losses of Hugging Face models, computed inside their forwards, against the models' own logits."""

import pytest
import torch
from support import model_loss_problems
from support.model_loss_problems import (
    LOSSES,
    PAIRS,
    PPO,
    SEQUENCES,
    TOKENS,
    Plain,
    assert_same,
    dpo,
    gradients,
    packed,
    packed_sides,
    policy,
    sides,
)
from support.tiny_models import ARCHITECTURES, batch, make
from torch import Tensor

import fastrlhf


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loss_is_that_of_the_models_logits(name, loss) -> None:
    exact = name != "Mixtral"  # whose experts know no fp64
    model = make(name).double() if exact else make(name)
    plain, ours = LOSSES[loss]
    found = ours(model, batch(), chunk_size=4)[0]
    assert_same(found, plain(Plain(model, batch())), model, 1e-9 if exact else 1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_on_the_left_changes_nothing(loss) -> None:
    model, inputs = make("GPT2").double(), batch()
    inputs["attention_mask"][:] = 1
    inputs["mask"] = torch.arange(TOKENS).expand(SEQUENCES, -1) >= 5
    padded = {name: torch.cat((x.new_zeros(SEQUENCES, 4), x), 1) for name, x in inputs.items()}
    _, ours = LOSSES[loss]

    def widened(x: Tensor) -> Tensor:
        return torch.cat((x.new_full((SEQUENCES, 4), torch.nan), x), dim=1)

    of_tokens = ("old", "ref", "of_tokens")
    wide = {name: widened(x) if name in of_tokens else x for name, x in sides().items()}
    whole = ours(model, inputs)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_loss_problems, "sides", lambda: wide)
        assert_same(ours(model, padded)[0], whole, model)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_a_batch_in_which_nothing_is_scored(loss, trained) -> None:
    model, teacher = make("Llama"), make("GPT2")
    inputs = batch()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    with torch.set_grad_enabled(trained):
        if loss == "divergence":
            made = fastrlhf.model_kl_divergence(model, teacher, **inputs).sum()
        else:
            made = LOSSES[loss][1](model, inputs)[0]
    assert made.requires_grad == trained
    if trained:
        found = gradients(model, made)
        assert found.keys() == dict(model.named_parameters()).keys()
        assert not any(g.any() for g in found.values())
    if loss not in ("dpo", "ipo", "aot"):
        assert made == 0


@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_the_outputs_come_along_without_logits(loss) -> None:
    model, inputs = make("Mixtral"), batch()
    options = {"output_router_logits": True, "output_hidden_states": True, "return_outputs": True}
    if loss == "divergence":
        values, outputs = fastrlhf.model_kl_divergence(model, make("Mixtral"), **inputs, **options)
        assert values.shape == (SEQUENCES, TOKENS - 1)
    else:
        *found, outputs = LOSSES[loss][1](model, inputs, **options)
        assert len(found) == 2
    assert len(outputs.hidden_states) == 3 and len(outputs.router_logits) == 2
    assert outputs.get("logits") is None
    assert outputs.aux_loss.requires_grad


def test_metrics_are_those_of_the_losses_of_log_probs() -> None:
    model, inputs, s = make("Llama").double(), batch(), sides()
    plain = Plain(model, inputs)
    _, metrics = policy(model, inputs, **PPO)
    _, wanted = fastrlhf.policy_loss(
        plain.logprob, s["old"], s["gain"], plain.mask, ref_logprobs=s["ref"],
        entropy=plain.entropy, **PPO,
    )  # fmt: skip
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(metrics[name], value, msg=name)
    _, rewards = dpo(model, inputs)
    _, expected = fastrlhf.dpo_loss(plain.logprob, s["ref_sums"], *PAIRS.values(), mask=plain.mask)
    torch.testing.assert_close(rewards, expected)
    loss, metrics = fastrlhf.sft_loss(model, **inputs, label_smoothing=0.1, z_loss=0.1)
    assert metrics.keys() == {"nll", "z_loss", "tokens"}
    assert metrics["tokens"] == plain.mask.sum()
    torch.testing.assert_close(metrics["nll"], plain.cross_entropy())
    z_loss = 0.1 * plain.logits[plain.mask].logsumexp(-1).square().mean()
    torch.testing.assert_close(metrics["z_loss"], z_loss)
    assert not any(x.requires_grad for x in metrics.values())
    for normalizer in (40, torch.tensor(40.0)):
        found, _ = fastrlhf.sft_loss(
            model, **inputs, label_smoothing=0.1, z_loss=0.1, normalizer=normalizer
        )
        torch.testing.assert_close(found, loss * plain.mask.sum() / 40)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dft"}, {"loss_type": "dft", "z_loss": 0.01}, {"label_smoothing": 0.2}],
)
def test_tokens_weigh_what_they_are_given_and_dft_what_they_are_likely(
    options, name, layout
) -> None:
    model, inputs = make(name).double(), batch()
    weights = sides()["of_tokens"]
    plain = Plain(model, inputs)
    targets = torch.where(plain.mask, plain.targets, -100)
    wanted = fastrlhf.cross_entropy(plain.logits, targets, weights=weights, **options)
    given, of_tokens = dict(inputs), weights
    if layout == "packed":
        given, there = packed(inputs)
        of_tokens = packed_sides(there)["of_tokens"]
    found, metrics = fastrlhf.sft_loss(model, **given, weights=of_tokens, **options)
    assert_same(found, wanted, model, 1e-9 if layout == "padded" else 1e-5)
    nll = -plain.logprob[plain.mask].mean()
    torch.testing.assert_close(metrics["nll"], nll.detach(), rtol=1e-5, atol=0)
    z_loss = options.get("z_loss", 0) * plain.logits[plain.mask].logsumexp(-1).square().mean()
    torch.testing.assert_close(metrics["z_loss"].double(), z_loss.detach(), rtol=1e-5, atol=0)


def test_reference_log_probs_of_tokens_and_losses_that_are_weighed() -> None:
    model, inputs, s = make("Llama").double(), batch(), sides()
    plain = Plain(model, inputs)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    losses, _ = fastrlhf.model_dpo_loss(
        model, inputs["input_ids"], inputs["attention_mask"], s["ref"], **PAIRS,
        mask=inputs["mask"], chunk_size=4,
    )  # fmt: skip
    wanted, _ = fastrlhf.dpo_loss(plain.logprob, s["ref"], *PAIRS.values(), mask=plain.mask)
    assert_same((losses * weights).sum(), (wanted * weights).sum(), model)


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_losses_without_a_reference(layout, loss_type) -> None:
    model, inputs = make("Llama").double(), batch()
    plain = Plain(model, inputs)
    hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    wanted, _ = fastrlhf.linear_dpo_loss(
        hidden, head.weight, targets, None, *PAIRS.values(), loss_type=loss_type
    )
    assert plain.logprob.shape == targets[:, 1:].shape
    given = inputs if layout == "padded" else packed(inputs)[0]
    ids, attention = given.pop("input_ids"), given.pop("attention_mask")
    found, _ = fastrlhf.model_dpo_loss(
        model, ids, attention, None, **PAIRS, **given, loss_type=loss_type
    )
    assert_same(found.mean(), wanted.mean(), model, 1e-9 if layout == "padded" else 1e-5)
