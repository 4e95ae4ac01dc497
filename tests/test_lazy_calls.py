"""Whatever is done with a model while it has lazy logits: generation, evaluation, copies,
compilers, transforms, heads that were patched, and the functions of this library.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lazy_wrappers import LOOPS, differences, lazy, warnings_of_builds
from support.tiny_models import VOCAB, make, with_lora
from support.wrapped_losses import LOSSES, make_batch, small_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastrlhf
from fastrlhf.hf import own_loss
from fastrlhf.integrations import transformers as integration

transformers = pytest.importorskip("transformers", reason="needs transformers")

X = make_batch(0)
INPUTS = {"input_ids": X.ids, "attention_mask": X.attention}


@contextmanager
def nothing_built() -> Iterator[None]:
    with warnings_of_builds() as said:
        yield
    assert not said
    assert not fastrlhf.lazy_report().built


def log_probs(logits: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, X.ids[:, 1:, None])[..., 0]


# Generation and evaluation


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "scores": {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_generation_makes_its_logits(way, cache) -> None:
    model = make("Llama")
    found = []
    for each in (nullcontext(), lazy(model)):
        torch.manual_seed(2)
        with each, nothing_built():
            made = model.generate(
                X.ids, attention_mask=torch.ones_like(X.ids), max_new_tokens=6, use_cache=cache,
                pad_token_id=0, **WAYS[way],
            )  # fmt: skip
        found.append(made)
    if way == "scores":
        for plain, ours in zip(*(x.logits for x in found), strict=True):
            assert type(ours) is Tensor
            torch.testing.assert_close(ours, plain)
        found = [x.sequences for x in found]
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere"])
def test_evaluation(name, mode) -> None:
    model = make(name)
    with mode():
        plain = model(**INPUTS).logits
        want = log_probs(plain), plain.argmax(-1), plain.logsumexp(-1), plain.square().mean(-1)
        with lazy(model), nothing_built():
            logits = model(**INPUTS).logits
            found = log_probs(logits), logits.argmax(-1), logits.logsumexp(-1)
        with warnings_of_builds() as said:
            found = *found, logits.square().mean(-1)
    assert len(said) == 1
    torch.testing.assert_close(found, want)
    assert not any(x.requires_grad for x in found)


def evaluated(fused: bool, argmax: bool, folder: str) -> dict[str, float]:
    """What a Trainer tells of an evaluation, with metrics of the logits, or of their argmax."""
    seen = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(torch.as_tensor(found.predictions).double())
        live = found.label_ids != -100
        guesses = found.predictions if argmax else found.predictions.argmax(-1)
        return {"accuracy": float((guesses[:, :-1] == found.label_ids[:, 1:])[live[:, 1:]].mean())}

    rows = [
        {"input_ids": ids, "attention_mask": there, "labels": ids.masked_fill(there == 0, -100)}
        for ids, there in zip(X.ids, X.attention, strict=True)
    ]
    model = make("Llama")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            folder, per_device_eval_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
        eval_dataset=rows, compute_metrics=metrics,
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(-1)) if argmax else None,
    )  # fmt: skip
    with lazy(model) if fused else nullcontext():
        found = trainer.evaluate()
    times = ("runtime", "per_second", "time")
    kept = {name: x for name, x in found.items() if not any(part in name for part in times)}
    return kept | {"predictions": float(seen[0].sum())}


@pytest.mark.parametrize("argmax", [True, False])
def test_a_trainer_that_evaluates(argmax, tmp_path) -> None:
    plain = evaluated(False, argmax, str(tmp_path))
    with warnings_of_builds() as said:
        assert evaluated(True, argmax, str(tmp_path)) == pytest.approx(plain, rel=1e-5)
    assert bool(said) != argmax
    assert {"eval_loss", "eval_accuracy"} <= set(plain)


# Copies


def test_copies_of_a_model_make_their_logits() -> None:
    model = make("Llama")
    want = model(**INPUTS).logits
    buffer = io.BytesIO()
    with lazy(model):
        torch.save(model, buffer)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
        for other in copies:
            logits = other(**INPUTS).logits
            assert type(logits) is Tensor
            torch.testing.assert_close(logits, want, rtol=0, atol=0)
        assert type(model(**INPUTS).logits) is not Tensor
    for other in copies:
        with lazy(other), nothing_built():
            torch.testing.assert_close(log_probs(other(**INPUTS).logits), log_probs(want))
        assert type(other.lm_head) is nn.Linear


def test_copies_of_logits_are_built() -> None:
    model = make("Llama")
    with torch.no_grad():
        plain = model(**INPUTS)
        for kept in (
            lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy,
            lambda x: torch.load(saved(x), weights_only=True), lambda x: torch.tensor(x.tolist()),
            lambda x: torch.from_numpy(x.numpy()),
        ):  # fmt: skip
            with lazy(model):
                found = kept(model(**INPUTS).logits)
            torch.testing.assert_close(found + 0, plain.logits, check_stride=False)
        with lazy(model):
            outputs = copy.deepcopy(model(**INPUTS))
        torch.testing.assert_close(outputs.logits + 0, plain.logits)
        with lazy(model):
            assert repr(model(**INPUTS).logits) == repr(plain.logits)


def saved(x: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", ["plain", "lora", "lora head"])
def test_saved_models(kind, tmp_path) -> None:
    model = small_model(kind)
    names = []
    for each in (nullcontext(), lazy(model)):
        folder = tmp_path / str(len(names))
        with each:
            model.save_pretrained(folder)
        names.append({x.name: x.read_bytes() for x in folder.iterdir()})
    assert names[0].keys() == names[1].keys()
    for name, content in names[0].items():
        assert name.endswith(".md") or content == names[1][name], name
    with lazy(model):
        assert list(model.state_dict()) == list(small_model(kind).state_dict())


def replica_of(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a model for each GPU."""
    of = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, replica in of.items():
        for name, child in part._modules.items():
            setattr(replica, name, of[child])
        for name, parameter in part._parameters.items():
            # In the graph, and no parameter.
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in part._buffers.items():
            replica._buffers[name] = buffer
    return of[module]


