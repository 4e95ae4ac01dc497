"""Train tiny random models with TRL's trainers, offline, and record all that came of it."""

import contextlib
import importlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial, partialmethod, wraps
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.matmuls import MatmulAudit
from support.tiny_models import VOCAB, make

trl = pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets", reason="needs datasets")
peft = pytest.importorskip("peft", reason="needs peft")
tokenizers = pytest.importorskip("tokenizers", reason="needs transformers")
transformers = pytest.importorskip("transformers", reason="needs transformers")

utils = pytest.importorskip("trl.trainer.utils", reason="needs trl")
distillation_trainer = pytest.importorskip("trl.trainer.distillation_trainer", reason="needs trl")
chunked_divergence = pytest.importorskip("trl.kernels.chunked_divergence", reason="needs trl")

# Marks of tests that make TRL's trainers.
DEPRECATIONS = [
    pytest.mark.filterwarnings(f"ignore:{message}:FutureWarning")
    for message in (
        # What transformers renames and TRL still uses.
        "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated",
        # What TRL will drop, and does until then.
        "`label_smoothing_factor` is deprecated in `SFTTrainer`",
        "`compute_loss_func` is deprecated",
    )
]

# Where TRL's trainers call what makes their log-probs and divergences.
_DIVERGENCE = "ChunkedDivergenceFunction"
SEAMS = (
    (utils, "_ChunkedLogProbFunction"),
    # TRL 1.15 imports it when it calls it.
    (
        distillation_trainer if hasattr(distillation_trainer, _DIVERGENCE) else chunked_divergence,
        _DIVERGENCE,
    ),
)
OF_TRL = tuple(getattr(module, name) for module, name in SEAMS)

STEPS = 5
# Of metrics and of weights, as `differences` has them. TRL itself, with its sums in another order
# (tiles of 13 columns), differs by at most 4e-6 and 5e-5 from what it gives by default, and by 8e-6
# and 5e-5 from fp64 statistics of logits.
ROUNDING = 1e-5, 1e-4
# Not results, but when and how fast.
UNCOMPARED = ("runtime", "per_second", "total_flos", "step_time", "epoch", "learning_rate")
# The tokens of a message of the assistant are those between the generation marks.
CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
)


@cache
def tokenizer() -> Any:
    """Words w0, w1, … of the vocabulary of the tiny models, apart by spaces."""
    words = ["<pad>", "</s>", "<unk>"] + [f"w{i}" for i in range(3, VOCAB)]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        chat_template=CHAT,
    )  # fmt: skip


def _words(generator: torch.Generator, least: int, most: int) -> str:
    length = int(torch.randint(least, most + 1, (), generator=generator))
    return " ".join(f"w{int(i)}" for i in torch.randint(3, VOCAB, (length,), generator=generator))


def rows(kind: str, n: int = 24, seed: int = 0, longer: int = 1) -> Any:
    """Rows of random words, of different lengths, as the trainers of a kind take them."""
    generator = torch.Generator().manual_seed(seed)

    def text(most: int = 8, lead: str = " ") -> str:
        return lead + _words(generator, 2 * longer, most * longer)

    def chat() -> list[dict[str, str]]:
        return [
            {"role": role, "content": text(lead="")}
            for role in ("user", "assistant", "user", "assistant")
        ]

    fields: dict[str, Callable[[int], dict[str, Any]]] = {
        "text": lambda i: {"text": text(14, "")},
        "completion": lambda i: {"prompt": text(lead=""), "completion": text()},
        "chat": lambda i: {"messages": chat()},
        "pairs": lambda i: {"prompt": text(lead=""), "chosen": text(), "rejected": text()},
        "labelled": lambda i: {"prompt": text(lead=""), "completion": text(), "label": i % 3 > 0},
        "prompts": lambda i: {"prompt": text(lead="")},
    }
    return datasets.Dataset.from_list([fields[kind](i) for i in range(n)])


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """The share of words with an even number, which differs among completions and never changes."""
    words = [[w[1:] for w in text.split() if w[1:].isdigit()] for text in completions]
    return [sum(int(w) % 2 == 0 for w in some) / (1 + len(some)) for some in words]


