"""What each process of a group computes from its part of a batch, for test_losses_over_ranks.py.

Dims: W ranks, B sequences, T tokens, of which a rank has those whose owner (B, T) it is.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastrlhf

Arguments = dict[str, Any]


class Found(NamedTuple):
    """What a function returned, and gradients by the names of its arguments."""

    values: list[Tensor]
    gradients: dict[str, Tensor]


def own_tokens(x: Tensor, owner: Tensor, rank: int, packed: bool) -> Tensor:
    """Those of (B, T) that a rank owns: packed (1, N), or rows with garbage at their ends."""
    rows = [values[mine] for values, mine in zip(x, owner == rank, strict=True)]
    if packed:
        return torch.cat(rows).unsqueeze(0)
    longest = max(len(row) for row in rows)
    garbage = math.nan if x.is_floating_point() else 0
    return torch.stack([F.pad(row, (0, longest - len(row)), value=garbage) for row in rows])


def put_back(parts: list[Tensor], owner: Tensor, packed: bool) -> Tensor:
    """(B, T) from what the ranks have: the inverse of `own_tokens`."""
    whole = torch.full(owner.shape, math.nan, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        mine = owner == rank
        if packed:
            whole[mine] = part[0]
        else:
            kept = torch.arange(part.shape[1]) < mine.sum(-1, keepdim=True)
            whole[mine] = part[kept]
            assert not part[~kept].any(), "a gradient of padding"
    return whole


def part_of(arguments: Arguments, owner: Tensor, rank: int, packed: bool) -> Arguments:
    """Arguments of a rank, from those of the whole."""
    part = {
        name: own_tokens(x, owner, rank, packed)
        if isinstance(x, Tensor) and x.shape == owner.shape
        else x
        for name, x in arguments.items()
    }
    if packed:
        part["cu_seqlens"] = F.pad((owner == rank).sum(-1).cumsum(0), (1, 0))
    return part


def evaluate(function: str, arguments: Arguments, wanted: tuple[str, ...]) -> Found:
    """Call a function of the library; gradients are those of its first result, if that is more than
    a number, with weights that grow with the place.
    """
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in wanted}
    found = getattr(fastrlhf, function)(**arguments | leaves)
    first, *rest = found if isinstance(found, tuple) else (found,)
    weights = torch.linspace(0.5, 1.5, first.numel(), dtype=first.dtype).view(first.shape)
    gradients = torch.autograd.grad(first, list(leaves.values()), weights)
    others = [list(x.values()) if isinstance(x, dict) else [x] for x in rest]
    values = [first.detach(), *(x for some in others for x in some)]
    return Found(values, dict(zip(wanted, gradients, strict=True)))


def evaluate_parts(
    group: Any, calls: list[tuple[str, Arguments, tuple[str, ...]]], owner: Tensor, packed: bool
) -> list[Found]:
    """Call functions, one after the other, on this rank's part of the tokens."""
    rank = dist.get_rank(group)
    return [
        evaluate(function, {**part_of(arguments, owner, rank, packed), "group": group}, wanted)
        for function, arguments, wanted in calls
    ]


def gradient_of_gradient(group: Any, function: str, arguments: Arguments, owner: Tensor) -> Tensor:
    """Gradient, with respect to log-probs, of the sum of squares of the loss's gradient."""
    if group is not None:
        arguments = part_of(arguments, owner, dist.get_rank(group), packed=False)
    logprobs = arguments["logprobs"].detach().clone().requires_grad_()
    more = {} if group is None else {"group": group}
    loss = getattr(fastrlhf, function)(**{**arguments, "logprobs": logprobs, **more})[0]
    (slope,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), logprobs)[0]


def whiten_part(group: Any, parts: list[tuple[Tensor, Tensor, Tensor]], shift: bool) -> Found:
    """Whitened entries of a rank (of W parts: entries, mask, weights in the loss)."""
    x, mask, weights = parts[dist.get_rank(group)]
    x = x.clone().requires_grad_()
    found = fastrlhf.whiten(x, mask, shift_mean=shift, group=group)
    return Found([found.detach()], {"x": torch.autograd.grad(found, x, weights)[0]})


def advantages_of_part(group: Any, parts: list[Arguments], kinds: tuple[str, ...]) -> list[Tensor]:
    part = parts[dist.get_rank(group)]
    return [fastrlhf.group_advantages(**part, kind=kind, group=group) for kind in kinds]


