"""Operations whose vocabulary ranks share: what one rank finds with its part of it, or all of it.

`Problem` is a batch with a head; `outcome` runs a named operation on a part of it, and returns the
values and the gradients, to be compared with those of the whole.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastrlhf

IGNORED = -100


@dataclass
class Problem:
    """Logits (B, T, V) or hidden states (B, T, H) and a head, twice; targets, a mask, a batch of a
    policy, pairs.
    """

    operation: str
    sizes: tuple[int, ...]  # of the parts of the vocabulary
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    batch: tuple[int, int] = (4, 6)
    width: int = 8
    spread: float = 1.0  # of the logits
    seed: int = 0
    trained: tuple[str, ...] = ("hidden", "weight", "bias", "logits")
    spoil: Callable[[dict[str, Tensor]], None] | None = None  # makes the numbers hostile

    def tensors(self) -> dict[str, Tensor]:
        """All of the problem, drawn in fp64 and rounded, so that every rank has the same."""
        rng = torch.Generator().manual_seed(self.seed)
        vocab, (rows, length) = sum(self.sizes), self.batch

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(self.dtype)

        scale = self.spread * self.width**-0.5
        drawn = {
            "logits": normal(rows, length, vocab, scale=self.spread),
            "ref_logits": normal(rows, length, vocab, scale=self.spread),
            "hidden": normal(rows, length, self.width),
            "ref_hidden": normal(rows, length, self.width),
            "weight": normal(vocab, self.width, scale=scale),
            "ref_weight": normal(vocab, self.width, scale=scale),
            "bias": normal(vocab, scale=0.5),
            "targets": torch.randint(vocab, self.batch, generator=rng),
            "old": normal(rows, length, scale=0.1).double() - 2,
            "advantages": normal(rows).double(),
        }
        drawn["mask"] = torch.rand(self.batch, generator=rng) < 0.8
        drawn["mask"][0, 0] = True
        drawn["targets"] = torch.where(drawn["mask"], drawn["targets"], IGNORED)
        if self.spoil is not None:
            self.spoil(drawn)
        return drawn


# From the tensors of a problem, its options and a group: values to compare, of which those that
# have a gradient are differentiated.
Operation = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def _head(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return x["hidden"], x["weight"]


def _named(stats: Any) -> dict[str, Tensor]:
    return {name: value for name, value in stats._asdict().items() if value is not None}


def _token_stats(x, o):
    return _named(fastrlhf.token_stats(x["logits"], x["targets"], **o))


def _linear_token_stats(x, o):
    stats = fastrlhf.linear_token_stats(*_head(x), x["targets"], bias=x.get("bias"), **o)
    return _named(stats)


def _policy(form: str) -> Operation:
    def run(x, o):
        given = (x["logits"],) if form == "logits" else _head(x)
        more = {} if form == "logits" else {"bias": x.get("bias")}
        loss, metrics = getattr(fastrlhf, f"{form}_policy_loss")(
            *given, x["targets"], x["old"], x["advantages"], x["mask"], **more, **o
        )
        return {"loss": loss, **metrics}

    return run


def _dpo(x, o):
    reference = None
    if o.get("loss_type") not in ("simpo", "cpo", "orpo"):
        reference = torch.where(x["mask"], x["old"], 0.0).sum(1)
    chosen, rejected = torch.arange(len(x["targets"])).chunk(2)
    losses, rewards = fastrlhf.linear_dpo_loss(
        *_head(x), x["targets"], reference, chosen, rejected, bias=x.get("bias"), **o
    )
    return {"losses": losses, "rewards": rewards}


def _cross_entropy(x, o):
    return {"loss": fastrlhf.linear_cross_entropy(*_head(x), x["targets"], bias=x.get("bias"), **o)}


def _linear_loss(x, o):
    def loss_fn(stats, advantages):
        loss = -(stats.logprob * advantages).sum() + 1e-2 * stats.lse.square().sum()
        if stats.entropy is not None:
            loss = loss - (stats.entropy * advantages).sum()
        return loss, {"logprob": stats.logprob}

    advantages = x["advantages"][:, None].expand(x["targets"].shape).contiguous()
    loss, aux = fastrlhf.linear_loss(
        loss_fn, *_head(x), x["targets"], advantages, bias=x.get("bias"), **o
    )
    return {"loss": loss, **aux}


def _kl(x, o):
    return {"kl": fastrlhf.kl_divergence(x["logits"], x["ref_logits"], mask=x["mask"], **o)}


def _linear_kl(x, o):
    value = fastrlhf.linear_kl_divergence(
        *_head(x), x["ref_hidden"], x["ref_weight"], mask=x["mask"], bias=x.get("bias"), **o
    )
    return {"kl": value}


OPERATIONS: dict[str, Operation] = {
    "token_stats": _token_stats,
    "linear_token_stats": _linear_token_stats,
    "linear_loss": _linear_loss,
    "logits_policy_loss": _policy("logits"),
    "linear_policy_loss": _policy("linear"),
    "linear_dpo_loss": _dpo,
    "linear_cross_entropy": _cross_entropy,
    "kl_divergence": _kl,
    "linear_kl_divergence": _linear_kl,
}
_CUT = {
    "logits": -1, "ref_logits": -1, "d_logits": -1, "d_ref_logits": -1, "weight": 0,
    "ref_weight": 0, "bias": 0,
}  # fmt: skip


def part_of(name: str, x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """A rank's part of a tensor, or the tensor where it has no vocabulary."""
    dim = _CUT.get(name.removeprefix("d_"))
    return x if dim is None else x.split(sizes, dim)[rank]


