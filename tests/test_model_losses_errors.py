"""Losses of models: errors name the argument and say what to do, and transforms are refused or
work.
"""

import pytest
import torch
from support.model_loss_problems import (
    B_T,
    B_T1,
    LOSSES,
    PAIRS,
    SEQUENCES,
    TOKENS,
    gradients,
    own_loss,
    restarting,
)
from support.tiny_models import batch, make
from torch import Tensor, nn

import fastrlhf

transformers = pytest.importorskip("transformers", reason="needs transformers")

WRONG = {
    "old_logprobs of T": (
        lambda m, b: policy_of(m, b, old_logprobs=torch.zeros(B_T)),
        ValueError,
        r"^old_logprobs: expected shape \(3, 8\).*old_logprobs\[:, 1:\].*\[:, :-1\]",
    ),
    "advantages of T": (
        lambda m, b: policy_of(m, b, advantages=torch.zeros(B_T)),
        ValueError,
        r"^advantages: expected shape \(3, 8\).*advantages\[:, 1:\]",
    ),
    "advantages of other sequences": (
        lambda m, b: policy_of(m, b, advantages=torch.zeros(4)),
        ValueError,
        r"^advantages: expected shape",
    ),
    "mask of T - 1": (
        lambda m, b: policy_of(m, b, mask=b["mask"][:, 1:]),
        ValueError,
        r"^mask: expected shape \(3, 9\).*column of zeros before it",
    ),
    "no mask": (
        lambda m, b: fastrlhf.model_dpo_loss(
            m, b["input_ids"], None, torch.zeros(3), **PAIRS, mask=None
        ),
        TypeError,
        r"^mask: ",
    ),
    "side inputs of T": (
        lambda m, b: fastrlhf.model_linear_loss(
            own_loss, m, b["input_ids"], None, torch.zeros(B_T)
        ),
        ValueError,
        r"^side_inputs\[0\]: expected shape \(3, 8\)",
    ),
    "groups of T": (
        lambda m, b: fastrlhf.model_linear_loss(
            own_loss, m, b["input_ids"], groups=torch.zeros(B_T, dtype=torch.long)
        ),
        ValueError,
        r"^groups: expected shape \(3, 8\)",
    ),
    "reference of T": (
        lambda m, b: fastrlhf.model_dpo_loss(
            m, b["input_ids"], None, torch.zeros(B_T), **PAIRS, mask=b["mask"]
        ),
        ValueError,
        r"^ref_logps: expected shape \(3, 8\)",
    ),
    "pairs": (
        lambda m, b: fastrlhf.model_dpo_loss(
            m,
            b["input_ids"],
            None,
            torch.zeros(3),
            torch.tensor([0]),
            torch.tensor([3]),
            mask=b["mask"],
        ),
        ValueError,
        r"^yl_idxs: expected indices in \[0, 3\)",
    ),
    "an option": (
        lambda m, b: policy_of(m, b, cliprange=0.2),
        TypeError,
        r"^cliprange: .*LlamaForCausalLM",
    ),
    "labels": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"], labels=b["input_ids"]),
        ValueError,
        "^labels: ",
    ),
    "weights of T": (
        lambda m, b: fastrlhf.sft_loss(m, **b, weights=torch.zeros(B_T)),
        ValueError,
        r"^weights: expected shape \(3, 8\).*weights\[:, 1:\]",
    ),
    "weights that are words": (
        lambda m, b: fastrlhf.sft_loss(m, **b, weights="dft"),
        TypeError,
        "^weights: expected a tensor",
    ),
    "dft of a smooth label": (
        lambda m, b: fastrlhf.sft_loss(m, **b, label_smoothing=0.1, loss_type="dft"),
        ValueError,
        "^label_smoothing: expected 0 with loss_type 'dft'",
    ),
    "smoothing": (
        lambda m, b: fastrlhf.sft_loss(m, **b, label_smoothing=2),
        ValueError,
        "^label_smoothing: ",
    ),
    "normalizer": (
        lambda m, b: fastrlhf.sft_loss(m, **b, normalizer=0),
        ValueError,
        "^normalizer: ",
    ),
    "vocabularies": (
        lambda m, b: fastrlhf.model_kl_divergence(
            m, make("Llama", vocab_size=90), b["input_ids"] % 90
        ),
        ValueError,
        "^teacher: expected a vocabulary of 101.*90",
    ),
    "itself": (
        lambda m, b: fastrlhf.model_kl_divergence(m, m, **b),
        ValueError,
        "^teacher: expected another",
    ),
    "direction": (
        lambda m, b: fastrlhf.model_kl_divergence(m, make("GPT2"), **b, direction="left"),
        ValueError,
        "^direction: ",
    ),
    "packed rows": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"], cu_seqlens=torch.tensor([0, 27])),
        ValueError,
        "^cu_seqlens: ",
    ),
    "borders": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"][:1], cu_seqlens=torch.tensor([0, 8])),
        ValueError,
        "^cu_seqlens: expected to end at 9",
    ),
    "packed with a cache": (
        lambda m, b: fastrlhf.sft_loss(
            m, b["input_ids"][:1], cu_seqlens=torch.tensor([0, 4, 9]), use_cache=True
        ),
        ValueError,
        "^use_cache: expected none with packed sequences",
    ),
    "packed after a cache": (
        lambda m, b: fastrlhf.sft_loss(
            m,
            b["input_ids"][:1],
            position_ids=restarting(),
            past_key_values=transformers.DynamicCache(),
        ),
        ValueError,
        "^past_key_values: expected none with packed sequences",
    ),
    "positions that go on": (
        lambda m, b: fastrlhf.sft_loss(
            m,
            b["input_ids"][:1],
            cu_seqlens=torch.tensor([0, 4, 9]),
            position_ids=torch.arange(TOKENS)[None],
        ),
        ValueError,
        "^position_ids: expected to go on by 1 within the sequences",
    ),
    "positions with a mask": (
        lambda m, b: fastrlhf.sft_loss(
            m, b["input_ids"][:1], torch.ones(1, TOKENS), position_ids=restarting()
        ),
        ValueError,
        "^attention_mask: expected None where position_ids start again",
    ),
    "the name of the Trainer": (
        lambda m, b: fastrlhf.sft_loss(m, **b, num_items_in_batch=3),
        ValueError,
        "^num_items_in_batch: expected none.*normalizer",
    ),
    "tokens seen ahead": (
        lambda m, b: fastrlhf.sft_loss(m, **b, is_causal=False),
        ValueError,
        "^is_causal: expected none",
    ),
    "some logits": (
        lambda m, b: fastrlhf.sft_loss(m, **b, logits_to_keep=torch.arange(8, -1, -1)),
        ValueError,
        "^logits_to_keep: expected none",
    ),
    "no sequence": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"][:0]),
        ValueError,
        r"^input_ids: expected shape \(B, T\), neither 0",
    ),
    "packed with a mask": (
        lambda m, b: fastrlhf.sft_loss(
            m, b["input_ids"][:1], torch.ones(1, TOKENS), cu_seqlens=torch.tensor([0, 4, 9])
        ),
        ValueError,
        "^attention_mask: expected None with cu_seqlens",
    ),
}


