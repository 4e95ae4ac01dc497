"""transformers.Trainer with its loss fused against itself as it is: losses, metrics, weights."""

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.matmuls import MatmulAudit
from support.tiny_models import SMALL, VOCAB, make, with_lora
from torch import Tensor, nn

hf = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

from fastrlhf.hf import own_loss  # noqa: E402
from fastrlhf.integrations import transformers as integration  # noqa: E402

STEPS, ROWS, LONGEST = 5, 4, 14
OWN = {name: vars(hf.Trainer)[name] for name in ("compute_loss", "prediction_step")}


@pytest.fixture(autouse=True)
def _taken_back() -> Iterator[None]:
    """Whatever a test does, the next one begins with the Trainer as it is."""
    yield
    integration.unpatch()
    assert {name: vars(hf.Trainer)[name] for name in OWN} == OWN


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """Counts the sums that are made in place of logits."""
    made, own = [], own_loss.summed_cross_entropy

    def counting(scorer, targets, *args, **kwargs):
        made.append(targets.numel())
        return own(scorer, targets, *args, **kwargs)

    monkeypatch.setattr(own_loss, "summed_cross_entropy", counting)
    return made


def examples(count: int = STEPS * 2 * ROWS) -> list[dict[str, list[int]]]:
    """Sequences of different lengths, whose labels are no input ids, and -100 here and there."""
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    found = []
    for _ in range(count):
        size = draw(4, LONGEST)[0]
        drawn = zip(draw(1, VOCAB, size), draw(0, 10, size), strict=True)
        labels = [-100 if out < 3 else x for x, out in drawn]
        found.append({"input_ids": draw(1, VOCAB, size), "labels": labels})
    return found


