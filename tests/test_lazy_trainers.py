"""Trainers of transformers and TRL, of models whose logits are lazy against themselves.

TRL's own trainers have a head that makes no logits; here they have what TRL did before: logits of
the model, and its functions of them.
"""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB
from support.trl_trainers import (
    DEPRECATIONS,
    ROUNDING,
    Record,
    assert_same,
    build,
    make,
    metrics_of,
    plain_heads,
    quiet,
    trained,
    transformers,
    trl,
    utils,
)
from torch import Tensor, nn

import fastrlhf

pytestmark = DEPRECATIONS


@contextmanager
def lazily(*models: nn.Module | None) -> Iterator[None]:
    with ExitStack() as modes:
        for model in models:
            if model is not None:
                modes.enter_context(fastrlhf.lazy_logits(model))
        yield


# transformers


def examples() -> list[dict[str, list[int]]]:
    """Sequences of one length, whose first words have no label."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, (24, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    return [
        {"input_ids": a.tolist(), "labels": b.tolist()} for a, b in zip(ids, labels, strict=True)
    ]


def train_supervised(architecture: str, *, lazy: bool, double: bool = False) -> Record:
    model = make(architecture)
    model = model.double() if double else model
    with tempfile.TemporaryDirectory() as folder, quiet():
        options = transformers.TrainingArguments(
            output_dir=folder, max_steps=5, per_device_train_batch_size=4, learning_rate=0.03,
            optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
            eval_strategy="steps", eval_steps=2, prediction_loss_only=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=options, train_dataset=examples(), eval_dataset=examples()[:8]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        start = trained(model)
        with lazily(*([model] if lazy else [])):
            trainer.train()
    return Record(metrics_of(trainer.state.log_history), trained(model), start, None)


@pytest.mark.parametrize("architecture", ["Llama", "Llama, tied", "Gemma2"])
def test_the_trainer_of_transformers_trains_as_it_did(architecture) -> None:
    plain = train_supervised(architecture, lazy=False)
    fastrlhf.lazy_report(clear=True)
    lazy = train_supervised(architecture, lazy=True)
    report = fastrlhf.lazy_report(clear=True)
    assert not report.built, str(report)
    assert {use.what for use in report.fused} == {"cross_entropy"}
    exact = partial(train_supervised, architecture, lazy=False, double=True)
    assert_same(lazy, plain, ROUNDING, exact)


# TRL


def add_head_of_before(
    model: nn.Module, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs=()
) -> None:
    """Give a model the fields of TRL's fused head by what its trainers did to logits before."""
    own = model.forward

    @wraps(type(model).forward)
    def forward(self, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any):
        if not fused_lm_head:
            return own(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        outputs = own(*args, **kwargs)
        shift_logits = outputs.logits[..., :-1, :].contiguous()
        shift_logits = shift_logits / temperature
        shift_labels = labels[..., 1:].clone()
        mask = shift_labels != -100
        shift_labels[~mask] = 0
        log_probs = utils.selective_log_softmax(shift_logits, shift_labels)
        log_probs[~mask] = 0.0
        with torch.no_grad():
            entropy = utils.entropy_from_logits(shift_logits)
            mean_logits = shift_logits.mean(-1)
            is_top1 = shift_logits.argmax(dim=-1) == shift_labels
            log_sum_sq_probs = torch.logsumexp(2.0 * shift_logits.log_softmax(-1), dim=-1)
        zeroed = {
            "entropy": entropy, "mean_logits": mean_logits, "is_top1": is_top1,
            "log_sum_sq_probs": log_sum_sq_probs,
        }  # fmt: skip
        return utils.FusedCausalLMOutput(
            log_probs=log_probs, label_mask=mask,
            **{name: x.masked_fill(~mask, 0) for name, x in zeroed.items()},
        )  # fmt: skip

    model.forward = MethodType(forward, model)


def logps_of_before(
    self: Any, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
    batch_size: Any = None, compute_entropy: bool = False, compute_aux_loss: bool = False,
    **kwargs: Any,
) -> tuple:  # fmt: skip
    """What GRPOTrainer asks of a model, as it did before."""
    batch_size = batch_size or input_ids.size(0)
    all_logps, all_entropies = [], []
    for start in range(0, input_ids.size(0), batch_size):
        ids = input_ids[start : start + batch_size]
        attention = attention_mask[start : start + batch_size]
        inputs = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        # One more, since the last one predicts what comes next.
        inputs["logits_to_keep"] = logits_to_keep + 1
        logits = model(**inputs).logits
        logits = logits[:, :-1, :]  # (B, L - 1, V)
        logits = logits[:, -logits_to_keep:, :]
        logits = logits / self.temperature
        all_logps.append(utils.selective_log_softmax(logits, ids[:, -logits_to_keep:]))
        if compute_entropy:
            with torch.no_grad():
                all_entropies.append(utils.entropy_from_logits(logits))
    entropies = torch.cat(all_entropies) if compute_entropy else None
    return torch.cat(all_logps), entropies, None


def train(kind: str, *, lazy: bool, **given: Any) -> Record:
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = build(kind, folder, **given)
        start = trained(trainer.model)
        with lazily(*((trainer.model, trainer.ref_model) if lazy else ())):
            trainer.train()
    return Record(metrics_of(trainer.state.log_history), trained(trainer.model), start, None)


@pytest.fixture
def of_before(monkeypatch) -> None:
    """TRL's trainers without their fused head."""
    for name in ("dpo", "grpo"):
        module = importlib.import_module(f"trl.trainer.{name}_trainer")
        monkeypatch.setattr(module, "add_fused_lm_head", add_head_of_before)
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", logps_of_before)


CASES = {
    "dpo": ("dpo", {}),
    "dpo, capped": ("dpo", {"model": "Gemma2"}),
    "dpo, WPO": ("dpo", {"use_weighting": True}),
    "dpo, LoRA": ("dpo", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
    "grpo": ("grpo", {"beta": 0.05}),
    "grpo, no reference": ("grpo", {"beta": 0.0, "num_iterations": 2, "temperature": 0.7}),
    "grpo, LoRA": ("grpo", {"beta": 0.05, "lora": {"target_modules": ["q_proj", "v_proj"]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trl_trains_as_it_did(case, of_before) -> None:
    kind, given = CASES[case]
    plain = train(kind, lazy=False, **given)
    fastrlhf.lazy_report(clear=True)
    lazy = train(kind, lazy=True, **given)
    report = fastrlhf.lazy_report(clear=True)
    assert not report.built, str(report)
    assert report.fused

    def exact() -> Record:
        with plain_heads():
            return train(kind, lazy=False, **given)

    assert_same(lazy, plain, ROUNDING, exact)