def outcome(
    group: Any, problem: Problem, weights: str = "uneven", with_dtensors: bool = False
) -> dict[str, Tensor]:
    """Run a problem's operation with this rank's part, or whole without a group: values, and with
    the prefix d_ the gradients of a weighted sum of them.
    """
    tensors = problem.tensors()
    if not problem.bias:
        del tensors["bias"]
    if group is not None:
        rank = dist.get_rank(group)
        if with_dtensors:
            tensors = {name: _dtensor(name, x, group) for name, x in tensors.items()}
        else:
            tensors = {
                name: part_of(name, x, problem.sizes, rank).clone() for name, x in tensors.items()
            }
    leaves = {}
    for name in ("logits", "ref_logits", "hidden", "weight", "ref_hidden", "ref_weight", "bias"):
        used = name in tensors and name.removeprefix("ref_") in problem.trained
        if used and ("logits" in name) == ("logits" in problem.operation or _of_logits(problem)):
            leaves[name] = tensors[name].requires_grad_()
    options = dict(problem.options)
    if group is not None and not with_dtensors:
        options["group"] = group
    found = OPERATIONS[problem.operation](tensors, options)
    total: Any = 0.0
    for value in found.values():
        if value.requires_grad:
            total = total + _weighed(value, weights)
    if isinstance(total, Tensor):
        total.backward()
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {
        name: _whole(x.detach())
        for name, x in (*found.items(), *gradients.items())
    }  # fmt: skip


def _of_logits(problem: Problem) -> bool:
    return problem.operation in ("token_stats", "kl_divergence")


def _weighed(value: Tensor, weights: str) -> Tensor:
    # -inf log-probs are legal, and no sum can be differentiated through them.
    finite = torch.where(value.isfinite(), value, 0.0)
    if weights == "alike":
        return finite.sum()
    steps = torch.linspace(-1, 2, max(value.numel(), 1), dtype=value.dtype)[: value.numel()]
    return (finite * steps.view(value.shape)).sum()


def _dtensor(name: str, x: Tensor, group: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    dim = _CUT.get(name)
    if dim is None:
        hidden = "hidden" in name
        return distribute_tensor(x, mesh, [Replicate()]).detach() if hidden else x
    return distribute_tensor(x, mesh, [Shard(dim % x.ndim)]).detach()


def _whole(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def with_sent_bytes(group: Any, problem: Problem) -> dict[str, Any]:
    """What a rank gives to collectives in the forward and in the backward of an operation, by the
    kind of the collective: [(kind, bytes)].
    """
    sent: list[tuple[str, int]] = []

    def recorded(name: str) -> Callable[..., Any]:
        own = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[1] if name == "all_gather_into_tensor" else args[0]
            sent.append((name, x.numel() * x.element_size()))
            return own(*args, **kwargs)

        return call

    names = ("all_gather_into_tensor", "all_reduce")
    with ExitStack() as stack:
        for name in names:
            own = getattr(dist, name)
            setattr(dist, name, recorded(name))
            stack.callback(setattr, dist, name, own)
        outcome(group, problem)
    return {"sent": sent}


def raises(group: Any, problem: Problem, changed: dict[int, dict[str, Any]]) -> str:
    """What is said where ranks do not agree, or an argument is wrong: the error as text."""
    own = changed.get(dist.get_rank(group), {})
    problem = Problem(**{**problem.__dict__, **own})
    try:
        outcome(group, problem)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
