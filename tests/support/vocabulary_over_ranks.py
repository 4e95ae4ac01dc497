"""Operations whose vocabulary ranks share: what one rank finds with its part of it, or all of it.

`Problem` is a batch with a head; `outcome` runs a named operation on a part of it, and returns the
values and the gradients, to be compared with those of the whole.

Dims: W ranks, B sequences, T tokens, H width, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastrlhf
from fastrlhf.ops import linear_rows

from .kept import support_of
from .matmuls import MatmulAudit

IGNORED = -100
Tensors = dict[str, Tensor]
Outcome = dict[str, Tensor]


@dataclass
class Problem:
    """Logits (B, T, V) or hidden states (B, T, H) and a head, twice; targets, a mask, a batch of a
    policy, pairs.
    """

    operation: str
    sizes: tuple[int, ...]  # of the parts of the vocabulary
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    bias: bool = False
    batch: tuple[int, int] = (4, 3)
    width: int = 8
    spread: float = 1.0  # of the logits
    trained: tuple[str, ...] | None = None  # None: all
    spoils: tuple[str, ...] = ()  # names of what makes the numbers hostile
    weights: str = "uneven"  # of the upstream gradient
    padding: tuple[int, ...] = ()  # of each rank's part, narrowed away

    def tensors(self) -> Tensors:
        """All of the problem, drawn in fp64 and rounded, so that every rank has the same."""
        rng = torch.Generator().manual_seed(0)
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
            "ref_bias": normal(vocab, scale=0.5),
            "targets": torch.randint(vocab, self.batch, generator=rng),
            "old": normal(rows, length, scale=0.5).double() - math.log(max(vocab, 1)),
            "advantages": normal(rows).double(),
        }
        drawn["mask"] = torch.rand(self.batch, generator=rng) < 0.7
        if drawn["mask"].numel():
            drawn["mask"].view(-1)[0] = True
        for name in self.spoils:
            SPOILS[name](drawn, self.sizes)
        ignored = self.options.get("ignore_index", IGNORED)
        drawn["targets"] = torch.where(drawn["mask"], drawn["targets"], ignored)
        if not self.bias:
            del drawn["bias"], drawn["ref_bias"]
        return drawn

    def leaves(self) -> list[str]:
        """Names of what is differentiated, where it is there."""
        of_logits = self.operation in OF_LOGITS
        names = ["logits"] if of_logits else ["hidden", "weight", "bias"]
        if "kl" in self.operation:
            names += [f"ref_{name}" for name in names]
        return [name for name in names if self.trained is None or name in self.trained]


def _on_rank(x: Tensor, sizes: tuple[int, ...], rank: int, dim: int = -1) -> Tensor:
    return x.split(sizes, dim)[rank]


def _minus_inf_on_first(x: Tensors, sizes: tuple[int, ...]) -> None:
    for name in ("logits", "ref_logits"):
        _on_rank(x[name], sizes, 0).fill_(-math.inf)


def _minus_inf_on_last(x: Tensors, sizes: tuple[int, ...]) -> None:
    _on_rank(x["logits"], sizes, -1).fill_(-math.inf)


def _minus_inf_scattered(x: Tensors, sizes: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(1)
    x["logits"][torch.rand(x["logits"].shape, generator=rng) < 0.6] = -math.inf


def _rows_of_nothing(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["logits"][0], x["ref_logits"][1] = -math.inf, -math.inf


def _nan_on_last(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["logits"][0, 0, -1] = math.nan
    x["logits"][1, :, sizes[0]] = math.nan


def _plus_inf(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["logits"][0, 0, -1], x["logits"][1, 1, 0] = math.inf, math.inf


def _large(x: Tensors, sizes: tuple[int, ...]) -> None:
    for name in ("logits", "ref_logits", "weight", "ref_weight"):
        x[name].mul_(1e4)


def _ties(x: Tensors, sizes: tuple[int, ...]) -> None:
    # Few distinct numbers: most rows have their largest on several ranks.
    x["logits"].round_().clamp_(-1, 1)
    x["targets"] = x["logits"].argmax(-1)
    x["targets"][::2] = x["logits"].flip(-1).argmax(-1)[::2].neg() + x["logits"].shape[-1] - 1


def _garbage(x: Tensors, sizes: tuple[int, ...]) -> None:
    for name in ("logits", "ref_logits", "hidden", "ref_hidden"):
        x[name][~x["mask"]] = math.nan


def _one_owner(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["targets"] = sum(sizes[:-1]) + x["targets"] % sizes[-1]


def _at_borders(x: Tensors, sizes: tuple[int, ...]) -> None:
    # The last columns of one part, the first ones of the next, and those of all.
    vocab = sum(sizes)
    starts = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    near = [start + i for start in starts for i in (-2, -1, 0, 1) if 0 <= start + i < vocab]
    some = torch.tensor(near).repeat(x["targets"].numel())[: x["targets"].numel()]
    x["targets"] = some.view(x["targets"].shape)


def _alike_but_for_little(x: Tensors, sizes: tuple[int, ...]) -> None:
    # Gradients of hidden states are large on each rank, and cancel.
    x["weight"].add_(64)


def _all_ignored(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["mask"].fill_(False)


def _none_ignored(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["mask"].fill_(True)


def _narrow_targets(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["targets"] = x["targets"].int()


def _out_of_vocabulary(x: Tensors, sizes: tuple[int, ...]) -> None:
    x["targets"][0, 0] = sum(sizes)


def _reference_in_fp32(x: Tensors, sizes: tuple[int, ...]) -> None:
    x.update({name: x[name].float() for name in x if name.startswith("ref_")})


def _certain(x: Tensors, sizes: tuple[int, ...]) -> None:
    # The target has nearly all of the probability: what is left must keep its accuracy.
    at = x["targets"].unsqueeze(-1)
    x["logits"].scatter_(-1, at, x["logits"].gather(-1, at) + 30)


SPOILS: dict[str, Callable[[Tensors, tuple[int, ...]], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _minus_inf_on_first, _minus_inf_on_last, _minus_inf_scattered, _rows_of_nothing,
        _nan_on_last, _plus_inf, _large, _ties, _garbage, _one_owner, _all_ignored, _none_ignored,
        _at_borders, _alike_but_for_little, _narrow_targets, _out_of_vocabulary, _certain,
        _reference_in_fp32,
    )
}  # fmt: skip


# From the tensors of a problem and its options: values to compare, of which those that have a
# gradient are differentiated.
Operation = Callable[[Tensors, dict[str, Any]], Outcome]


def _head(x: Tensors) -> tuple[Tensor, Tensor]:
    return x["hidden"], x["weight"]


def _named(stats: Any) -> Outcome:
    return {name: value for name, value in stats._asdict().items() if value is not None}


def _token_stats(x: Tensors, o: dict[str, Any]) -> Outcome:
    return _named(fastrlhf.token_stats(x["logits"], x["targets"], **o))


def _linear_token_stats(x: Tensors, o: dict[str, Any]) -> Outcome:
    stats = fastrlhf.linear_token_stats(*_head(x), x["targets"], bias=x.get("bias"), **o)
    return _named(stats)


def _logprobs(x: Tensors, o: dict[str, Any]) -> Outcome:
    return {"logprob": fastrlhf.token_logprobs(x["logits"], x["targets"], **o)}


def _linear_logprobs(x: Tensors, o: dict[str, Any]) -> Outcome:
    found = fastrlhf.linear_token_logprobs(*_head(x), x["targets"], bias=x.get("bias"), **o)
    return {"logprob": found}


def _packed(x: Tensors, o: dict[str, Any]) -> Tensors:
    """All sequences in one row (1, N), where the options have their borders."""
    if "cu_seqlens" not in o:
        return x
    names = ("logits", "hidden", "targets", "old", "mask")
    return {**x, **{name: x[name].flatten(0, 1).unsqueeze(0) for name in names}}


def _policy(form: str) -> Operation:
    def run(x: Tensors, o: dict[str, Any]) -> Outcome:
        x = _packed(x, o)
        given = (x["logits"],) if form == "logits" else _head(x)
        more = {} if form == "logits" else {"bias": x.get("bias")}
        if "kl_coef" in o:
            more["ref_logprobs"] = x["old"] + 0.1
        loss, metrics = getattr(fastrlhf, f"{form}_policy_loss")(
            *given, x["targets"], x["old"], x["advantages"], x["mask"], **more, **o
        )
        return {"loss": loss, **metrics}

    return run


def _dpo(x: Tensors, o: dict[str, Any]) -> Outcome:
    reference = None
    if o.get("loss_type") not in ("simpo", "cpo", "orpo"):
        reference = torch.where(x["mask"], x["old"], 0.0).sum(1)
    chosen, rejected = torch.arange(len(x["targets"])).chunk(2)
    x = _packed(x, o)
    losses, rewards = fastrlhf.linear_dpo_loss(
        *_head(x), x["targets"], reference, chosen, rejected, bias=x.get("bias"), **o
    )
    return {"losses": losses, "rewards": rewards}


def _logits_cross_entropy(x: Tensors, o: dict[str, Any]) -> Outcome:
    return {"loss": fastrlhf.cross_entropy(x["logits"], x["targets"], **o)}


def _cross_entropy(x: Tensors, o: dict[str, Any]) -> Outcome:
    return {"loss": fastrlhf.linear_cross_entropy(*_head(x), x["targets"], bias=x.get("bias"), **o)}


def _linear_loss(x: Tensors, o: dict[str, Any]) -> Outcome:
    def loss_fn(stats: Any, advantages: Tensor) -> tuple[Tensor, Outcome]:
        loss = -(stats.logprob * advantages).sum() + 1e-2 * stats.lse.square().sum()
        if stats.entropy is not None:
            loss = loss - (stats.entropy * advantages).sum()
        return loss, {"logprob": stats.logprob}

    advantages = x["advantages"][:, None].expand(x["targets"].shape).contiguous()
    loss, aux = fastrlhf.linear_loss(
        loss_fn, *_head(x), x["targets"], advantages, bias=x.get("bias"), **o
    )
    return {"loss": loss, **aux}


def _kl(x: Tensors, o: dict[str, Any]) -> Outcome:
    return {"kl": fastrlhf.kl_divergence(x["logits"], x["ref_logits"], mask=x["mask"], **o)}


def _linear_kl(x: Tensors, o: dict[str, Any]) -> Outcome:
    value = fastrlhf.linear_kl_divergence(
        *_head(x), x["ref_hidden"], x["ref_weight"], mask=x["mask"], bias=x.get("bias"),
        ref_bias=x.get("ref_bias"), **o
    )  # fmt: skip
    return {"kl": value}


OPERATIONS: dict[str, Operation] = {
    "token_stats": _token_stats,
    "token_logprobs": _logprobs,
    "linear_token_stats": _linear_token_stats,
    "linear_token_logprobs": _linear_logprobs,
    "linear_loss": _linear_loss,
    "logits_policy_loss": _policy("logits"),
    "linear_policy_loss": _policy("linear"),
    "linear_dpo_loss": _dpo,
    "cross_entropy": _logits_cross_entropy,
    "linear_cross_entropy": _cross_entropy,
    "kl_divergence": _kl,
    "linear_kl_divergence": _linear_kl,
}
OF_LOGITS = (
    "token_stats", "token_logprobs", "logits_policy_loss", "cross_entropy", "kl_divergence",
)  # fmt: skip
# The dimension that is the vocabulary.
CUT = {"logits": -1, "ref_logits": -1, "weight": 0, "ref_weight": 0, "bias": 0, "ref_bias": 0}


def outcome(
    group: Any,
    problem: Problem,
    *,
    wide: bool = False,
    forward: AbstractContextManager | None = None,
    backward: AbstractContextManager | None = None,
) -> Outcome:
    """Run a problem's operation with this rank's part, or whole without a group: values, and with
    the prefix d_ the gradients of a weighted sum of them.

    `wide`: in fp64 of the rounded numbers. The others are entered around either half.
    """
    tensors = problem.tensors()
    if wide:
        tensors = {
            name: x.double() if x.is_floating_point() else x for name, x in tensors.items()
        }  # fmt: skip
    leaves, given = {}, dict(tensors)
    for name, x in tensors.items():
        trained = name in problem.leaves()
        if group is not None and name in CUT:
            leaves[name], given[name] = _narrowed_part(name, x, problem, group, trained)
        elif trained:
            leaves[name] = given[name] = x.requires_grad_()
    options = problem.options if group is None else {**problem.options, "group": group}
    if "rows" in options:
        given["hidden"] = given["hidden"].flatten(0, 1)
    with forward or nullcontext():
        found = OPERATIONS[problem.operation](given, options)
    with backward or nullcontext():
        differentiate(found, problem.weights)
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {name: x.detach() for name, x in (*found.items(), *gradients.items())}


def _narrowed_part(
    name: str, x: Tensor, problem: Problem, group: Any, trained: bool
) -> tuple[Tensor, Tensor]:
    """A rank's part of a tensor, followed by padding; and without it."""
    rank, dim = dist.get_rank(group), CUT[name]
    part = _on_rank(x, problem.sizes, rank, dim)
    size = problem.sizes[rank]
    if problem.padding:
        shape = list(part.shape)
        shape[dim] = problem.padding[rank]
        part = torch.cat([part, part.new_full(shape, math.nan)], dim)
    leaf = part.clone().requires_grad_(trained)
    return leaf, leaf.narrow(dim, 0, size) if problem.padding else leaf