@dataclass
class Record:
    """What training and evaluating gave, and how a model was before and after."""

    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    start: dict[str, Tensor]
    calls: "Calls"


@dataclass
class Calls:
    """How often log-probs or divergences were asked for at TRL's seams, and made by TRL itself."""

    asked: int = 0
    by_trl: int = 0
    rows: list[int] = field(default_factory=list)  # hidden states of each call at the seam


@dataclass(frozen=True)
class Kind:
    """Names of a trainer and what it takes by default: rows, and options of its config."""

    name: str
    rows: str
    rate: float
    options: dict[str, Any] = field(default_factory=dict)


_SAMPLED = {"num_generations": 4, "max_completion_length": 6}
KINDS = {
    "sft": Kind("SFT", "completion", 0.03),
    "dpo": Kind("DPO", "pairs", 0.03),
    "kto": Kind("KTO", "labelled", 0.1),
    "grpo": Kind("GRPO", "prompts", 0.03, _SAMPLED),
    "rloo": Kind("RLOO", "prompts", 0.002, _SAMPLED),
    "distillation": Kind("Distillation", "prompts", 0.03, {"max_completion_length": 6}),
}


def trained(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight that is trained."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def _options(kind: Kind, folder: str, given: dict[str, Any]) -> Any:
    options = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "learning_rate": kind.rate, "optim": "sgd", "bf16": False,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "seed": 3, "max_grad_norm": 1e3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return getattr(trl, f"{kind.name}Config")(**{**options, **kind.options, **given})


def _extra(kind: str, model: nn.Module, lora: bool, given: dict[str, Any], folder: str) -> dict:
    """What only some trainers take: a reference, rewards, a teacher."""
    if kind in ("dpo", "kto") and not lora:
        return {"ref_model": perturbed(model)}
    if kind in ("grpo", "rloo"):
        if not lora and given.get("beta", 0.05) != 0.0:  # read again from where it came from
            perturbed(model).save_pretrained(folder)
            model.config._name_or_path = folder
        return {"reward_funcs": reward}
    return {}


def perturbed(model: nn.Module) -> nn.Module:
    """A copy with other weights, so that a loss about both does not start where it is symmetric."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


def build(
    kind: str,
    folder: str,
    *,
    model: str | Callable[[], nn.Module] = "Llama",
    changes: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    data: str | None = None,
    longer: int = 1,
    teacher: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    evaluate: bool = False,
    **options: Any,
) -> Any:
    """Make a trainer: of a tiny model by name and changes, with options of the trainer's config."""
    what = KINDS[kind]
    module = make(model, **changes or {}) if isinstance(model, str) else model()
    extra = _extra(kind, module, lora is not None, options, folder)
    if kind == "distillation":
        extra["teacher_model"] = make("Llama", **{"hidden_size": 48, **(teacher or {})})
    if lora is not None:
        extra["peft_config"] = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **lora)
    if evaluate:
        extra["eval_dataset"] = rows(data or what.rows, 8, seed=1)
        options = {"eval_strategy": "steps", "eval_steps": 2, **options}
    torch.manual_seed(7)
    trainer = getattr(trl, f"{what.name}Trainer")(
        model=module, args=_options(what, folder, options), processing_class=tokenizer(),
        train_dataset=rows(data or what.rows, longer=longer), **extra, **(arguments or {}),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    scrambled_lora(trainer.model)
    for parameter in trainer.model.parameters():
        if (
            parameter.requires_grad
        ):  # TRL has adapters of quantized models in bf16, which hides much
            parameter.data = parameter.data.float()
    return trainer


def scrambled_lora(module: nn.Module) -> None:
    """Give LoRA's second factors values, or the adapters would be nothing at first."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def metrics_of(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """All that was logged, but times."""
    return [
        {
            name: x
            for name, x in logged.items()
            if not any(word in name for word in UNCOMPARED) and isinstance(x, int | float)
        }
        for logged in history
    ]


def train(kind: str, **given: Any) -> Record:
    """Train STEPS steps, and record what was logged, the weights and the calls."""
    with tempfile.TemporaryDirectory() as folder, counted_calls() as calls:
        with quiet():
            trainer = build(kind, folder, **given)
            start = trained(trainer.model)
            trainer.train()
        end = trained(trainer.model)
        return Record(metrics_of(trainer.state.log_history), end, start, calls)


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars and what the loggers of the libraries say; warnings still count."""
    logging = transformers.utils.logging
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            logging.set_verbosity(said)


@contextmanager
def counted_calls() -> Iterator[Calls]:
    """Count calls at the seams of TRL, whoever serves them, and those served by TRL's functions."""
    calls = Calls()

    def counted(name: str, function: Callable) -> Callable:
        @wraps(function)
        def count(*args: Any, **kwargs: Any) -> Any:
            setattr(calls, name, getattr(calls, name) + 1)
            if name == "asked":
                calls.rows.append(len(args[0]))
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for module, name in SEAMS:
            counting = SimpleNamespace(apply=counted("asked", getattr(module, name).apply))
            patch.setattr(module, name, counting)
        for function in OF_TRL:
            patch.setattr(function, "forward", staticmethod(counted("by_trl", function.forward)))
        yield calls


@contextmanager
def tiles_of(columns: int) -> Iterator[None]:
    """TRL's own head, which adds up its sums in another order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", columns)
        patch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", columns)
        yield


def in_another_order(kind: str, **given: Any) -> Record:
    """Train by TRL's own head, its sums in another order: what rounding does on this machine."""
    with tiles_of(13):
        return train(kind, **given)


def plain_statistics(
    logits: Tensor, labels: Tensor, temperature: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the fields of a FusedCausalLMOutput mean, zero where a label is -100."""
    mask = labels != -100
    z = logits.to(dtype) / temperature
    log_p = z.log_softmax(-1)
    found = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
    }
    zeroed = {name: x.masked_fill(~mask, 0).float() for name, x in found.items()}
    return {**zeroed, "is_top1": (z.argmax(-1) == labels) & mask, "label_mask": mask}


def add_plain_head(
    model: nn.Module, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs=(),
    *, dtype: torch.dtype,
) -> None:  # fmt: skip
    """What TRL's add_fused_lm_head promises, from the logits of the model's own forward."""
    own = model.forward

    @wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return own(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        given = own(*args, **kwargs)
        fields = plain_statistics(given.logits[:, :-1], labels[:, 1:], temperature, dtype)
        aux_loss = getattr(given, "aux_loss", None)
        return utils.FusedCausalLMOutput(**fields, aux_loss=aux_loss)

    model.forward = MethodType(forward, model)


def plain_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence of rows of logits."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0.0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1.0:
        return (p.exp() * (p - q)).sum(-1)
    m = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))
    return (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1)


def plain_distillation(
    self: Any, student: nn.Module, inputs: dict, num_items: Any = None, *, dtype: torch.dtype
) -> tuple:
    """What DistillationTrainer's loss is, from the logits of both models' own forwards."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = inputs["completion_mask"].bool()
    length = mask.shape[1] + 1

    def logits(model: nn.Module) -> Tensor:
        made = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return made[:, -length:-1][mask].to(dtype) / self.temperature

    with torch.no_grad():
        teacher = logits(self.teacher_model)
    made = logits(student)
    loss = plain_divergence(made, teacher, self.beta).sum() / (num_items or mask.sum())
    log_p = made.detach().log_softmax(-1)
    return loss, -(log_p.exp() * log_p).sum(), mask.sum()


@contextmanager
def plain_heads(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """TRL's trainers with heads that make logits, so that adapters on heads are no trouble; the
    statistics of logits are computed in a dtype.
    """
    with pytest.MonkeyPatch.context() as patch:
        for kind in KINDS.values():
            module = importlib.import_module(f"trl.trainer.{kind.name.lower()}_trainer")
            patch.setattr(module, "BaseTunerLayer", type("Nothing", (), {}), raising=False)
            patch.setattr(
                module, "add_fused_lm_head", partial(add_plain_head, dtype=dtype), raising=False
            )
        loss = partialmethod(plain_distillation, dtype=dtype)
        patch.setattr(trl.DistillationTrainer, "_compute_loss", loss)
        yield


@dataclass
class HeadCost:
    """What a head cost in one step of training."""

    tokens: int  # with a label, of the policy
    operations: int  # of the matmuls with the head or its gradient
    largest: int  # elements of the largest tensor that was made
    vocab: int
    width: int

    @property
    def matmuls(self) -> float:
        """In matmuls of the tokens with the head."""
        return self.operations / (2 * self.tokens * self.vocab * self.width)


def head_cost(kind: str, **given: Any) -> HeadCost:
    """Count what the first step of training asks of the head; generating is left out."""
    with tempfile.TemporaryDirectory() as folder, counted_labels() as labels, quiet():
        trainer = build(kind, folder, max_steps=1, **given)
        config = trainer.model.config
        audit = MatmulAudit(side=config.vocab_size)
        with pytest.MonkeyPatch.context() as patch:
            generate = transformers.GenerationMixin.generate

            def uncounted(*args: Any, **kwargs: Any) -> Any:
                audit.paused = True
                try:
                    return generate(*args, **kwargs)
                finally:
                    audit.paused = False

            patch.setattr(transformers.GenerationMixin, "generate", uncounted)
            step = trainer.training_step

            def audited(*args: Any, **kwargs: Any) -> Any:
                with audit:
                    return step(*args, **kwargs)

            patch.setattr(trainer, "training_step", audited)
            trainer.train()
        return HeadCost(
            labels[0], audit.operations, audit.largest, config.vocab_size, config.hidden_size
        )


@contextmanager
def counted_labels() -> Iterator[list[int]]:
    """Note how many tokens had a label, for each pair of forward and head."""
    counts: list[int] = []
    made, compared = utils.FusedCausalLMOutput, distillation_trainer._chunked_divergence_loss

    def noted(**fields: Any) -> Any:
        counts.append(int(fields["label_mask"].sum()))
        return made(**fields)

    def noted_divergence(*args: Any, **kwargs: Any) -> Any:
        result = compared(*args, **kwargs)
        counts.append(int(result[2]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "FusedCausalLMOutput", noted)
        patch.setattr(distillation_trainer, "_chunked_divergence_loss", noted_divergence)
        yield counts


def differences(found: Record, wanted: Record) -> tuple[float, float]:
    """The largest difference of metrics, relative to those above 1, and of weights, relative to
    how far they moved.

    A weight's step is known to no more than rounding of the weight, so that steps below a
    thousandth of it count as one.
    """
    assert [x.keys() for x in found.metrics] == [x.keys() for x in wanted.metrics]
    assert found.weights.keys() == wanted.weights.keys() != set()
    of_metrics = [
        abs(x[name] - y[name]) / max(1.0, abs(y[name]))
        for x, y in zip(found.metrics, wanted.metrics, strict=True)
        for name in y
    ]
    of_weights = []
    for name, end in wanted.weights.items():
        start = wanted.start[name]
        moved = max(float((end - start).norm()), 1e-3 * float(start.norm()))
        of_weights.append(float((found.weights[name] - end).norm()) / moved if moved else 0.0)
    largest = [float(torch.tensor(x).max()) for x in (of_metrics, of_weights)]  # keeps a NaN
    return largest[0], largest[1]


def assert_same(
    found: Record,
    wanted: Record,
    tolerances: tuple[float, float],
    in_another_order: Callable[[], Record] | None = None,
) -> None:
    """Compare what was logged, and weights. Where they differ by more than the tolerances, it may
    be twice what another order of the sums makes on this machine.
    """
    differ = differences(found, wanted)
    if in_another_order and any(a > b for a, b in zip(differ, tolerances, strict=True)):
        rounding = differences(in_another_order(), wanted)
        tolerances = tuple(max(a, 2 * b) for a, b in zip(tolerances, rounding, strict=True))
    assert differ[0] <= tolerances[0]
    assert differ[1] <= tolerances[1]
    moved = [(end - wanted.start[name]).norm() for name, end in wanted.weights.items()]
    assert max(moved) > 0