def comparisons_of_part(group: Any, parts: list[Arguments]) -> list[Tensor]:
    """What one process makes of the whole (group None, one part), of a rank's part."""
    part = parts[0] if group is None else parts[dist.get_rank(group)]
    where = {"groups": part["groups"], "valid": part["valid"], "group": group}
    scores, lengths = part["rewards"], part["lengths"]
    draw = torch.Generator().manual_seed(7)
    found = [
        fastrlhf.group_advantages(scores, **where, **options)
        for options in (
            {"scale_rewards": "batch"}, {"kind": "reinforce++-baseline"}, {"kind": "gpg"},
            {"kind": "opo", "lengths": lengths}, {"kind": "remax", "baselines": lengths},
            {"kind": "grpo_passk"},
        )
    ]  # fmt: skip
    found.append(fastrlhf.group_advantages(scores > 0, **where, kind="pass@k", k=1))
    found.append(fastrlhf.gdpo_advantages(torch.stack((scores, 0.1 * lengths), 1), **where))
    chosen = {"valid": part["valid"], "group": group}
    found += [
        fastrlhf.pf_ppo_weights(scores, method=method, **chosen)
        for method in ("pow", "max_min", "max_random")
    ]
    return [*found, fastrlhf.pf_ppo_weights(scores, generator=draw, **chosen)]


def counts_of_part(group: Any, parts: list[list[Tensor]]) -> list[Tensor]:
    masks = parts[dist.get_rank(group)]
    return [
        fastrlhf.global_normalizer(masks, group, gradients="mean"),
        fastrlhf.global_normalizer((x for x in masks), group),
        fastrlhf.global_normalizer(masks[0], group),
        fastrlhf.global_normalizer(masks[0]),
    ]


def messages(group: Any, calls: list[tuple[str, Arguments]]) -> list[str]:
    """What each call says is wrong."""
    said = []
    for function, arguments in calls:
        try:
            getattr(fastrlhf, function)(**{"group": group, **arguments})
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


# Data parallelism: what a step of a trainer looks like.


class Scorer(nn.Module):
    """A policy as small as can be: hidden states of tokens, and its head."""

    def __init__(self, tokens: int, hidden: int, vocab: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(tokens, hidden, dtype=torch.float64)
        self.head = nn.Linear(hidden, vocab, bias=False, dtype=torch.float64)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.embedding(ids)
        logprobs = fastrlhf.token_logprobs(self.head(hidden), targets)
        return hidden, self.head.weight, logprobs


def make_scorer() -> Scorer:
    return Scorer(tokens=20, hidden=4, vocab=9)


LossOf = Callable[[nn.Module, dict[str, Tensor], Any], Tensor]


def policy_step(reduction: str) -> LossOf:
    def loss_of(model: nn.Module, batch: dict[str, Tensor], n: Any) -> Tensor:
        _, _, logprobs = model(batch["ids"], batch["targets"])
        return fastrlhf.policy_loss(
            logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"],
            reduction=reduction, normalizer=n,
        )[0]  # fmt: skip

    return loss_of


def cross_entropy_step(model: nn.Module, batch: dict[str, Tensor], n: Any) -> Tensor:
    hidden, weight, _ = model(batch["ids"], batch["targets"])
    targets = torch.where(batch["mask"], batch["targets"], -100)
    return fastrlhf.linear_cross_entropy(hidden, weight, targets, normalizer=n)


def value_step(model: nn.Module, batch: dict[str, Tensor], n: Any) -> Tensor:
    _, _, values = model(batch["ids"], batch["targets"])
    return fastrlhf.value_loss(
        values, None, batch["old_logprobs"], batch["mask"], clip_range=None, normalizer=n
    )[0]


def sft_step(model: nn.Module, batch: dict[str, Tensor], n: Any) -> Tensor:
    return fastrlhf.sft_loss(model, batch["ids"], mask=batch["mask"], normalizer=n)[0]


def dpo_step(model: nn.Module, batch: dict[str, Tensor], n: Any) -> Tensor:
    _, _, logprobs = model(batch["ids"], batch["targets"])
    pairs = torch.arange(len(logprobs)).view(-1, 2)  # of the preferred and the other
    losses, _ = fastrlhf.dpo_loss(
        logprobs, batch["old_logprobs"], *pairs.unbind(1), 0.5, mask=batch["mask"]
    )
    return losses.mean() if n is None else losses.sum() / n


def what_tokens_count(batch: dict[str, Tensor]) -> Tensor:
    return batch["mask"]


def what_sequences_count(batch: dict[str, Tensor]) -> Tensor:
    return torch.ones_like(batch["advantages"])


def what_pairs_count(batch: dict[str, Tensor]) -> Tensor:
    return torch.ones_like(batch["advantages"][::2])


def what_targets_count(batch: dict[str, Tensor]) -> Tensor:
    return batch["mask"][:, 1:]


def make_gpt2() -> nn.Module:  # no part of which is in fp32, whatever its parameters are
    from support.tiny_models import make

    return make("GPT2").double()


# By name, since functions of functions do not go to another process.
STEPS: dict[str, tuple[Callable[[], nn.Module], LossOf, Callable[[dict[str, Tensor]], Tensor]]] = {
    "policy, token-mean": (make_scorer, policy_step("token-mean"), what_tokens_count),
    "policy, sequence-mean": (make_scorer, policy_step("sequence-mean"), what_sequences_count),
    "policy, sequence-sum": (make_scorer, policy_step("sequence-sum"), what_sequences_count),
    "policy, constant": (make_scorer, policy_step("constant"), what_sequences_count),
    "cross-entropy": (make_scorer, cross_entropy_step, what_tokens_count),
    "value": (make_scorer, value_step, what_tokens_count),
    "SFT of a model": (make_gpt2, sft_step, what_targets_count),
    "DPO": (make_scorer, dpo_step, what_pairs_count),
}


def accumulated_step(
    group: Any, name: str, of_ranks: list[list[dict[str, Tensor]]]
) -> tuple[Tensor, Tensor]:
    """One step with DDP: gradients of all micro-batches, of which each rank has its own, put
    together by DDP's mean. Returns the mean of the ranks' losses, and the gradient.
    """
    make_model, loss_of, counted = STEPS[name]
    batches = of_ranks[dist.get_rank(group)]
    model = DistributedDataParallel(make_model(), process_group=group)
    n = fastrlhf.global_normalizer([counted(b) for b in batches], group, gradients="mean")
    total = torch.zeros((), dtype=torch.float64)
    for i, batch in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else model.no_sync():
            loss = loss_of(model, batch, n)
            loss.backward()
        total += loss.detach()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group), flat_gradient(model)


