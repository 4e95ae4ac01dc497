"""Lazy logits of heads that are called in any way, patched, hooked or of unknown class, which are
left as they were; and functions of this library beside them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lazy_inputs import INPUTS, X, log_probs, nothing_built
from support.lazy_wrappers import LOOPS, differences, lazy
from support.tiny_models import VOCAB, make, with_lora
from support.wrapped_losses import LOSSES, small_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastrlhf
from fastrlhf.hf import own_loss
from fastrlhf.integrations import transformers as integration


def with_forward(model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    model.lm_head.forward = partial(forward, model.lm_head)
    return model


def with_hook(model: nn.Module, hook: Any) -> nn.Module:
    model.lm_head.register_forward_hook(hook)
    return model


def last_tokens(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
    logits = model(input_ids=x.ids, attention_mask=x.attention, logits_to_keep=5).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x.ids[:, -4:].flatten())


def some_tokens(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
    kept = torch.tensor([1, 2, 5])
    logits = model(input_ids=x.ids, attention_mask=x.attention, logits_to_keep=kept).logits
    return F.cross_entropy(logits.flatten(0, 1), x.ids[:, kept + 1].flatten())


def two_calls_of_the_head(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
    """The next token and the one after it, as with heads for several tokens."""
    hidden = model.model(x.ids).last_hidden_state
    first, second = model.lm_head(hidden[:, :-2]), model.lm_head(hidden[:, :-2].tanh())
    losses = [
        F.cross_entropy(logits.flatten(0, 1), x.ids[:, n : n - 2 or None].flatten())
        for n, logits in ((1, first), (2, second))
    ]
    return losses[0] + 0.3 * losses[1]


def stacked_heads(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
    """Several hidden states of each token in one call."""
    hidden = model.model(x.ids, output_hidden_states=True).hidden_states
    logits = model.lm_head(torch.stack(hidden[-2:], 1))
    return (
        F.cross_entropy(logits[:, 0].flatten(0, 1), x.ids.flatten())
        + logits[:, 1].log_softmax(-1).gather(-1, x.ids[..., None]).mean()
    )


def hidden_states_too(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
    out = model(input_ids=x.ids, labels=x.ids, output_hidden_states=True)
    return out.loss + out.hidden_states[-1].square().mean()


CALLS = {
    "last tokens": last_tokens, "some tokens": some_tokens, "two calls": two_calls_of_the_head,
    "stacked": stacked_heads, "hidden states": hidden_states_too,
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_a_model(call) -> None:
    assert not differences(partial(make, "Llama"), {call: CALLS[call]})


def test_a_loss_of_experts() -> None:
    def loss(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
        out = model(input_ids=x.ids, labels=x.ids, output_router_logits=True)
        assert float(out.aux_loss.detach()) > 0
        return out.loss

    def experts() -> nn.Module:
        model = make("Mixtral", num_local_experts=4, router_aux_loss_coef=0.5)
        model.set_experts_implementation("eager")
        return model

    assert not differences(experts, {"labels": loss})


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite", "Phi", "Llama, tied"])
def test_models_that_change_their_logits(name) -> None:
    assert not differences(partial(make, name), LOOPS if "Gemma" not in name else {
        name: LOOPS[name] for name in ("labels", "linear", "dpo, weighed")
    })  # fmt: skip


PATCHED = {
    "own forward": lambda head, hidden: F.linear(hidden, head.weight, head.bias),
    "scaled forward": lambda head, hidden: 1.7 * F.linear(hidden, head.weight),
    "bent forward": lambda head, hidden: F.linear(hidden.tanh(), head.weight),
    "fp32 forward": lambda head, hidden: F.linear(hidden, head.weight).float(),
}


@pytest.mark.parametrize("patch", PATCHED)
def test_a_head_whose_forward_was_replaced(patch) -> None:
    found = differences(
        lambda: with_forward(make("Llama"), PATCHED[patch]), {"linear": LOOPS["linear"]}
    )
    own = patch in ("own forward", "fp32 forward")
    said = "the forward of the head gives other logits than its weight"
    assert len(found) == (0 if own else 1) and all(said in text for text in found)


@pytest.mark.parametrize(
    ("hook", "builds"),
    [
        (lambda head, args, logits: logits * 0.6, False),
        (lambda head, args, logits: logits.float() / 0.7, False),
        (lambda head, args, logits: None, False),
        (lambda head, args, logits: logits.clamp(-1, 1), True),
        (lambda head, args, logits: 3 * torch.tanh(logits / 3), False),
        (lambda head, args, logits: logits.mul_(0.6), False),
    ],
)
def test_hooks_on_a_head(hook, builds) -> None:
    loops = {name: LOOPS[name] for name in ("labels", "linear", "dpo, weighed")}
    found = differences(lambda: with_hook(make("Llama"), hook), loops)
    assert len(found) == builds, found
    assert all("clamp" in text for text in found)


def hook_before(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0].tanh(),))
    return model


def test_hooks_before_a_head() -> None:
    assert not differences(lambda: hook_before(make("Llama")), {"linear": LOOPS["linear"]})


class Unknown(nn.Linear):
    """A head with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(32, VOCAB, bias=False)
        self.gain = nn.Parameter(torch.ones(()))


