"""TRPO: the natural gradient of a policy over a vocabulary, and a step within its trust region.

The policy is a function without arguments that returns logits, or with a head, hidden states, of
whatever parameters are to be trained: a closure over a model and a batch. The Fisher matrix F of
its parameters is never built. F v = Jᵀ w takes the tangent u = J v of the logits, what the Fisher
information of the softmax makes of it, w = p⊙(u - pᵀu) for each token, and one backward; with a
head, both stay hidden states, and no logits are built.

J v comes from forward-mode differentiation, which costs one forward more, or where an operation of
the model has none, from two backwards. Of the backends of scaled_dot_product_attention, only
"math" has either (flash, memory-efficient and cuDNN attention have neither), so it is chosen here
for as long as it is needed; a model has to use that function, or plain operations
(attn_implementation "sdpa" or "eager"). Dropout has to be off, so that the policy is a function.

Where torch.distributed is initialised, batches are parts of one: counts of tokens, gradients, F v,
KL and surrogate are summed over all ranks, or those of a `group`, whose parameters thus stay the
same. A rank may have any number of tokens, none included.

Dims: B sequences, T tokens, H hidden, V vocabulary, D parameters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrlhf.hf import LMHead
from fastrlhf.losses.ratios import saturated
from fastrlhf.ops import (
    kl_divergence,
    linear_kl_divergence,
    linear_softmax_fisher_product,
    linear_token_logprobs,
    softmax_fisher_product,
    token_logprobs,
)
from fastrlhf.ops.checks import (
    check_at_least,
    check_between,
    check_finite,
    check_floating,
    check_integer,
    check_mask,
    check_one_of,
    check_positive,
    check_real,
    check_same_device,
    check_shape,
    check_whole,
)
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.ops.targets import MASKED_OUT

Policy = Callable[[], Tensor]
MODES = ("auto", "forward", "double-vjp")


class TrustRegionInfo(NamedTuple):
    """What a step did; numbers are 0-d tensors, of the whole batch on every rank.

    Example:
        >>> policy = torch.nn.Linear(3, 4)
        >>> batch = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, -1.0, 0.5]]), torch.ones(1, 3)
        >>> params = list(policy.parameters())
        >>> info = fastrlhf.trpo_step(lambda: policy(torch.eye(3).unsqueeze(0)), params, *batch)
        >>> bool(info.surrogate > 0), bool(info.kl <= 0.01)
        (True, True)
    """

    accepted: bool
    surrogate: Tensor  # mean of r·A after the step, less that before it; 0 if not accepted
    kl: Tensor  # mean KL(old‖new) in nats after the step; 0 if not accepted
    cg_residual: Tensor  # |g - (F + λI)x| / |g|
    step_size: float  # factor of the natural gradient x; 0 if not accepted
    backtracks: int  # steps that were tried and taken back


def fisher_vector_product(
    policy: Policy,
    params: Sequence[Tensor],
    vector: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    damping: float = 0.0,
    head: LMHead | None = None,
    mode: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Multiply the Fisher information of a policy's parameters, a mean over tokens, by a vector.

    It is the Hessian of the mean KL(π_old‖π), and of KL(π‖π_old), where π is π_old.

    Eager equivalent, with J the (tokens·V, D) Jacobian of the logits and c = mask / mask.sum()::

        u = (J @ vector).view(tokens, V)
        w = c[:, None] * p * (u - (p * u).sum(-1, keepdim=True)) / temperature**2
        product = J.T @ w.flatten() + damping * vector

    Args:
        policy: returns logits (..., V), or with `head` the hidden states (..., H) that enter it.
        params: leaves that require a gradient, whose D elements in order are the parameters.
        vector: (D,) floating.
        mask: (...) bool or 0/1, the tokens that count; None: all.
        temperature: of the softmax.
        damping: λ of F + λI.
        head: `lm_head(model)`, which is not itself among the parameters.
        mode: "forward" (forward-mode differentiation), "double-vjp", or "auto": forward unless the
            model has an operation without it.
        group: torch.distributed group whose ranks have parts of the batch; None: all ranks, where
            torch.distributed is initialised.

    Returns:
        (D,) in the dtype of the vector, fp32 at least; not differentiable.

    Cost: "forward" one forward with tangents, about two forwards, and one backward; "double-vjp" a
    forward and three backwards or so. From logits, a few tensors of their size; with a head, none.

    Raises:
        TypeError, ValueError: shapes that do not fit; an unknown mode.

    Source: 1502.05477 appendix C.

    Example:
        >>> policy = torch.nn.Linear(3, 4)
        >>> states, params = torch.eye(3).unsqueeze(0), list(policy.parameters())
        >>> vector = torch.ones(sum(p.numel() for p in params))
        >>> product = fastrlhf.fisher_vector_product(lambda: policy(states), params, vector)
        >>> product.shape
        torch.Size([16])
    """
    damping = _checked_damping(damping)
    problem = _Problem(policy, params, mask, temperature, head, mode, group)
    return problem.fisher_product(_checked_vector(vector, problem.size), damping)