def differentiate(found: Outcome, weights: str) -> None:
    """Go backward from a weighted sum of all that has a gradient."""
    if weights == "entropy alone":
        found = {"entropy": found["entropy"]}
    parts = [_weighed(value, weights) for value in found.values() if value.requires_grad]
    if parts:
        sum(parts, start=torch.zeros((), dtype=torch.float64)).backward()


def _weighed(value: Tensor, weights: str) -> Tensor:
    # -inf log-probs are legal, and no sum can be differentiated through them.
    finite = torch.where(value.isfinite(), value, 0.0)
    if weights == "alike":
        return finite.sum()
    steps = torch.linspace(-1, 2, max(value.numel(), 1), dtype=value.dtype)[: value.numel()]
    return (finite * steps.view(value.shape)).sum()


def with_codes(group: Any, problem: Problem) -> Outcome:
    """The outcome where the weight is in 8 bits, with a scale for each row, and so is its part."""
    x = problem.tensors()
    codes = (x["weight"] * 50).round().clamp(-127, 127).to(torch.int8)
    scales = torch.linspace(0.01, 0.03, len(codes))
    options = problem.options
    if group is not None:
        rank, options = dist.get_rank(group), {**options, "group": group}
        codes, scales = (_on_rank(part, problem.sizes, rank, 0) for part in (codes, scales))
    x["weight"] = fastrlhf.QuantizedWeight(codes, scales, problem.width, None, problem.dtype)
    x["hidden"].requires_grad_()
    found = OPERATIONS[problem.operation](x, options)
    differentiate(found, problem.weights)
    return {**{name: value.detach() for name, value in found.items()}, "d_hidden": x["hidden"].grad}


