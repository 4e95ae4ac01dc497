"""TRPO's products and steps of a language model: heads that are tied, and adapters over a frozen
base.
"""

import warnings

import pytest
import torch
from support.compare import relative_error
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from support.tiny_models import SMALL
from support.trpo_problems import MODES, TOLERANCE, bits, device_inputs, flat, same_bits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastrlhf
from fastrlhf import fisher_vector_product, lm_head, trpo_step


def hessian_of_kl(policy, params, vector, direction, mask=None, temperature=1.0) -> Tensor:
    """Hessian-vector product of the mean KL at the policy itself, by double backward."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = policy()
        kl = fastrlhf.kl_divergence(
            logits, logits.detach(), direction=direction, mask=mask, temperature=temperature
        )
        mean = kl.sum() / (kl.numel() if mask is None else mask.sum())
        slope = torch.autograd.grad(mean, params, create_graph=True)
        along = sum((g * v.view_as(g)).sum() for g, v in
                    zip(slope, vector.split([p.numel() for p in params]), strict=True))  # fmt: skip
        return flat(torch.autograd.grad(along, params))


class LanguageModel:
    """A tiny random Llama in fp64, its prompt, and its policies with and without the head."""

    def __init__(self, device, attention: str = "sdpa", **changes) -> None:
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        config = transformers.LlamaConfig(**SMALL | changes)
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention
        )
        nn.init.normal_(self.model.lm_head.weight, std=0.3)
        self.model.to(device, torch.float64).eval()
        self.ids = torch.randint(101, (2, 6), device=device)
        self.mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]], device=device)

    def logits(self) -> Tensor:
        return self.model(self.ids, use_cache=False).logits

    def hidden(self) -> Tensor:
        return self.model.base_model(self.ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("headed", [False, True])
def test_products_of_a_language_model_are_the_hessians_of_both_kls(
    mode, attention, headed, device
) -> None:
    lm = LanguageModel(device, attention)
    params = [p for n, p in lm.model.named_parameters() if not headed or "lm_head" not in n]
    head = lm_head(lm.model) if headed else None
    vector = device_inputs(device, sum(p.numel() for p in params))
    before = bits(lm.model.parameters())
    options = {"mask": lm.mask, "temperature": 0.7}
    found = fisher_vector_product(
        lm.hidden if headed else lm.logits, params, vector, head=head, mode=mode, **options
    )
    assert same_bits(lm.model.parameters(), before)
    for direction in ("forward", "reverse"):
        expected = hessian_of_kl(lm.logits, params, vector, direction, **options)
        # The softmax of transformers' eager attention is in fp32.
        assert relative_error(found, expected) < (1e-6 if attention == "eager" else TOLERANCE)
    assert relative_error(0.7 * found, expected) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_tied_head_is_trained_through_the_logits(mode, device) -> None:
    lm = LanguageModel(device, tie_word_embeddings=True)
    params = list(lm.model.parameters())
    vector = device_inputs(device, sum(p.numel() for p in params))
    found = fisher_vector_product(lm.logits, params, vector, mode=mode)
    assert relative_error(found, hessian_of_kl(lm.logits, params, vector, "forward")) < TOLERANCE
    with pytest.raises(ValueError, match=r"^head: "):
        fisher_vector_product(lm.hidden, params, vector, head=lm_head(lm.model), mode=mode)


def with_lora(lm: LanguageModel, *modules: str) -> list[nn.Parameter]:
    """Adapt the model in place; returns the parameters of the adapters, all that is trained."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of renamed properties
        lm.model = peft.get_peft_model(lm.model, config).double().eval()
    for name, p in lm.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return [p for p in lm.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("mode", MODES)
def test_adapters_alone_over_a_frozen_base(mode, device) -> None:
    lm = LanguageModel(device)
    params = with_lora(lm, "q_proj", "down_proj")
    size = sum(p.numel() for p in params)
    assert size < 2000
    vector = device_inputs(device, size)
    before = bits(lm.model.parameters())
    expected = hessian_of_kl(lm.logits, params, vector, "forward", lm.mask)
    found = fisher_vector_product(lm.logits, params, vector, mask=lm.mask, mode=mode)
    assert relative_error(found, expected) < TOLERANCE
    lm.hidden = lambda: lm.model.base_model.model.model(lm.ids).last_hidden_state
    found = fisher_vector_product(
        lm.hidden, params, vector, mask=lm.mask, mode=mode, head=lm_head(lm.model)
    )
    assert relative_error(found, expected) < TOLERANCE
    assert same_bits(lm.model.parameters(), before)


def test_adapters_of_the_head_itself_are_not_left_out_in_silence(device) -> None:
    lm = LanguageModel(device)
    params = with_lora(lm, "q_proj", "lm_head")
    vector = device_inputs(device, sum(p.numel() for p in params))
    expected = hessian_of_kl(lm.logits, params, vector, "forward")
    assert relative_error(fisher_vector_product(lm.logits, params, vector), expected) < TOLERANCE
    hidden = lambda: lm.model.base_model.model.model(lm.ids).last_hidden_state  # noqa: E731
    with pytest.raises(ValueError, match=r"^head: "):
        fisher_vector_product(hidden, params, vector, head=lm_head(lm.model))


@pytest.mark.parametrize("headed", [False, True])
def test_a_step_of_a_language_model_stays_within_its_region(headed, device) -> None:
    lm = LanguageModel(device)
    head = lm_head(lm.model) if headed else None
    params = [p for n, p in lm.model.named_parameters() if "lm_head" not in n]
    with torch.no_grad():
        old = lm.logits()
    info = trpo_step(
        lm.hidden if headed else lm.logits, params, lm.ids, device_inputs(device, 2, 6), lm.mask,
        max_kl=1e-4, damping=1e-2, head=head,
    )  # fmt: skip
    with torch.no_grad():
        kl = fastrlhf.kl_divergence(lm.logits(), old, direction="forward", mask=lm.mask)
    assert info.accepted and 0 < info.kl <= 1e-4 and info.surrogate > 0
    torch.testing.assert_close(info.kl, kl.sum() / lm.mask.sum())