def conjugate_gradient(
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    iterations: int = 15,
    tolerance: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Solve operator(x) = target for a symmetric positive definite operator.

    Eager equivalent, as far as it has converged: `torch.linalg.solve(A, target)`.

    Args:
        operator: x (D,) → A x (D,).
        target: (D,).
        iterations: at most so many products.
        tolerance: bound of |target - A x|² / |target|² at which x stays as it is.

    Returns:
        x (D,), and the relative residual |target - A x| / |target| (0-d), as the recurrence has it.

    A target of 0 has the solution 0. Residuals below the square of what the dtype resolves count as
    none. The scales of operator and target do not matter, as long as x itself can be represented.
    Nothing waits for a GPU.

    Raises:
        TypeError, ValueError: a target that is no vector; an operator that makes something else of
            a vector; an option out of range.

    Example:
        >>> matrix, target = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 2.0])
        >>> solution, residual = fastrlhf.conjugate_gradient(lambda v: matrix @ v, target)
        >>> solution
        tensor([1.0000, 0.5000])
    """
    if not callable(operator):
        raise TypeError(f"operator: expected a function, got {type(operator).__name__}")
    check_floating("target", target)
    if target.ndim != 1:
        raise ValueError(f"target: expected shape (D,), got {tuple(target.shape)}")
    iterations = check_whole("iterations", iterations, 0)
    tolerance = check_at_least("tolerance", tolerance, 0)
    size = _largest(target)
    residual = _wide(target) / size
    x, direction = torch.zeros_like(residual), residual
    start = square = residual @ residual
    # What the recurrence says of a residual this small is not true of the residual any more, and
    # its square has to stay far from where numbers end.
    floor = torch.maximum(start * tolerance, start * torch.finfo(start.dtype).eps ** 4)
    first_gain = torch.ones_like(start)
    for i in range(iterations):
        # Directions and products of size one: no curvature over- or underflows, whatever the
        # scale of the operator, and of a residual that is nearly gone.
        length = _largest(direction)
        unit = direction / length
        # A copy, since an operator may write into what it is given.
        product = operator(unit.to(target.dtype, copy=True))
        check_floating("operator(x)", product)
        check_shape("operator(x)", product, tuple(target.shape), "the shape of target")
        check_same_device("operator(x)", product, "target", target)
        product = _wide(product)
        gain = _largest(product)
        first_gain = gain if i == 0 else first_gain
        product = product / gain
        curvature = unit @ product
        # Once converged, or where an operator is not definite after all, x stays.
        going = (square > floor) & (curvature > 0)
        step = square / length / torch.where(going, curvature, 1.0)
        x = torch.where(going, x + step * (first_gain / gain) * unit, x)
        residual = torch.where(going, residual - step * product, residual)
        new_square = torch.where(going, residual @ residual, square)
        share = new_square / torch.where(going, square, 1.0)
        direction = torch.where(going, residual + share * direction, direction)
        square = new_square
    relative = torch.where(start == 0, 0.0, (square / torch.where(start == 0, 1.0, start)).sqrt())
    return (x * (size / first_gain)).to(target.dtype), relative.to(target.dtype)


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude (0-d), to divide by: 1 for nothing but zeros, or nothing at all."""
    if x.numel() == 0:
        return _wide(x.new_ones(()))
    largest = _wide(x).abs().max()
    return torch.where(largest == 0, 1.0, largest)


