"""Whatever is done with a model while it has lazy logits: generation, evaluation, copies, compilers
and transforms.
"""

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lazy_inputs import INPUTS, X, log_probs, nothing_built, saved
from support.lazy_wrappers import LOOPS, lazy, warnings_of_builds
from support.tiny_models import make
from support.wrapped_losses import make_batch, small_model
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")

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