def in_pairs(group: Any, problem: Problem) -> Outcome:
    """Of four ranks, the first two and the last two share a vocabulary each."""
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    return outcome(pairs[dist.get_rank(group) // 2], problem)


def outcome_in_little_memory(group: Any, problem: Problem) -> Outcome:
    """The outcome where the logits of a few tokens fill what a block may have."""
    room = linear_rows._WORKSPACE_BYTES
    usual = room["cpu"]
    room["cpu"] = 4 * 3 * max(problem.sizes)
    try:
        return outcome(group, problem)
    finally:
        room["cpu"] = usual


class Sent(TorchDispatchMode):
    """While active, writes down what is given to collectives: their names, and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            # What is gathered is the second argument; what is reduced, the first.
            given = args[1] if "gather" in func.__name__ else args[0]
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
            self.found.append(
                (func.__name__.split(".")[0].strip("_"), sum(x.nbytes for x in tensors))
            )
        return func(*args, **(kwargs or {}))


def with_sent_bytes(group: Any, problem: Problem) -> tuple[list, list]:
    """What a rank gives to collectives in the forward, and in the backward of an operation."""
    forward, backward = Sent(), Sent()
    outcome(group, problem, forward=forward, backward=backward)
    return forward.found, backward.found


def matmul_operations(group: Any, problem: Problem) -> int:
    """The operations of this rank's matmuls, forward and backward."""
    with MatmulAudit() as audit:
        outcome(group, problem)
    return audit.operations


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What a call raises, as text, or nothing."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def error_of_another_support(group: Any, problem: Problem) -> str:
    """What a rank says whose tokens keep other ids than those of the first rank."""
    targets = problem.tensors()["targets"].flatten()
    more = [[int(target), dist.get_rank(group)] for target in targets]
    support = support_of([torch.tensor(ids).unique() for ids in more])
    return error_of(
        outcome, group, replace(problem, options={"support": support}, spoils=("none_ignored",))
    )


def raises(group: Any, problems: list[Problem], changed: dict[int, dict[str, Any]]) -> list[str]:
    """What is said where an argument is wrong, or the ranks that are in `changed` differ."""
    own = changed.get(dist.get_rank(group), {})
    return [error_of(outcome, group, replace(problem, **own)) for problem in problems]


def raises_without_columns(group: Any, operations: list[str]) -> list[str]:
    """What is said where no rank has anything of the vocabulary."""
    x = Problem("", (1,)).tensors()
    x |= {name: x[name].narrow(dim, 0, 0) for name, dim in CUT.items() if name in x}
    return [error_of(OPERATIONS[name], x, {"group": group}) for name in operations]


def raises_for_wrong_groups(group: Any, problems: list[Problem]) -> list[str]:
    """What is said of groups that are none, and of one that this process is not in."""
    others = dist.GroupMember.NON_GROUP_MEMBER
    return [
        error_of(OPERATIONS[problem.operation], problem.tensors(), {"group": wrong})
        for problem in problems
        for wrong in ("world", 2, others)
    ]


def second_derivative_errors(group: Any, problems: list[Problem]) -> list[str]:
    """What is said where a gradient is to be differentiated again."""

    def again(problem: Problem) -> None:
        tensors = problem.tensors()
        rank, leaf = dist.get_rank(group), problem.leaves()[0]
        given = {
            name: _on_rank(x, problem.sizes, rank, CUT[name]) if name in CUT else x
            for name, x in tensors.items()
        }
        given[leaf] = given[leaf].clone().requires_grad_()
        found = OPERATIONS[problem.operation](given, {**problem.options, "group": group})
        total = sum(_weighed(x, "uneven") for x in found.values() if x.requires_grad)
        (gradient,) = torch.autograd.grad(total, given[leaf], create_graph=True)
        torch.autograd.grad(gradient.square().sum(), given[leaf])

    return [error_of(again, problem) for problem in problems]


def transform_errors(group: Any, problems: list[Problem]) -> list[str]:
    """What is said under torch.func.grad."""

    def under_grad(problem: Problem) -> None:
        rank, leaf = dist.get_rank(group), problem.leaves()[0]
        given = {
            name: _on_rank(x, problem.sizes, rank, CUT[name]) if name in CUT else x
            for name, x in problem.tensors().items()
        }

        def value(x: Tensor) -> Tensor:
            found = OPERATIONS[problem.operation](
                {**given, leaf: x}, {**problem.options, "group": group}
            )
            return next(iter(found.values())).sum()

        torch.func.grad(value)(given[leaf])

    return [error_of(under_grad, problem) for problem in problems]


def with_a_rank_that_fails(group: Any, problem: Problem, seconds: float) -> str:
    """One rank raises before it speaks to the others: what each of them gets."""
    # The short time is for collectives alone: to connect may take longer on a busy machine.
    quick = dist.new_group(list(range(dist.get_world_size(group))))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), quick)
    if dist.get_rank(group) == 1:
        raise ValueError("this rank has no data")
    outcome(quick, problem)
    return "no error"


