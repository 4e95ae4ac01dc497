"""The problems of `vocabulary_over_ranks` as DTensors, and DTensors that are refused.

Dims: W ranks, V vocabulary, H width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from .vocabulary_over_ranks import CUT, OPERATIONS, Outcome, Problem, differentiate, error_of

Placements = list[Any]


def as_outcome(group: Any, problem: Problem, mesh: str = "") -> tuple[Outcome, list[str]]:
    """As `vocabulary_over_ranks.outcome`, with gradients put together, and what is wrong with them:
    a gradient is a DTensor of the placements of what it is of, or of those that PyTorch gives it.

    `mesh`: "" for one dimension; "copies first" or "copies last" of 2 x 2 ranks, of which one
    dimension has copies.
    """
    device_mesh, at = DeviceMesh.from_group(group, "cpu"), 0
    if mesh:
        device_mesh, at = init_device_mesh("cpu", (2, 2)), int(mesh == "copies first")
    given, leaves = {}, {}
    for name, x in problem.tensors().items():
        given[name] = _distributed(name, x, device_mesh, at)
        if name in problem.leaves():
            leaves[name] = given[name].requires_grad_()
    found = OPERATIONS[problem.operation](given, problem.options)
    differentiate(found, problem.weights)
    wrong, gradients = [], {}
    for name, x in leaves.items():
        served = isinstance(x.grad, DTensor)
        if not served or x.grad.placements not in (x.placements, _accumulated(x)):
            wrong.append(f"{name}: {type(x.grad)} {getattr(x.grad, 'placements', None)}")
        gradients[f"d_{name}"] = x.grad.full_tensor()
    wrong += [f"{name} is a DTensor" for name, x in found.items() if isinstance(x, DTensor)]
    return {name: x.detach() for name, x in (*found.items(), *gradients.items())}, wrong


def _accumulated(x: Any) -> tuple[Any, ...]:
    """The placements of the gradient that PyTorch itself accumulates of a local part: those of the
    DTensor, but for PyTorch 2.11, which makes copies of parts that differ in size.
    """
    alike = x.detach().requires_grad_()
    alike.to_local().sum().backward()
    return alike.grad.placements


def _distributed(name: str, x: Tensor, mesh: DeviceMesh, at: int) -> Tensor:
    """Cut along dimension `at` of the mesh, replicated along others; targets as they are."""
    placements: Placements = [Replicate()] * mesh.ndim
    if name in CUT:
        placements[at] = Shard(CUT[name] % x.ndim)
    elif "hidden" not in name:
        return x
    return distribute_tensor(x, mesh, placements).detach()


def refusals(group: Any, operation: str, options: dict[str, Any]) -> dict[str, str]:
    """What an operation says of placements that it does not serve, by what is wrong."""
    problem = Problem(operation, (4, 4), dict(options), bias=True)
    mesh = DeviceMesh.from_group(group, "cpu")
    kinds = _of_logits if "logits" in problem.leaves() else _of_heads
    return {name: error_of(call) for name, call in kinds(problem, mesh, group).items()}


def _calls(problem: Problem, mesh: DeviceMesh) -> Callable[..., Callable[[], Outcome]]:
    """Makes calls with some tensors placed in another way: None leaves one plain."""

    def call(group: Any = None, **placements: Placements | None) -> Callable[[], Outcome]:
        given = {name: _distributed(name, x, mesh, 0) for name, x in problem.tensors().items()}
        for name, placed in placements.items():
            x = problem.tensors()[name]
            if placed is not None:
                partial = isinstance(placed[0], Partial)
                x = (
                    DTensor.from_local(x, mesh, placed)
                    if partial
                    else distribute_tensor(x, mesh, placed)
                )
            given[name] = x
        return lambda: OPERATIONS[problem.operation](given, {**problem.options, "group": group})

    return call


def _of_logits(problem: Problem, mesh: DeviceMesh, group: Any) -> dict[str, Callable[[], Any]]:
    call = _calls(problem, mesh)
    kinds = {
        "logits: rows cut": call(logits=[Shard(0)]),
        "logits: partial": call(logits=[Partial()]),
        "group beside": call(group),
    }
    if problem.operation == "token_stats":
        kinds["targets: rows cut"] = call(targets=[Shard(0)])
    if "kl" in problem.operation:
        kinds |= {
            "ref_logits: copies": call(ref_logits=[Replicate()]),
            "ref_logits: rows cut": call(ref_logits=[Shard(0)]),
        }
    return kinds


def _of_heads(problem: Problem, mesh: DeviceMesh, group: Any) -> dict[str, Callable[[], Any]]:
    call = _calls(problem, mesh)
    kinds = {
        "weight: width cut": call(weight=[Shard(1)]),
        "weight: partial": call(weight=[Partial()]),
        "hidden: rows cut": call(hidden=[Shard(0)]),
        "hidden: width cut": call(hidden=[Shard(2)]),
        "bias: copies": call(bias=[Replicate()]),
        "bias: plain": call(bias=None),
        "group beside": call(group),
    }
    if problem.operation in ("linear_token_stats", "linear_loss"):
        kinds["targets: rows cut"] = call(targets=[Shard(0)])
    if "kl" in problem.operation:
        kinds |= {
            "ref_weight: width cut": call(ref_weight=[Shard(1)]),
            "ref_bias: plain": call(ref_bias=None),
            "ref_hidden: rows cut": call(ref_hidden=[Shard(0)]),
            "ref_weight: copies": call(ref_weight=[Replicate()], ref_bias=[Replicate()]),
        }
    return kinds


def refusals_of_a_grid(group: Any) -> dict[str, str]:
    """Where both dimensions of a mesh cut the vocabulary, or one of them the rows."""
    mesh = init_device_mesh("cpu", (2, 2))
    problem = Problem("linear_token_stats", (4, 4))
    x = problem.tensors()

    def placed(name: str, *placements: Any) -> Tensor:
        return distribute_tensor(x[name], mesh, placements)

    head, logits = OPERATIONS["linear_token_stats"], OPERATIONS["token_stats"]
    copies = placed("hidden", Replicate(), Replicate())
    calls = {
        "weight: both": lambda: head(
            {**x, "hidden": copies, "weight": placed("weight", Shard(0), Shard(0))}, {}
        ),
        "weight: width too": lambda: head(
            {**x, "hidden": copies, "weight": placed("weight", Shard(0), Shard(1))}, {}
        ),
        "hidden: rows cut": lambda: head(
            {
                **x,
                "hidden": placed("hidden", Shard(0), Replicate()),
                "weight": placed("weight", Replicate(), Shard(0)),
            },
            {},
        ),
        "logits: both": lambda: logits({**x, "logits": placed("logits", Shard(2), Shard(2))}, {}),
        "logits: rows cut": lambda: logits(
            {**x, "logits": placed("logits", Shard(0), Shard(2))}, {}
        ),
    }
    return {name: error_of(call) for name, call in calls.items()}


def of_another_mesh(group: Any) -> str | None:
    """A bias of the first two ranks in another order; None on other ranks."""
    mesh, other = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [1, 0])  # made by all ranks
    if mesh.get_coordinate() is None:
        return None
    problem = replace(Problem("linear_token_stats", (4, 4)), bias=True)
    given = {name: _distributed(name, x, mesh, 0) for name, x in problem.tensors().items()}
    given["bias"] = distribute_tensor(problem.tensors()["bias"], other, [Shard(0)])
    return error_of(OPERATIONS[problem.operation], given, {})