def policy_of(model: nn.Module, inputs: dict[str, Tensor], **change) -> tuple:
    given = {
        "old_logprobs": torch.zeros(B_T1), "advantages": torch.zeros(SEQUENCES), **inputs, **change,
    }  # fmt: skip
    return fastrlhf.model_policy_loss(model, **given)


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument_and_say_what_to_do(case) -> None:
    call, error, message = WRONG[case]
    model = make("Llama")
    with pytest.raises(error, match=message):
        call(model, batch())
    # The model is as it was.
    assert "forward" not in vars(model.get_output_embeddings())


def test_transforms_are_refused_or_work() -> None:
    model, inputs = make("Llama"), batch()
    parameters = dict(model.named_parameters())
    fastrlhf.model_token_stats(model, **inputs)

    def of(loss: str):
        def function(values: dict[str, Tensor]) -> Tensor:
            with torch.nn.utils.stateless._reparametrize_module(model, values):
                return LOSSES[loss][1](model, inputs)[0].float()

        return function

    for loss in ("linear", "cross-entropy"):
        with pytest.raises(RuntimeError, match=r"^model_\w+: .*torch\.func"):
            torch.func.grad(of(loss))(parameters)
    for loss in ("dpo", "ppo", "gspo"):
        found = torch.func.grad(of(loss))(parameters)
        wanted = gradients(model, LOSSES[loss][1](model, inputs)[0].float())
        for name, want in wanted.items():
            torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-5, msg=name)