def state_of(model: nn.Module) -> Any:
    """All that could be left behind in a model."""
    return [
        (name, type(part), type(part).__name__, sorted(vars(part)), list(part._forward_hooks),
         list(part._forward_pre_hooks), vars(part).get("forward"), len(part._parameters))
        for name, part in model.named_modules()
    ]  # fmt: skip


def test_a_head_of_unknown_class_is_refused_and_left_alone() -> None:
    model = make("Llama")
    model.lm_head = Unknown()
    before = state_of(model)
    for enable in (fastrlhf.enable_lazy_logits, lambda x: lazy(x).__enter__()):
        with pytest.raises(TypeError, match="Unknown"):
            enable(model)
        assert state_of(model) == before
    with pytest.raises(TypeError, match="Linear"):
        fastrlhf.enable_lazy_logits(nn.Linear(2, 3))
    fastrlhf.disable_lazy_logits(model)
    assert state_of(model) == before


TAKEN_BACK = {
    "plain": partial(make, "Llama"),
    "tied": partial(make, "Gemma2"),
    "lora": lambda: with_lora(make("Llama"), "lm_head"),
    "saved": lambda: small_model("saved head"),
    "forward": lambda: with_forward(make("Llama"), PATCHED["own forward"]),
    "hook": lambda: with_hook(make("Llama"), lambda *_: None),
}


@pytest.mark.parametrize("kind", TAKEN_BACK)
def test_a_model_is_left_as_it_was(kind) -> None:
    model = TAKEN_BACK[kind]()
    before, parameters = state_of(model), list(model.parameters())
    with torch.no_grad():
        plain = model(**INPUTS).logits
        for _ in range(2):
            fastrlhf.enable_lazy_logits(model)
            fastrlhf.enable_lazy_logits(model)  # twice is as once
            kept = model(**INPUTS).logits
            assert type(kept) is not Tensor
            assert isinstance(model.get_output_embeddings(), type(before) and nn.Module)
            fastrlhf.disable_lazy_logits(model)
            assert state_of(model) == before
        assert all(x is y for x, y in zip(parameters, model.parameters(), strict=True))
        logits = model(**INPUTS).logits
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, plain, rtol=0, atol=0)
    # What was returned before stays what it is.
    torch.testing.assert_close(kept + 0, plain, rtol=0, atol=0)