def padded(rows: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    def stacked(values: list[list[int]], filler: int) -> Tensor:
        found = torch.full((len(values), LONGEST), filler)
        for to, value in zip(found, values, strict=True):
            to[slice(len(value)) if side == "right" else slice(-len(value), None)] = torch.tensor(
                value
            )
        return found

    return {
        "input_ids": stacked([row["input_ids"] for row in rows], 0),
        "attention_mask": stacked([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": stacked([row["labels"] for row in rows], -100),
    }


def packed(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return hf.DataCollatorWithFlattening()(rows)


def with_shift_labels(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """As context parallelism gives them, which are those that count."""
    batch = padded(rows)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    other = torch.where(shifted == -100, -100, VOCAB - 1 - shifted)
    return {**batch, "shift_labels": other}


def trainer(
    model: nn.Module,
    folder: Path,
    collate: Callable = padded,
    kind: type = hf.Trainer,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    arguments = {
        "per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS,
        "max_steps": STEPS, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.02,
        "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "use_cpu": True,
        "disable_tqdm": True, "report_to": [], "save_strategy": "no", **arguments,
    }  # fmt: skip
    return kind(
        model, hf.TrainingArguments(output_dir=str(folder), **arguments), data_collator=collate,
        train_dataset=examples(), eval_dataset=examples(2 * ROWS), **(options or {}),
    )  # fmt: skip


def qwen2(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = hf.Qwen2Config(**{**SMALL, **changes})
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def four_bit_head() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = make("Llama", hidden_size=64, head_dim=16, vocab_size=128)
    weight = bnb.nn.Params4bit(model.lm_head.weight.data, requires_grad=False, quant_type="nf4")
    model.lm_head = bnb.nn.Linear4bit(
        64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    model.lm_head.weight = weight
    model.lm_head.to("cpu")
    return with_lora(model, "q_proj")


def counts_by_itself() -> nn.Module:
    """A model that is not told how many tokens the accumulated batches have."""
    model = make("Llama")
    model.accepts_loss_kwargs = False
    return model


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    collate: Callable = padded
    arguments: dict[str, Any] = {}  # noqa: RUF012
    twice: int = 0  # calls that are made once more, since what the model does was not known


EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_steps": STEPS}
CASES = {
    "Llama": Case(partial(make, "Llama")),
    "Llama, tied": Case(partial(make, "Llama, tied")),
    "Qwen2": Case(qwen2),
    "Qwen2, tied": Case(partial(qwen2, tie_word_embeddings=True)),
    "Gemma2, softcap": Case(partial(make, "Gemma2"), twice=1),
    "experts": Case(partial(make, "Mixtral", **EXPERTS)),
    "LoRA": Case(lambda: with_lora(make("Llama"), "q_proj")),
    "LoRA on the head": Case(lambda: with_lora(make("Llama"), "q_proj", "lm_head")),
    "DoRA on the head": Case(lambda: with_lora(make("Llama"), "lm_head", use_dora=True)),
    "4-bit head": Case(four_bit_head),
    "padded left": Case(partial(make, "Llama"), partial(padded, side="left")),
    "packed": Case(partial(make, "Llama"), packed),
    "shift_labels": Case(partial(make, "Llama"), with_shift_labels),
    "accumulated": Case(partial(make, "Llama"), arguments=ACCUMULATED),
    "accumulated means": Case(counts_by_itself, arguments=ACCUMULATED),
    "averaged": Case(
        partial(make, "Llama"), arguments={"average_tokens_across_devices": False, **ACCUMULATED}
    ),
    "bf16": Case(partial(make, "Llama"), arguments={"bf16": True}),
    "checkpoints": Case(partial(make, "Llama"), arguments={"gradient_checkpointing": True}),
    "compiled": Case(
        partial(make, "Llama"), arguments={"torch_compile": True, "torch_compile_backend": "eager"}
    ),
}  # fmt: skip


class Run(NamedTuple):
    logged: list[tuple[float, float]]  # loss and norm of the gradient, by step
    evaluated: float
    weights: Tensor


def run(case: Case, folder: Path, collate: Callable | None = None) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the compiler and bitsandbytes cast
        made = trainer(case.make(), folder, collate or case.collate, **case.arguments)
        made.train()
        evaluated = made.evaluate()["eval_loss"]
    logged = [(x["loss"], x["grad_norm"]) for x in made.state.log_history if "loss" in x]
    trained = [p.detach().flatten() for p in made.model.parameters() if p.requires_grad]
    return Run(logged, evaluated, torch.cat(trained).double())


def difference(one: Run, other: Run) -> tuple[float, float]:
    """Of numbers and of weights, each relative."""
    a, b = (torch.tensor([*sum(x.logged, ()), x.evaluated]).double() for x in (one, other))
    of_weights = (one.weights - other.weights).norm() / other.weights.norm()
    return float(((a - b).abs() / b.abs()).max()), float(of_weights)


@pytest.mark.parametrize("name", CASES)
def test_training_is_as_without_the_patch(name, tmp_path, fused, caplog) -> None:
    """To rounding. How much that is, the same batches with their rows in the opposite order tell,
    or in bf16 the run in fp32: in five steps an error in the last place grows some tenfold.
    """
    case = CASES[name]
    plain = run(case, tmp_path)
    if case.arguments.get("bf16"):
        rounded = run(case._replace(arguments={}), tmp_path)
    else:
        rounded = run(case, tmp_path, lambda rows: case.collate(rows[::-1]))
    assert not fused
    with integration.patched():
        ours = run(case, tmp_path)
    batches = STEPS * case.arguments.get("gradient_accumulation_steps", 1) + 2
    assert len(fused) == batches + case.twice
    assert not [x for x in caplog.records if x.name.startswith("fastrlhf")]
    assert len(plain.logged) == STEPS and plain.logged[0][0] != plain.logged[-1][0]
    # The module of a 4-bit head on a CPU rounds its weight to bf16 where no gradient is asked for.
    floor = 2**-9 if "4-bit" in name else 2**-20
    pairs = zip(difference(ours, plain), difference(rounded, plain), strict=True)
    for off, rounding in pairs:
        assert off <= 16 * rounding + floor, f"{off:.1e}, and rounding is {rounding:.1e}"


WIDE = {"vocab_size": 2000, "hidden_size": 16, "head_dim": 4}
TRAINED = {
    "head": (lambda: make("Llama", **WIDE), 3),
    "adapter": (lambda: with_lora(make("Llama", **WIDE), "q_proj"), 2),
    "nothing": (lambda: make("Llama", **WIDE).requires_grad_(False), 1),
}


@pytest.mark.parametrize("trained", TRAINED)
def test_as_many_matmuls_as_stated_and_no_logits(trained, tmp_path, monkeypatch) -> None:
    """In chunks of 16 tokens, for the workspace of a CPU would hold all these logits."""
    monkeypatch.setattr("fastrlhf.ops.linear_rows._WORKSPACE_BYTES", {"cpu": 16 * 4 * 2000})
    make_model, want = TRAINED[trained]
    model = make_model()
    made, batch = trainer(model, tmp_path), padded(examples(8))
    batch["labels"][0] = 5

    def audit(labels: Tensor) -> MatmulAudit:
        with MatmulAudit() as found:
            loss = made.compute_loss(model, {**batch, "labels": labels})
            if loss.requires_grad:
                loss.backward()
        return found

    own = audit(batch["labels"])
    integration.patch()
    audit(batch["labels"])  # which compares the head with its weight
    ours, nothing = audit(batch["labels"]), audit(torch.full_like(batch["labels"], -100))
    scored = int((batch["labels"][:, 1:] != -100).sum())
    assert ours.operations - nothing.operations == want * 2 * scored * 2000 * 16
    logits = batch["labels"].numel() * 2000
    assert own.largest >= logits > 2 * ours.largest


def plain_and_fused(made: Any, batch: dict, **options: Any) -> Iterator[tuple[Tensor, list]]:
    """A loss and the gradients of all parameters, without the patch and with it."""
    for patch in (integration.unpatch, integration.patch):
        patch()
        made.model.zero_grad()
        loss = made.compute_loss(made.model, dict(batch), **options)
        loss.backward()
        yield loss.detach(), [p.grad for p in made.model.parameters()]


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7), torch.tensor(3.5), torch.tensor(0)])
@pytest.mark.parametrize("labelled", [True, False])
def test_any_count_of_items(items, labelled, tmp_path, fused) -> None:
    """Without a label the loss is what it is without the patch, and so are gradients of zero."""
    if labelled and items is not None and not items:
        pytest.skip("not a count of these")
    batch = padded(examples(ROWS))
    if not labelled:
        batch["labels"][:] = -100
    made = trainer(make("Llama"), tmp_path)
    (loss, gradients), (ours, found) = plain_and_fused(made, batch, num_items_in_batch=items)
    assert fused
    torch.testing.assert_close(ours, loss, equal_nan=True)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_outputs_that_are_tuples(dtype, tmp_path, fused) -> None:
    made, batch = trainer(make("Llama"), tmp_path), padded(examples(ROWS))
    with torch.autocast("cpu", dtype):
        (loss, gradients), (ours, found) = plain_and_fused(made, {**batch, "return_dict": False})
    assert len(fused) == 1 and ours.dtype == loss.dtype
    places = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, loss, rtol=places, atol=0)
    scale = max(float(g.norm()) for g in gradients)
    for got, want in zip(found, gradients, strict=True):
        assert float((got - want).norm()) <= 4 * places * scale


def right(prediction: Any) -> dict[str, float]:
    logits, labels = prediction
    hit = (logits.argmax(-1)[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100]
    return {"right": float(hit.mean())}


def test_evaluation_has_logits_where_they_are_asked_for(tmp_path, fused, caplog) -> None:
    model, found = make("Llama"), []
    ways = ({}, {"compute_metrics": right}, {
        "compute_metrics": right,
        "preprocess_logits_for_metrics": lambda logits, labels: logits + 0.0,
    })  # fmt: skip
    for options in ways:
        made = trainer(model, tmp_path, options=options)
        plain = made.evaluate()
        with integration.patched():
            ours = made.evaluate()
        found.append(len(fused))
        for name in ("eval_loss", "eval_right"):
            assert ours.get(name) == pytest.approx(plain.get(name), rel=1e-5)
    assert found == [2, 2, 2], "the loss alone is fused, and the others are not"
    with integration.patched():
        logits = made.predict(made.eval_dataset).predictions
    assert logits.shape == (2 * ROWS, LONGEST, VOCAB)
    assert len(fused) == 2 and not caplog.records


class Halved(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not return_outputs:
            return found / 2
        assert found[1].logits.shape[:2] == inputs["input_ids"].shape
        return found[0] / 2, found[1]


def test_a_trainer_that_calls_the_loss_of_its_base_class(tmp_path, fused) -> None:
    made = trainer(make("Llama"), tmp_path, kind=Halved)
    (loss, gradients), (ours, found) = plain_and_fused(made, padded(examples(ROWS)))
    assert len(fused) == 1
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)
    made.evaluate()  # of whose outputs it might look at the logits
    assert len(fused) == 1


class OwnHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) ** 3


def with_own_head() -> nn.Module:
    model = make("Llama")
    head = OwnHead(model.lm_head.in_features, VOCAB, bias=False)
    model.lm_head = head
    return model


def with_own_loss() -> nn.Module:
    model = make("Llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    return model


def with_loss_of_its_forward() -> nn.Module:
    model = make("Llama")
    own = model.forward

    def forward(input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = own(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output["loss"] = F.cross_entropy(output.logits[:1, -1], labels[:1, 0].clamp(min=0))
        return output

    model.forward = forward
    return model


def classifier() -> nn.Module:
    config = hf.LlamaConfig(**SMALL, num_labels=3)
    return hf.AutoModelForSequenceClassification.from_config(config)


def encoder_decoder() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.AutoModelForSeq2SeqLM.from_config(config)


def with_prompts() -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(make("Llama"), config)


# The model, how its Trainer is made, and what is said.
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a head of its own": (with_own_head, {}, "gives other logits than its weight"),
    "a loss of its own": (with_own_loss, {}, "loss_function"),
    "a loss of its forward": (with_loss_of_its_forward, {}, "its loss from loss_function"),
    "a classifier": (classifier, {}, "no output embeddings"),
    "an encoder-decoder": (encoder_decoder, {}, "encoder-decoder"),
    "learned prompts": (with_prompts, {}, "virtual tokens"),
    "DataParallel": (lambda: nn.DataParallel(make("Llama")), {}, "DistributedDataParallel"),
    "label smoothing": (
        partial(make, "Llama"), {"label_smoothing_factor": 0.1}, "label_smoothing_factor",
    ),
    "compute_loss_func": (
        partial(make, "Llama"),
        {"options": {"compute_loss_func": lambda out, labels, **_: out.logits.square().mean()}},
        "compute_loss_func",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by peft
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_served_is_left_alone_and_said_once(
    name, tmp_path, caplog, monkeypatch
) -> None:
    make_model, options, said = LEFT_ALONE[name]
    model = make_model().eval()
    wrapped = isinstance(model, nn.DataParallel)
    made = trainer(model.module if wrapped else model, tmp_path, **options)
    batch = padded(examples(ROWS))
    if name == "a classifier":
        batch["labels"] = torch.tensor([0, 1, 2, 0])
    plain = made.compute_loss(model, dict(batch))
    tried, own = [], integration.with_fused_loss
    monkeypatch.setattr(integration, "with_fused_loss", lambda *x: (tried.append(x), own(*x))[1])
    integration.patch()
    with caplog.at_level(logging.WARNING, logger="fastrlhf"):
        found = [made.compute_loss(model, dict(batch)) for _ in range(3)]
    assert found == [plain] * 3 and len(tried) <= 1
    (warning,) = caplog.messages
    assert "not fused by fastrlhf" in warning and said in warning


READERS = {
    "penalty": lambda o: o.loss + 0.1 * o.logits.logsumexp(-1).square().mean(),
    "detached factor": lambda o: o.loss * (1 + o.logits.detach().float().mean()),
    "statistic": lambda o: o.loss + float(o.logits.detach().max()),
    "item": lambda o: o.loss + o.logits[0, 0, 0].item(),
    "numpy": lambda o: o.loss + o.logits.detach().numpy().mean(),
    "argmax": lambda o: o.loss * (1 + o.logits.argmax(-1).sum()),
}


@pytest.mark.parametrize("how", ["forward", "hook"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", READERS)
def test_logits_that_are_read_after_the_loss_are_there(
    kind, training, how, tmp_path, caplog
) -> None:
    """In their place there are a few known numbers, which nobody must take for logits."""
    model = make("Llama")

    def read(output):
        output["loss"] = READERS[kind](output)
        return output

    if how == "hook":
        model.register_forward_hook(lambda module, args, output: read(output))
    else:
        own = model.forward
        model.forward = lambda **inputs: read(own(**inputs))
    made, batch = trainer(model, tmp_path), padded(examples(ROWS))

    def loss_and_gradient():
        model.train(training)
        if not training:
            return made.prediction_step(model, batch, prediction_loss_only=True)[0], None
        loss = made.compute_loss(model, batch)
        return loss, torch.autograd.grad(loss, model.get_output_embeddings().weight)[0]

    wanted = loss_and_gradient()
    integration.patch()
    found = loss_and_gradient()
    assert torch.equal(found[0], wanted[0])
    assert not training or torch.equal(found[1], wanted[1])
    assert "its logits are read" in caplog.text


def test_errors_of_the_model_itself_are_seen_and_forgotten(tmp_path, fused, caplog) -> None:
    made, batch = trainer(make("Llama"), tmp_path), padded(examples(ROWS))
    wrong = {**batch, "labels": batch["labels"].clamp(min=VOCAB)}
    integration.patch()
    with pytest.raises(IndexError, match="out of bounds"):
        made.compute_loss(made.model, wrong)
    assert "_loss_function" not in vars(made.model)
    before = len(fused)
    made.compute_loss(made.model, batch)
    assert len(fused) == before + 1 and not caplog.records


def test_two_fused_losses_are_a_mistake(tmp_path) -> None:
    made, batch = trainer(make("Llama"), tmp_path), padded(examples(ROWS))
    made.args.use_liger_kernel = True
    with integration.patched(), pytest.raises(ValueError, match="use_liger_kernel: expected False"):
        made.compute_loss(made.model, batch)


def is_on() -> bool:
    return {name: vars(hf.Trainer)[name] for name in OWN} != OWN


def test_on_and_off() -> None:
    integration.unpatch()  # of what is not patched
    integration.patch()
    integration.patch()
    assert is_on()
    integration.unpatch()
    assert not is_on()
    with integration.patched(), integration.patched():
        integration.patch()
        integration.unpatch()
        assert is_on()
    assert not is_on()
    integration.patch()
    with integration.patched():
        pass
    assert is_on()


def test_threads_leave_it_in_any_order() -> None:
    start = threading.Barrier(8)

    def enter() -> None:
        start.wait()
        for _ in range(50):
            with integration.patched():
                assert is_on()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not is_on()


def test_a_patch_on_top_has_to_go_first(monkeypatch) -> None:
    integration.patch()
    with monkeypatch.context() as other:
        other.setattr(hf.Trainer, "compute_loss", lambda self: None)
        with pytest.raises(RuntimeError, match="patched by other code"):
            integration.unpatch()
    integration.unpatch()


def test_another_trainer_than_is_known_is_an_import_error(monkeypatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(hf.Trainer, "compute_loss", lambda self, model, inputs: None)
        with pytest.raises(ImportError, match=rf"{hf.__version__}.*compute_loss.*>= 5.0, < 6"):
            integration.patch()
    with monkeypatch.context() as other:
        other.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="what works is transformers"):
            integration.patch()
    assert not is_on()