def trpo_step(
    policy: Policy,
    params: Sequence[Tensor],
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    max_kl: float = 0.01,
    damping: float = 0.1,
    cg_iterations: int = 15,
    backtrack_ratio: float = 0.8,
    max_backtracks: int = 10,
    temperature: float = 1.0,
    head: LMHead | None = None,
    mode: str = "auto",
    group: Group | None = None,
) -> TrustRegionInfo:
    """Take one TRPO step: along the natural gradient, as far as an exact KL allows.

    It solves (F + λI)x = g for the gradient g of mean(r·A), goes √(2·max_kl / xᵀ(F + λI)x)·x, and
    halts on the way back where the surrogate improves and the exact mean KL(old‖new), over the
    whole vocabulary, is at most max_kl.

    Args:
        policy, params, temperature, head, mode, group: as `fisher_vector_product`.
        targets: (...) integer, the tokens that were sampled, aligned with what the policy returns.
        advantages: the shape of targets, or (B,) for targets (B, T).
        mask: (...) bool or 0/1, the tokens that count; the others can hold anything.
        old_logprobs: (...) log-probs of when the tokens were sampled, in nats; None: the policy as
            it is now, which it must be in any case for the step to be TRPO's.
        max_kl: δ, in nats per token.
        damping: λ, which keeps directions that the batch says little about in check.
        cg_iterations: products with F.
        backtrack_ratio, max_backtracks: by how much a step that fails is shortened, and how often.

    Returns:
        TrustRegionInfo. Parameters are changed in place if a step is accepted, and otherwise the
        same bits as before.

    Cost: one forward and backward for g, cg_iterations products with F, and one forward for each
    step tried. Memory, with a head: the hidden states of the old policy and a few vectors of D
    elements; without one, also its logits.

    Raises:
        TypeError, ValueError: shapes, devices or options that do not fit.

    Source: 1502.05477 section 6 and appendix C.

    Example:
        >>> policy = torch.nn.Linear(3, 4)
        >>> states, actions = torch.eye(3).unsqueeze(0), torch.tensor([[0, 1, 2]])
        >>> advantages, mask = torch.tensor([[1.0, -1.0, 0.5]]), torch.ones(1, 3)
        >>> params = list(policy.parameters())
        >>> info = fastrlhf.trpo_step(lambda: policy(states), params, actions, advantages, mask)
        >>> info.accepted, bool(info.kl <= 0.01)
        (True, True)
    """
    max_kl = check_positive("max_kl", max_kl)
    damping = _checked_damping(damping)
    backtrack_ratio = check_between("backtrack_ratio", backtrack_ratio, 0, 1)
    max_backtracks = check_whole("max_backtracks", max_backtracks, 0)
    cg_iterations = check_whole("cg_iterations", cg_iterations, 1)
    batch = _checked_batch(targets, advantages, mask, old_logprobs)
    problem = _Problem(policy, params, batch.mask, temperature, head, mode, group)
    with _differentiable_attention():
        output = _output_of(policy)
        _check_shape_of(output, targets, head)
        logprobs = problem.logprobs(output, batch)
        if batch.old is None:
            batch = batch._replace(old=logprobs.detach())
        before = problem.mean(_gain(logprobs, batch))
        gradient = problem.gradient(before)
    old_output, before = problem.kept(output), problem.summed(before.detach())
    del output, logprobs
    direction, residual = conjugate_gradient(
        lambda v: problem.fisher_product(v, damping), gradient, iterations=cg_iterations
    )
    # xᵀ(F + λI)x = xᵀ(g - residual), and the residual of conjugate gradients is orthogonal to x.
    length = float(direction @ gradient)
    full_step = math.sqrt(2 * max_kl / length) if length > 0 else 0.0
    saved = [p.detach().clone() for p in problem.params]
    tries = max_backtracks + 1 if full_step > 0 and math.isfinite(full_step) else 0
    accepted = False
    try:
        for i in range(tries):
            step = full_step * backtrack_ratio**i
            problem.move(saved, step * direction)
            gain, kl = problem.evaluate(old_output, batch)
            accepted = float(gain) > float(before) and float(kl) <= max_kl
            if accepted:
                return TrustRegionInfo(True, gain - before, kl, residual, step, i)
    finally:  # an error on the way included
        if not accepted:
            problem.restore(saved)
    zero = torch.zeros_like(before)
    return TrustRegionInfo(False, zero, zero, residual, 0.0, tries)


class _Batch(NamedTuple):
    """The tokens, as if there were nothing outside of the mask."""

    targets: Tensor  # MASKED_OUT where the mask is 0
    advantages: Tensor
    mask: Tensor
    old: Tensor | None


def _gain(logprobs: Tensor, batch: _Batch) -> Tensor:
    """r·A of each token, 0 outside of the mask."""
    assert batch.old is not None
    return saturated(logprobs - batch.old).exp() * batch.advantages