def test_replicas_of_data_parallel() -> None:
    model = make("Llama")
    plain = model(**INPUTS, labels=X.ids).loss
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    with lazy(model), nothing_built():
        loss = replica_of(model)(**INPUTS, labels=X.ids).loss
        torch.testing.assert_close(loss, plain, rtol=0, atol=0)
        found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(found, wanted)


# Transforms and compilers


def test_transforms_of_torch_func() -> None:
    model = make("Llama")
    weights = {name: 1.1 * x.detach() for name, x in model.named_parameters()}
    other = {name: nn.Parameter(x) for name, x in weights.items()}

    def loss(of: dict[str, Tensor], ids: Tensor = X.ids) -> Tensor:
        logits = torch.func.functional_call(model, of, (ids,)).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def entropies(ids: Tensor) -> Tensor:
        log_p = model(ids.unsqueeze(0)).logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def results() -> Any:
        given = {name: x.clone().requires_grad_() for name, x in weights.items()}
        of_given = torch.autograd.grad(loss(given), list(given.values()))
        of_other = torch.autograd.grad(loss(other), list(other.values()))
        logits = torch.func.functional_call(model, other, (X.ids,)).logits
        grads = torch.func.grad(loss)(weights)
        each = torch.func.vmap(torch.func.grad(lambda w, x: loss(w, x[None])), (None, 0))
        return (
            of_given,
            of_other,
            logits.sigmoid().sum(),
            grads,
            each(weights, X.ids[:2]),
        )

    plain = results()
    with lazy(model):
        found = results()
    torch.testing.assert_close(found, plain)
    with lazy(model), nothing_built():
        torch.testing.assert_close(torch.func.grad(loss)(weights), plain[3])
    with torch.no_grad(), lazy(model):
        entropies(X.ids[0])


def test_traces_and_exports_have_logits() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make("GPT2")

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False, return_dict=False)[0]

    module = Logits()
    want = module(X.ids)
    with lazy(module.model), torch.no_grad():
        program = torch.export.export(module, (X.ids,))
        torch.testing.assert_close(program.module()(X.ids), want)


@pytest.mark.filterwarnings("ignore")  # of the tracer itself
def test_a_trace() -> None:
    lm = make("Llama")
    hidden = torch.randn(2, 5, 32)
    with lazy(lm):
        traced = torch.jit.trace(lm.lm_head, hidden, check_trace=False)
        assert type(lm.lm_head(hidden)) is not Tensor
    torch.testing.assert_close(traced(hidden), lm.lm_head(hidden))


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_model(before) -> None:
    torch._dynamo.reset()
    model = make("Llama", num_hidden_layers=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)

    def losses(of: nn.Module, seeds: range) -> list[Tensor]:
        loops = LOOPS["labels"], LOOPS["dpo, weighed"]
        return [loop(of, of, make_batch(i)) for i in seeds for loop in loops]

    if before:
        compiled(**INPUTS)
    with lazy(model):
        found = losses(compiled, range(2))
        frames = counter.frame_count
        found += losses(compiled, range(2, 4))
        assert counter.frame_count == frames
    torch.testing.assert_close(found, losses(model, range(4)))
    torch.testing.assert_close(losses(compiled, range(1)), found[:2])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss() -> None:
    torch._dynamo.reset()
    model = small_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        logprob = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -F.logsigmoid(logprob.sum(-1)).mean()

    compiled = torch.compile(loss, backend=counter)
    for i in range(4):
        ids = make_batch(i).ids
        model.zero_grad()
        plain = loss(model(ids).logits, ids)
        plain.backward()
        wanted = [x.grad for x in model.parameters()]
        model.zero_grad()
        with lazy(model):
            found = compiled(model(ids).logits, ids)
            found.backward()
        torch.testing.assert_close(found, plain)
        torch.testing.assert_close([x.grad for x in model.parameters()], wanted)
        if i == 1:
            frames = counter.frame_count
    assert counter.frame_count == frames


# Heads, and what models do with logits


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


# Functions of this library


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
