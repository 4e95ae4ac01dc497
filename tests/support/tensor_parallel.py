"""Losses inside a model whose head tensor parallelism cuts, against those of the whole model.

All ranks have the same batch. `differences` compares one way of cutting a model with the model as
it is, on one rank.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastrlhf

from .wrapped_losses import FIVE, LOSSES, errors, make_batch, own_gradients, small_model

# Architectures: one of each thing that a head or its logits can have.
KINDS = {
    "plain": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "capped": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "scaled": ("Cohere", {"logit_scale": 0.5}),
    "bias": ("Phi", {}),
    "offset": ("Llama", {}),
    "even": ("Qwen3", {"vocab_size": 104, "head_dim": 8}),
}


def model_of(kind: str) -> nn.Module:
    """A tiny random model, the same on each rank; of the other kinds, `small_model`'s."""
    if kind not in KINDS:
        return small_model(kind)
    import transformers

    name, more = KINDS[kind]
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    if kind == "offset":
        model.register_forward_hook(_add_to_logits)
    return model.train()


def _add_to_logits(_: Any, args: Any, outputs: Any) -> None:
    """Some words are less likely by a number of each, and one is ruled out."""
    offset = torch.linspace(-1, 1, 101)
    offset[7] = -torch.inf
    outputs["logits"] = outputs.logits + offset


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_of(model: nn.Module) -> Any:
    head = _base(model).get_output_embeddings()
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head


def _by_torch(model: nn.Module, group: Any, **options: Any) -> nn.Module:
    """Cut the head alone, as `parallelize_module` does."""
    mesh = DeviceMesh.from_group(group, "cpu")
    parallelize_module(_head_of(model), mesh, ColwiseParallel(**options))
    return model


def gathered(model: nn.Module, group: Any) -> nn.Module:
    return _by_torch(model, group, output_layouts=Replicate())


def sharded(model: nn.Module, group: Any) -> nn.Module:
    return _by_torch(model, group, output_layouts=Shard(-1))


def sharded_dtensor(model: nn.Module, group: Any) -> nn.Module:
    return _by_torch(model, group, output_layouts=Shard(-1), use_local_output=False)


def sequence_parallel(model: nn.Module, group: Any) -> nn.Module:
    """The norm before the head works on a part of the positions, and the head gathers them."""
    mesh = DeviceMesh.from_group(group, "cpu")
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    parallelize_module(model.model.norm, mesh, cut)
    parallelize_module(model.model.norm, mesh, SequenceParallel(use_local_output=False))
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return parallelize_module(model, mesh, {"lm_head": head})


def sequence_parallel_by_transformers(model: nn.Module, group: Any) -> nn.Module:
    """The same by layers of transformers, whose head gathers the positions in its own forward."""
    from transformers.distributed import tensor_parallel as styles

    mesh = DeviceMesh.from_group(group, "cpu")
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    parallelize_module(model.model.norm, mesh, cut)
    styles.SequenceParallel(use_local_output=False).install_forward(model.model.norm, mesh)
    head = styles.ColwiseParallel(output_layouts=Replicate())
    head.shard_param(model.lm_head, "weight", mesh)
    head.install_forward(model.lm_head, mesh)
    model.lm_head._is_hooked = True
    return model


def rowwise(model: nn.Module, group: Any) -> nn.Module:
    """Not by the vocabulary, which is refused."""
    mesh = DeviceMesh.from_group(group, "cpu")
    return parallelize_module(model, mesh, {"lm_head": RowwiseParallel(input_layouts=Replicate())})