def spent_logits(group: Any, problem: Problem) -> tuple[Outcome, bool, str]:
    """With inplace_backward: the gradient, whether it lies where the logits were, and what a graph
    says that had saved these.
    """
    tensors = problem.tensors()
    leaf = _on_rank(tensors["logits"], problem.sizes, dist.get_rank(group)).clone()
    leaf.requires_grad_()
    logits = leaf * 1.0
    # Autograd may add to a gradient where it lies: two users keep the logits' memory apart.
    other = logits.square().sum()
    options = {**problem.options, "group": group, "inplace_backward": True}
    found = OPERATIONS[problem.operation]({**tensors, "logits": logits}, options)
    (d_logits,) = torch.autograd.grad(
        _weighed(found["logprob"], problem.weights), logits, retain_graph=True
    )
    overwritten = torch.equal(logits.detach(), d_logits)
    return {"d_logits": d_logits}, overwritten, error_of(other.backward)


def compiled_step(group: Any, problem: Problem) -> Outcome:
    """The outcome where the operation is called from a compiled function."""
    own = OPERATIONS[problem.operation]
    compiled = torch.compile(own, backend="aot_eager")
    OPERATIONS[problem.operation] = compiled
    try:
        return outcome(group, problem)
    finally:
        OPERATIONS[problem.operation] = own