class _Problem:
    """A policy, its parameters, and means over the tokens of a batch, of all ranks."""

    def __init__(
        self,
        policy: Policy,
        params: Sequence[Tensor],
        mask: Tensor | None,
        temperature: float,
        head: LMHead | None,
        mode: str,
        group: Group | None,
    ):
        check_one_of("mode", mode, MODES)
        if not callable(policy):
            raise TypeError(f"policy: expected a function, got {type(policy).__name__}")
        if head is not None and not isinstance(head, LMHead):
            raise TypeError(f"head: expected an LMHead or None, got {type(head).__name__}")
        temperature = check_positive("temperature", temperature)
        params = _checked_params(params)
        if not params or not all(p.is_leaf and p.requires_grad for p in params):
            raise ValueError("params: expected leaves that require a gradient, at least one")
        if len({id(p) for p in params}) < len(params):
            raise ValueError("params: expected each parameter once")
        for x in () if head is None else (head.weight, head.bias):
            made = isinstance(x, Tensor) and x.grad_fn is not None
            if made or any(x is p for p in params):
                raise ValueError(
                    "head: expected one that does not depend on params; let policy make logits"
                )
        self.policy, self.params, self.mask = policy, params, mask
        self.temperature, self.head, self.mode = temperature, head, mode
        self.group = _ranks(group)
        self.size = sum(p.numel() for p in params)

    def kept(self, output: Tensor) -> Tensor:
        """What the policy returned, for when its parameters have moved."""
        output = output.detach()
        memory = output.untyped_storage().data_ptr()
        shared = any(p.untyped_storage().data_ptr() == memory for p in self.params)
        return output.clone() if shared else output

    def options(self) -> dict:
        head = {} if self.head is None else self.head.options()
        return head | {"temperature": self.temperature}

    def summed(self, x: Tensor) -> Tensor:
        """Add up what the ranks have."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def count(self, rows: Tensor) -> Tensor:
        """Number of tokens that count, of all ranks, at least 1; `rows` has one element a token."""
        own = rows.new_full((), rows.numel()) if self.mask is None else self.mask.sum().to(rows)
        return self.summed(own.float()).clamp(min=1)

    def mean(self, values: Tensor) -> Tensor:
        """Share of this rank in the mean over tokens, of values that are 0 outside of the mask."""
        return values.sum() / self.count(values.detach())

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient (D,) of the sum of a value over the ranks."""
        found = torch.autograd.grad(value, self.params, allow_unused=True)
        return self.summed(self.flat(found))

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Put gradients of all parameters into one vector, fp32 at least."""
        pairs = zip(self.params, tensors, strict=True)
        parts = (torch.zeros_like(p) if x is None else x for p, x in pairs)
        return torch.cat([_wide(x).reshape(-1) for x in parts])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector into tensors like the parameters."""
        parts = vector.split([p.numel() for p in self.params])
        return [x.view(p.shape).to(p.dtype) for x, p in zip(parts, self.params, strict=True)]

    def logprobs(self, output: Tensor, batch: _Batch) -> Tensor:
        if self.head is None:
            return token_logprobs(output, batch.targets, ignore_index=MASKED_OUT, **self.options())
        return linear_token_logprobs(
            output, self.head.weight, batch.targets, ignore_index=MASKED_OUT, **self.options()
        )

    @torch.no_grad()
    def evaluate(self, old_output: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Surrogate and mean KL(old‖new) of the parameters as they are."""
        output = self.policy()
        gain = _gain(self.logprobs(output, batch), batch)
        if self.head is None:
            kl = kl_divergence(
                output, old_output, direction="forward", mask=batch.mask, **self.options()
            )
        else:
            weight = self.head.weight
            kl = linear_kl_divergence(
                output, weight, old_output, weight, direction="forward", mask=batch.mask,
                ref_bias=self.head.bias, **self.options(),
            )  # fmt: skip
        return self.summed(self.mean(gain)), self.summed(self.mean(kl))

    def fisher_product(self, vector: Tensor, damping: float) -> Tensor:
        """(F + λI) v."""
        tangents = self.split(vector)
        with _differentiable_attention():
            if self.mode == "double-vjp":
                product = self._by_double_vjp(tangents)
            else:
                try:
                    product = self._by_forward_mode(tangents)
                except (NotImplementedError, RuntimeError) as error:
                    if self.mode == "forward" or not _lacks_forward_mode(error):
                        raise
                    self.mode = "double-vjp"
                    product = self._by_double_vjp(tangents)
        return self.summed(product).to(vector.dtype) + damping * vector

    def _by_forward_mode(self, tangents: list[Tensor]) -> Tensor:
        with forward_ad.dual_level():
            with torch.no_grad():
                for p, tangent in zip(self.params, tangents, strict=True):
                    # The leaf itself takes the tangent, wherever the policy finds it.
                    p.copy_(forward_ad.make_dual(p.detach().clone(), tangent))
            with torch.enable_grad():
                output, moved = forward_ad.unpack_dual(_output_of(self.policy))
            if moved is None:
                raise ValueError("params: expected parameters that the policy's output depends on")
            moved = moved.detach().clone()
        # Outside, so that the backward does not carry tangents on.
        return self._pull_back(output, moved)

    def _by_double_vjp(self, tangents: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            output = _output_of(self.policy)
            # J is the derivative of Jᵀw with respect to w.
            w = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(
                output, self.params, w, create_graph=True, allow_unused=True
            )
            used = [(x, t) for x, t in zip(pulled, tangents, strict=True) if x is not None]
            if not used:
                raise ValueError("params: expected parameters that the policy's output depends on")
            outputs, upstream = zip(*used, strict=True)
            (moved,) = torch.autograd.grad(outputs, w, upstream, retain_graph=True)
        return self._pull_back(output, moved)

    def _pull_back(self, output: Tensor, moved: Tensor) -> Tensor:
        """Jᵀ of what the Fisher information of each token makes of its tangent."""
        plain = output.detach()
        if self.head is None:
            product, row = softmax_fisher_product(plain, moved, mask=self.mask, **self.options())
        else:
            product, row = linear_softmax_fisher_product(
                plain, self.head.weight, moved, mask=self.mask, **self.options()
            )
        product = (product / self.count(row)).to(output.dtype)
        return self.flat(torch.autograd.grad(output, self.params, product, allow_unused=True))

    @torch.no_grad()
    def move(self, saved: list[Tensor], step: Tensor) -> None:
        """Set the parameters to what they were, plus a step (D,)."""
        parts = step.split([p.numel() for p in self.params])
        for p, old, part in zip(self.params, saved, parts, strict=True):
            p.copy_(_wide(old) + part.view(p.shape))

    @torch.no_grad()
    def restore(self, saved: list[Tensor]) -> None:
        for p, old in zip(self.params, saved, strict=True):
            p.copy_(old)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Choose the one backend of attention that can be differentiated forward and twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _lacks_forward_mode(error: Exception) -> bool:
    """Whether an error says that an operation has no forward-mode derivative."""
    text = str(error)
    return isinstance(error, NotImplementedError) or "forward AD" in text or "jvp" in text


def _checked_vector(vector: Tensor, size: int) -> Tensor:
    check_floating("vector", vector)
    check_shape("vector", vector, (size,), "one for each element of params")
    return _wide(vector)


def _checked_batch(
    targets: Tensor, advantages: Tensor, mask: Tensor, old_logprobs: Tensor | None
) -> _Batch:
    check_integer("targets", targets)
    check_mask("mask", mask)
    check_real("advantages", advantages)
    shape = tuple(targets.shape)
    if advantages.shape == shape[:1] and len(shape) > 1:
        advantages = advantages.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    others = {"mask": mask, "advantages": advantages}
    if old_logprobs is not None:
        check_floating("old_logprobs", old_logprobs)
        others["old_logprobs"] = old_logprobs
    for name, x in others.items():
        check_shape(name, x, shape, "the shape of targets")
        check_same_device(name, x, "targets", targets)
    inside = mask != 0
    cleared = [
        None if x is None else torch.where(inside, _wide(x.detach()), 0.0)
        for x in (advantages, old_logprobs)
    ]
    assert cleared[0] is not None
    return _Batch(torch.where(inside, targets.long(), MASKED_OUT), cleared[0], inside, cleared[1])


def _ranks(group: Group | None) -> Group | None:
    """The group, or all ranks if there are any."""
    if check_group(group) is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def _checked_damping(damping: float) -> float:
    return check_at_least("damping", check_finite("damping", damping), 0)


def _output_of(policy: Policy) -> Tensor:
    output = policy()
    if not isinstance(output, Tensor) or not output.requires_grad:
        got = "one without gradient" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"policy: expected it to return a differentiable tensor, got {got}")
    return output


def _checked_params(params: Sequence[Tensor]) -> list[Tensor]:
    try:
        found = list(params)
    except TypeError:
        raise TypeError(f"params: expected tensors, got {type(params).__name__}") from None
    for p in found:
        check_floating("params", p)
    return found


def _check_shape_of(output: Tensor, targets: Tensor, head: LMHead | None) -> None:
    what = "logits (..., V)" if head is None else "hidden states (..., H)"
    if output.shape[:-1] != targets.shape:
        raise ValueError(
            f"policy: expected {what} for targets {tuple(targets.shape)}, got {tuple(output.shape)}"
        )