def by_transformers(model: nn.Module, group: Any, plan: Any = "auto") -> nn.Module:
    """All of a model, as `from_pretrained` cuts it by the plan that it comes with."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder = Path(_folders[-1])
    if torch.distributed.get_rank(group) == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier(group)
    size = torch.distributed.get_world_size(group)
    config = DistributedConfig(tp_size=size, tp_plan=plan)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


def with_sharded_output(model: nn.Module, group: Any) -> nn.Module:
    plan = {**by_transformers(model, group)._tp_plan, "lm_head": "colwise"}
    return by_transformers(model, group, plan)


def two_dimensions(model: nn.Module, group: Any, output: Any = Replicate()) -> nn.Module:  # noqa: B008
    """FSDP2 over two ranks, tensor parallelism over the two others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model.lm_head, mesh["tp"], ColwiseParallel(output_layouts=output))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard([model.model.norm, model.lm_head], mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


class Cut(NamedTuple):
    """A way to cut a model among ranks."""

    apply: Callable[[nn.Module, Any], nn.Module]
    kind: str = "plain"
    losses: tuple[str, ...] = FIVE
    ranks: int = 2
    teacher: bool = False  # is cut as well


CUTS = {
    "torch, gathered output": Cut(gathered, losses=(*FIVE, "gspo", "dpo, weighed", "packed")),
    "torch, sharded output": Cut(sharded),
    "torch, output a DTensor": Cut(sharded_dtensor),
    "torch, three ranks": Cut(gathered, ranks=3),
    "torch, sequence parallel": Cut(sequence_parallel),
    "torch, capped": Cut(sharded, "capped"),
    "torch, offset": Cut(gathered, "offset", losses=("sft", "dpo")),
    "torch, LoRA": Cut(gathered, "lora"),
    "torch, LoRA on the head": Cut(gathered, "lora head"),
    "torch, teacher": Cut(gathered, losses=("kl", "kl, weighed"), teacher=True),
    "transformers": Cut(by_transformers),
    "transformers, sharded output": Cut(with_sharded_output),
    "transformers, sequence parallel": Cut(
        sequence_parallel_by_transformers, losses=("policy", "sft")
    ),
    "transformers, tied": Cut(by_transformers, "tied"),
    "transformers, capped": Cut(by_transformers, "capped"),
    "transformers, scaled": Cut(by_transformers, "scaled"),
    "transformers, bias": Cut(by_transformers, "bias"),
    "transformers, even": Cut(by_transformers, "even", losses=("policy", "gspo")),
    "FSDP2 and torch": Cut(two_dimensions, ranks=4),
    "FSDP2 and torch, sharded output": Cut(
        partial(two_dimensions, output=Shard(-1)), losses=("policy", "kl"), ranks=4
    ),
}

_folders: list[str] = []


def differences(group: Any, name: str, folder: str) -> dict[str, Any]:
    """By loss: its relative error, the worst one of a gradient, and the value's bits."""
    import transformers

    transformers.logging.disable_progress_bar()
    _folders.append(folder)
    cut, found = CUTS[name], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cut.apply(model_of(cut.kind), group)
        assert hasattr(_head_of(model).weight, "placements"), "the head is not cut"
        whole = model_of(cut.kind)
        for loss in cut.losses:
            fused, plain = LOSSES[loss]
            x, teacher = make_batch(0), model_of("teacher")
            model.zero_grad()
            whole.zero_grad()
            wanted = plain(whole, teacher, x)
            wanted.backward()
            made = fused(model, gathered(teacher, group) if cut.teacher else teacher, x)
            made.backward()
            off = errors(_named(own_gradients(model)), _named(own_gradients(whole)))
            worst = max(off, key=off.__getitem__)
            value = abs(made.item() - wanted.item()) / abs(wanted.item())
            found[loss] = (value, off[worst], worst, made.detach().clone())
    return found


def _named(gradients: dict[str, Any]) -> dict[str, Any]:
    """A tied weight has one name in some versions and two in others."""
    return {name: x for name, x in gradients.items() if name != "lm_head.weight" or x is not None}


def read_head(group: Any, name: str, folder: str) -> list[float]:
    """What lm_head and head_inputs make of a cut model: errors of log-probs and of the gradient."""
    _folders.append(folder)
    cut = CUTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, whole = cut.apply(model_of(cut.kind), group), model_of(cut.kind)
        x = make_batch(0)
        found = []
        for of in (model, whole):
            hidden, head = fastrlhf.head_inputs(of, x.ids, x.attention)
            again = fastrlhf.lm_head(of)
            targets = fastrlhf.shift_targets(x.ids, x.mask)
            stats = fastrlhf.linear_token_stats(hidden, again.weight, targets, **head.options())
            stats.logprob.sum().backward()
            found.append((stats.logprob.detach(), own_gradients(of)))
    (logprob, gradients), (wanted, wanted_gradients) = found
    off = errors(_named(gradients), _named(wanted_gradients))
    return [float((logprob - wanted).norm() / wanted.norm()), max(off.values())]


def adapted_by_peft(model: nn.Module, group: Any, **config: Any) -> nn.Module:
    """A model of transformers whose head returns this rank's columns, with an adapter of peft."""
    import peft

    cut = with_sharded_output(model, group)
    adapted = peft.get_peft_model(cut, peft.LoraConfig(r=4, **config))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            whole = torch.randn(parameter.shape) * 0.3
            mesh, places = parameter.device_mesh, parameter.placements
            parameter.data = distribute_tensor(whole, mesh, places, src_data_rank=None)
    return adapted


def adapters_of_peft(group: Any, folder: str) -> list[float]:
    """Errors of log-probs and of the gradient of an adapter that peft cuts as the head is cut."""
    _folders.append(folder)
    config = {"target_modules": ["lm_head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, x = adapted_by_peft(model_of("even"), group, **config), make_batch(0)
        stats = fastrlhf.model_token_stats(model, x.ids, x.attention)
        stats.logprob.sum().backward()
        found = own_gradients(model)
        weights = {name: _full(p.detach()) for name, p in model.named_parameters()}
        plain = model_of("even")
        hidden = plain.model(x.ids, x.attention).last_hidden_state[:, :-1].detach()
        parts = [weights[f"base_model.model.lm_head.lora_{name}.default.weight"] for name in "AB"]
        down, up = (part.clone().requires_grad_() for part in parts)
        scaling = model.base_model.model.lm_head.scaling["default"]
        logits = plain.lm_head(hidden) + hidden @ down.T @ up.T * scaling
        log_p = logits.log_softmax(-1).gather(-1, x.ids[:, 1:, None])[..., 0]
        live = x.attention[:, 1:] != 0
        log_p[live].sum().backward()
    errors = [float((stats.logprob - log_p)[live].norm() / log_p[live].norm())]
    for name, of in (("A", down), ("B", up)):
        got = found[f"base_model.model.lm_head.lora_{name}.default.weight"]
        errors.append(float((got - of.grad).norm() / of.grad.norm()))
    return errors


def _full(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def refusal(group: Any, folder: str) -> str:
    """What is said of a head that is cut in another way."""
    model, x = rowwise(model_of("plain"), group), make_batch(0)
    try:
        fastrlhf.model_token_stats(model, x.ids, x.attention)
    except RuntimeError as error:
        return str(error)
    return ""
