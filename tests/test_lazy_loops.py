"""Training loops that nobody edited, of models whose logits are lazy against themselves: losses,
gradients, matmuls and memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_gradients_as_accurate
from support.lazy_loops import (
    LOOPS,
    Batch,
    Loss,
    Models,
    assert_same_training,
    batch,
    models,
    train,
)
from support.matmuls import MatmulAudit
from support.tiny_models import with_lora
from torch import Tensor

import fastrlhf
from fastrlhf.recipes.memory import peak_memory

CPU = torch.device("cpu")
# With a cap that changes the logits by far more than rounding, and leaves some of them different.
CAP = {"final_logit_softcapping": 5.0}
CASES = {
    "fp32": ("Llama", torch.float32, {}),
    "bf16, tied": ("Llama, tied", torch.bfloat16, {}),
    "fp32, capped": ("Gemma2", torch.float32, CAP),
    "bf16, capped": ("Gemma2", torch.bfloat16, CAP),
}
# Looks for NaNs among all numbers, which makes them.
BUILDS = ("PPO, Categorical, validated",)
FUSED = [name for name in LOOPS if name not in BUILDS]
# Calls functions token by token, which takes long.
SLOW = "verl, no padding, v2"


@contextmanager
def lazily(models: Models) -> Iterator[None]:
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(fastrlhf.lazy_logits(model))
        yield


def doubled(models: Models) -> Models:
    return Models(*(deepcopy(model).double() for model in models))


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in LOOPS for case in CASES if name != SLOW or case == "fp32"],
)
def test_loops_train_as_they_did(name, case) -> None:
    architecture, dtype, changes = CASES[case]
    pair, loss_of = models(architecture, dtype, **changes), LOOPS[name]
    of = batch(pair.policy)
    exact = train(loss_of, doubled(pair), of, lazy=False)
    plain = train(loss_of, pair, of, lazy=False)
    fastrlhf.lazy_report(clear=True)
    lazy = train(loss_of, pair, of, lazy=True)
    report = fastrlhf.lazy_report(clear=True)
    assert_same_training(lazy, plain, exact, dtype)
    assert bool(report.built) == (name in BUILDS), str(report)
    assert report.fused


def test_a_divergence_of_two_trained_models_reaches_each_as_it_did() -> None:
    """Each is the other's constant in one of two terms (mutual learning)."""
    pair = models("Llama", torch.float32)
    of = batch(pair.policy)
    pair.other.requires_grad_()

    def gradients(pair: Models) -> list[Tensor]:
        a, b = (model(of.ids).logits for model in pair)
        loss = torch.zeros((), dtype=a.dtype)
        for student, teacher in ((a, b.detach()), (b, a.detach())):
            logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
            loss = loss + (logq.exp() * (logq - logp)).sum(-1).mean()
        parameters = [x for model in pair for x in model.parameters()]
        return list(torch.autograd.grad(loss, parameters))

    with lazily(pair):
        found = gradients(pair)
    assert_gradients_as_accurate(found, gradients(pair), gradients(doubled(pair)))


@pytest.mark.parametrize("built", ["", "before", "after"])
def test_gradients_end_in_logits_that_are_a_leaf(built) -> None:
    """As where one detaches logits, to go on backward from their gradient by hand."""
    pair = models("Llama", torch.float32)
    of = batch(pair.policy)

    def gradient(pair: Models) -> Tensor:
        logits = pair.policy(of.ids).logits
        leaf = logits.detach()
        if built == "before":
            leaf.cos()
        leaf.requires_grad_()
        if built == "after":
            leaf.cos().mean().backward()
        F.cross_entropy(leaf[:, :-1].flatten(0, 1), of.ids[:, 1:].flatten()).backward()
        return leaf.grad

    with lazily(pair):
        found = gradient(pair)
    assert_gradients_as_accurate([found], [gradient(pair)], [gradient(doubled(pair))])


def step_of(loss_of: Loss, pair: Models, of: Batch) -> None:
    loss_of(pair, of).backward()
    pair.policy.zero_grad()


@pytest.mark.parametrize("name", [name for name in FUSED if name != SLOW])
def test_no_loop_holds_logits(name) -> None:
    """At its peak a step holds less than a quarter of what the plain one does."""
    vocab = 4096
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    pair = models("Llama", torch.float32, vocab_size=vocab, **small)
    of = batch(pair.policy, rows=16, length=40)
    of = of._replace(mask=torch.ones_like(of.mask))
    work = lambda: step_of(LOOPS[name], pair, of)  # noqa: E731
    _, plain = peak_memory(work, CPU)
    with lazily(pair):
        _, lazy = peak_memory(work, CPU)
    assert plain > 2 * of.ids.numel() * vocab * 4  # logits, and their gradient or log-softmax
    assert lazy < plain / 4, f"{lazy / 2**20:.1f} MiB of {plain / 2**20:.1f}"


# Matmuls of the tokens with the vocabulary: G forward, and G each for hidden states and weight.

MATMULS = {
    "SFT, labels": (3, 2, 1),
    "SFT, shifted": (3, 2, 1),
    "SFT, float": (3, 2, 1),
    "log-probs": (4, 2, 1),
    "log-probs of cross-entropy": (4, 2, 1),
    "entropy": (4, 3, 1),
    "log-sum-exp": (4, 2, 1),
}


def of_logits(pair: Models, of: Batch) -> Tensor:
    return pair.policy(of.ids).logits[:, :-1] / 0.7


def logprobs(pair: Models, of: Batch) -> Tensor:
    found = of_logits(pair, of).log_softmax(-1).gather(-1, of.ids[:, 1:, None]).squeeze(-1)
    return (found * of.advantages).sum()


def logprobs_of_cross_entropy(pair: Models, of: Batch) -> Tensor:
    logits = of_logits(pair, of)
    found = -F.cross_entropy(logits.flatten(0, 1), of.ids[:, 1:].flatten(), reduction="none")
    return (found * of.advantages.flatten()).sum()


def entropy(pair: Models, of: Batch) -> Tensor:
    logits = of_logits(pair, of)
    found = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return (found * of.advantages).sum()


def log_sum_exp(pair: Models, of: Batch) -> Tensor:
    return (of_logits(pair, of).logsumexp(-1) * of.advantages).sum()


COUNTED = {
    **LOOPS, "log-probs": logprobs, "log-probs of cross-entropy": logprobs_of_cross_entropy,
    "entropy": entropy, "log-sum-exp": log_sum_exp,
}  # fmt: skip


@pytest.mark.parametrize("head", ["trained", "frozen", "no gradient"])
@pytest.mark.parametrize("name", MATMULS)
def test_matmuls(name, head) -> None:
    """Those of a head in training, of a frozen one (LoRA elsewhere), and without gradients."""
    vocab, width, rows, length = 1009, 32, 8, 32
    pair = models("Llama", torch.float32, vocab_size=vocab)
    if head == "frozen":
        pair = pair._replace(policy=with_lora(pair.policy, "q_proj", "v_proj"))
    of = batch(pair.policy, rows, length)
    of = of._replace(labels=of.ids)  # all of them count
    wanted = MATMULS[name][["trained", "frozen", "no gradient"].index(head)]
    with lazily(pair):
        COUNTED[name](pair, of)  # in which the head is compared with its weight
        with MatmulAudit(side=vocab) as audit, torch.set_grad_enabled(head != "no gradient"):
            loss = COUNTED[name](pair, of)
            if loss.requires_grad:
                loss.backward()
    found = audit.operations / (2 * rows * (length - 1) * vocab * width)
    assert wanted - 0.05 <= found <= wanted + 0.05