def test_what_is_put_around_a_head_that_has_lazy_logits() -> None:
    """Other patches of its forward, before which and after which lazy logits are taken back."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = make("Llama")
    with torch.no_grad():
        plain = model(**INPUTS).logits
        with lazy(model):
            model.lm_head.forward = lambda hidden: 2 * F.linear(hidden, model.lm_head.weight)
            torch.testing.assert_close(model(**INPUTS).logits, 2 * plain)
            del model.lm_head.forward
            accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
            with nothing_built():
                torch.testing.assert_close(log_probs(model(**INPUTS).logits), log_probs(plain))
        torch.testing.assert_close(model(**INPUTS).logits, plain, rtol=0, atol=0)
        accelerate.hooks.remove_hook_from_module(model.lm_head)
        torch.testing.assert_close(model(**INPUTS).logits, plain, rtol=0, atol=0)


def test_an_error_within_takes_lazy_logits_back() -> None:
    model = make("Llama")
    before = state_of(model)
    with pytest.raises(ValueError, match="mine"), lazy(model):
        raise ValueError("mine")
    assert state_of(model) == before
    with lazy(model), lazy(model):  # the inner one leaves what the outer one has
        pass
    assert state_of(model) == before


def outcome(value: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    value.sum().backward()
    return [value.detach(), *(x.grad for x in model.parameters() if x.grad is not None)]


def of_head(model: nn.Module) -> Tensor:
    hidden, head = fastrlhf.head_inputs(model, **INPUTS)
    read = fastrlhf.lm_head(model)
    targets = fastrlhf.shift_targets(X.ids, X.attention)
    return sum(
        fastrlhf.linear_token_logprobs(hidden, x.weight, targets, **x.options()).mean()
        for x in (head, read)
    )


OURS = {
    "stats": lambda model: fastrlhf.model_token_stats(model, X.ids, X.attention).logprob,
    "dpo": lambda model: LOSSES["dpo"][0](model, model, X),
    "policy": lambda model: LOSSES["policy"][0](model, model, X),
    "sft": lambda model: LOSSES["sft"][0](model, model, X),
    "kl": lambda model: LOSSES["kl"][0](model, small_model("teacher"), X),
    "head": of_head,
    "own loss": lambda model: LOSSES["labels"][0](model, model, X),
}


@pytest.mark.parametrize("function", OURS)
@pytest.mark.parametrize("name", ["Llama", "Granite"])
def test_functions_of_this_library(name, function) -> None:
    model = make(name)
    plain = outcome(OURS[function](model), model)
    with lazy(model), nothing_built():
        torch.testing.assert_close(outcome(OURS[function](model), model), plain)


def test_both_ways_of_a_trainer() -> None:
    """The integration with transformers' Trainer takes the loss, and lazy logits are as well."""
    model = make("Llama")

    def losses() -> list[Tensor]:
        labels = X.ids.masked_fill(X.attention == 0, -100)
        call = partial(model, **INPUTS, labels=labels)
        return [call().loss, own_loss.with_fused_loss(model, labels, lambda: call().loss)]

    plain = losses()
    with integration.patched(), lazy(model), nothing_built():
        torch.testing.assert_close(losses(), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_head_within_a_checkpoint(reentrant) -> None:
    def loss(model: nn.Module, teacher: nn.Module, x: Any) -> Tensor:
        hidden = model.model(x.ids).last_hidden_state
        logits = checkpoint(model.lm_head, hidden, use_reentrant=reentrant)
        return F.cross_entropy(logits.flatten(0, 1), x.ids.flatten()) + logits.exp().mean()

    said = differences(partial(make, "Llama"), {"checkpoint": loss})
    assert [text for text in said if "builds the logits" not in text] == []


def test_a_tensor_that_is_changed_later() -> None:
    model, ids = make("Llama"), torch.tensor([0, 1])
    with torch.no_grad(), lazy(model):
        temperature = torch.full((4, 1, 1), 0.7)
        logits = model(**INPUTS).logits / temperature
        want = logits.logsumexp(-1)
        temperature.fill_(2.0)
        torch.testing.assert_close(logits.logsumexp(-1), want)
        some = model(**INPUTS).logits[ids]
        ids.fill_(2)
        with pytest.raises(RuntimeError, match="__getitem__ was given"):
            some.sigmoid()


@pytest.mark.filterwarnings("ignore")  # of peft, of what it renames
def test_adapters_around_a_head_that_has_lazy_logits() -> None:
    model = make("Llama")
    head = model.lm_head
    with lazy(model):
        with_lora(model, "lm_head")
    assert type(head) is nn.Linear