def whole_step(name: str, batch: dict[str, Tensor], normalizer: Any) -> tuple[Tensor, Tensor]:
    """The same of one process that has everything in one batch."""
    make_model, loss_of, _ = STEPS[name]
    model = make_model()
    loss = loss_of(model, batch, normalizer)
    loss.backward()
    return loss.detach(), flat_gradient(model)


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def step_of_a_grid(
    world: Any, of_halves: list[dict[str, Tensor]], owner: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Four ranks: two halves of the sequences, and the tokens of each on two ranks. Returns the
    mean of the losses and of the gradients, as DDP takes it.
    """
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half, rank = divmod(dist.get_rank(world), 2)
    batch = part_of(of_halves[half], owner, rank, packed=False)
    by_tokens = reduction == "token-mean"
    counted = batch["mask"] if by_tokens else torch.ones_like(batch["advantages"])
    n = fastrlhf.global_normalizer(counted, world, gradients="mean") / (1 if by_tokens else 2)
    model = DistributedDataParallel(make_scorer(), process_group=world)
    _, _, logprobs = model(batch["ids"], batch["targets"])
    loss, _ = fastrlhf.policy_loss(
        logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"],
        reduction=reduction, normalizer=n, group=pairs[half],
    )  # fmt: skip
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=world)
    dist.destroy_process_group(pairs[half])
    # A loss is that of two ranks on both of them.
    return total / 4 / 2, flat_gradient(model)


def trust_region_step(group: Any, owner: Tensor) -> tuple[list, Tensor, Tensor]:
    """A TRPO step of a small policy on the tokens (12,) of a rank, and a product with the Fisher
    information before it.
    """
    torch.manual_seed(0)
    table = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(11, (12,)), torch.randint(5, (12,))
    advantages, mask = torch.randn(12), torch.arange(12) % 5 != 4
    if group is not None:
        mine = owner == dist.get_rank(group)
        ids, targets, advantages, mask = (x[mine] for x in (ids, targets, advantages, mask))
    product = fastrlhf.fisher_vector_product(
        lambda: table[ids], [table], torch.linspace(-1, 1, 55).double(), mask=mask, group=group
    )
    info = fastrlhf.trpo_step(
        lambda: table[ids], [table], targets, advantages, mask, damping=0.01, group=group
    )
    return list(info), table.detach().clone(), product


def kl_of_part(group: Any, pi: Tensor, ref: Tensor, borders: list[int]) -> Tensor:
    """The estimate of the whole batch, from the sequences between two borders."""
    mine = slice(*borders[dist.get_rank(group) :][:2])
    return fastrlhf.kto_kl(pi[mine], ref[mine], group=group)
