"""Statistics of tokens over the ids that they keep (see `kept_ids.py`), from the logits of these.

The formulas are those of whole rows (`fastrlhf.reference`). Each kept id is given to them as a row
of one column, and what they sum over a row is summed over the ids of a token instead. The logits
come as one vector, and their gradient goes back as one: it does not matter here whether they were
made from hidden states (`kept_logits.py`) or taken out of a tensor (`taken_logits.py`).

Where a token keeps its target alone, log-prob and entropy are 0 and have no gradient, whatever the
logit is, so the logit need not be read.

Dims: N tokens, M kept ids of all of them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import FURTHER_STATS, RowSlopes, TokenStats

from .backend import backend_of, under_transform
from .kept_ids import KeptIds
from .transform import Transform

_NO_ID = 2**62  # larger than any id


class KeptQuestion(NamedTuple):
    """Which statistics of kept logits are asked for, and how they are computed."""

    transform: Transform  # its temperatures (N,) in the dtype of the logits
    entropy: bool
    with_stats: tuple[str, ...]
    impl: str

    def of_ids(self, kept: KeptIds) -> dict[str, Any]:
        """Return the transform as keywords of the formulas, with a temperature for each id."""
        options = self.of_tokens
        if isinstance(options["temperature"], Tensor):
            options["temperature"] = options["temperature"][kept.token]
        return options

    @property
    def asked(self) -> tuple[bool, ...]:
        """Tell which fields of `KeptStats` are asked for, in their order."""
        return True, self.entropy, True, *(name in self.with_stats for name in FURTHER_STATS)

    def answer(self, every: Iterable[Any]) -> "KeptStats":
        """Make `KeptStats` of all statistics: None in place of those that are not asked for."""
        stats: list[Any] = [
            x if want else None for x, want in zip(every, self.asked, strict=True)
        ]  # fmt: skip
        return KeptStats(*stats)

    @property
    def of_tokens(self) -> dict[str, Any]:
        return {
            "temperature": self.transform.of_rows, "softcap": self.transform.softcap,
            "scale": self.transform.scale,
        }  # fmt: skip

    def wanted(self, kept: KeptIds, *, lse: bool) -> Tensor:
        """Tell which ids (M,) need their logits, given whether anybody looks at the lse."""
        return kept.live if lse or "mean_logit" in self.with_stats else kept.with_choice


class KeptStats(NamedTuple):
    """`TokenStats` (N,) of all tokens, 0 for ignored ones. The log-prob, the entropy, the lse and
    the mean logit are differentiable. What was not asked for is None.
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor
    is_top1: Tensor | None
    mean_logit: Tensor | None
    log_sum_sq_probs: Tensor | None

    def shaped(self, shape: torch.Size, *, entropy_grad: bool = True) -> TokenStats:
        """Give them the shape of the targets."""
        named = {name: x.view(shape) for name, x in self._asdict().items() if x is not None}
        entropy = named.get("entropy")
        if entropy is not None and not entropy_grad:
            entropy = entropy.detach()
        further = {name: named[name] for name in FURTHER_STATS if name in named}
        return reference.stats_tuple(named["logprob"], entropy, named["lse"], further)


def kept_stats(logits: Tensor, kept: KeptIds, question: KeptQuestion) -> KeptStats:
    """Compute the statistics from the logits (M,) of kept ids, in fp32 or fp64. The logit of a
    token's only id may be anything, unless the lse or the mean logit is used.
    """
    if under_transform(logits):
        return _definition(logits, kept, question)
    return question.answer(_KeptStats.apply(logits, kept, question))


class _KeptStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, kept, question):
        stats, (peak, log_norm) = _forward(logits.detach(), kept, question)
        ctx.question, ctx.kept = question, kept
        ctx.save_for_backward(logits, stats.logprob, stats.entropy, peak, log_norm)
        ctx.set_materialize_grads(False)
        every = tuple(logits.new_empty(0) if x is None else x for x in stats)
        ctx.mark_non_differentiable(every[3], every[5])
        return every

    @staticmethod
    def backward(ctx, d_logprob, d_entropy, d_lse, _, d_mean, __):
        logits, logprob, entropy, peak, log_norm = ctx.saved_tensors
        kept, question = ctx.kept, ctx.question
        asked = question.asked
        upstream = (d_logprob, d_entropy if asked[1] else None, d_lse, d_mean if asked[4] else None)
        if torch.is_grad_enabled() or under_transform(*upstream):
            return _differentiable_gradient(logits, kept, question, upstream), None, None
        stats = (logprob, entropy, peak, log_norm)
        return _backward(logits, kept, question, stats, upstream), None, None


def _forward(
    logits: Tensor, kept: KeptIds, question: KeptQuestion
) -> tuple[KeptStats, tuple[Tensor, Tensor]]:
    """Compute the statistics, and the peak and log_norm that the gradient needs."""
    if _by_kernel(logits, question):
        from fastrlhf.kernels.kept_ids import kept_stats_forward

        stats = kept_stats_forward(
            logits, kept.ids, kept.offsets, kept.live_tokens, kept.targets, kept.own,
            **question.of_tokens,
            entropy=question.entropy, with_stats=question.with_stats,
        )  # fmt: skip
    else:
        parts = _row_parts(logits, kept, question)
        temperature = question.transform.of_rows
        stats = reference.statistics_of_parts(parts, kept.counts, temperature)
    logprob, entropy, lse, peak, log_norm, is_top1, mean_logit, log_squares = stats
    alone, live = kept.alone, kept.live_tokens
    # The statistics of a token that keeps one id; None where they depend on its logit.
    certain = (0.0, 0.0, None, True, None, 0.0)
    every = (
        torch.where(alone, value, x) if value is not None and len(x) else x
        for x, value in zip(
            (logprob, entropy, lse, is_top1, mean_logit, log_squares), certain, strict=True
        )
    )
    answer = question.answer(
        torch.where(live, x, torch.zeros_like(x)) if len(x) else x for x in every
    )
    return answer, (torch.where(live, peak, -torch.inf), log_norm)


def _by_kernel(logits: Tensor, question: KeptQuestion) -> bool:
    there = logits.numel() > 0
    return there and backend_of(question.impl, logits, logits.numel()) == "triton"


def _row_parts(logits: Tensor, kept: KeptIds, question: KeptQuestion) -> reference.RowParts:
    options = question.of_ids(kept)
    capped = reference.capped_logits(logits, options["softcap"], options["scale"])
    peak, targets = kept.largest(capped), kept.targets[kept.token]
    column = _columns(options["temperature"])
    terms = reference.row_terms(
        capped.unsqueeze(1), kept.ids.unsqueeze(1), peak[kept.token].unsqueeze(1),
        targets.unsqueeze(1), column, entropy=question.entropy, with_stats=question.with_stats,
    )  # fmt: skip
    sums = [kept.sums(x.view(-1)) for x in terms]
    before = peak[:0]
    if "is_top1" in question.with_stats:
        before = kept.largest(torch.where(kept.ids < targets, capped, -torch.inf))
    own = capped[kept.own] if len(capped) else peak  # without ids, all tokens are ignored
    return reference.named_parts(
        peak, own, before, sums, question.entropy, question.with_stats
    )  # fmt: skip


def _columns(temperature: float | Tensor) -> float | Tensor:
    return temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature


def _backward(
    logits: Tensor,
    kept: KeptIds,
    question: KeptQuestion,
    stats: tuple[Tensor | None, ...],
    upstream: tuple[Tensor | None, ...],
) -> Tensor:
    """Compute the gradient (M,) of the logits; exactly 0 where the upstream gradient is 0."""
    logprob, entropy, peak, log_norm = stats
    assert logprob is not None and peak is not None and log_norm is not None
    slopes = _with_choice(kept, peak, upstream)
    active = torch.zeros_like(kept.alone)
    for slope in slopes:
        if slope is not None:
            active |= slope != 0
    d_logprob, *others = slopes
    if d_logprob is None:
        d_logprob = torch.zeros_like(logprob)
    if _by_kernel(logits, question):
        from fastrlhf.kernels.kept_ids import kept_stats_backward

        return kept_stats_backward(
            logits, kept.ids, kept.token, kept.targets, kept.counts, active,
            stats, (d_logprob, *others), **question.of_tokens,
        )  # fmt: skip
    of_rows = reference.row_slopes(logprob, d_logprob, *others, columns=kept.counts)

    def of_ids(x: Any) -> Any:
        return None if x is None else x[kept.token]

    gradient = reference.logits_gradient(
        logits.unsqueeze(1), of_ids(kept.targets), tuple(map(of_ids, (entropy, peak, log_norm))),
        RowSlopes(*map(of_ids, of_rows)), columns=kept.ids.unsqueeze(1), **question.of_ids(kept),
    ).view(-1)  # fmt: skip
    return torch.where(of_ids(active), gradient, 0.0)


def _with_choice(
    kept: KeptIds, peak: Tensor, upstream: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Set the upstream gradients to 0 where they have no effect: of all statistics of tokens
    without a distribution, and of log-prob and entropy of tokens that keep their target alone.
    """
    nowhere = ~kept.live_tokens | (peak == -torch.inf)
    no_choice = nowhere | kept.alone
    where = (no_choice, no_choice, nowhere, nowhere)
    return tuple(
        None if x is None else torch.where(hidden, 0.0, x)
        for x, hidden in zip(upstream, where, strict=True)
    )


def _differentiable_gradient(
    logits: Tensor, kept: KeptIds, question: KeptQuestion, upstream: tuple[Tensor | None, ...]
) -> Tensor:
    """Compute the gradient by autograd, so that it can be differentiated again, or batched."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        view = logits.view_as(logits)
        stats = _definition(view, kept, question)
    of = stats.logprob, stats.entropy, stats.lse, stats.mean_logit
    pairs = [(a, b) for a, b in zip(of, upstream, strict=True) if a is not None and b is not None]
    outputs, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, view, gradients, create_graph=again)[0]


def _definition(logits: Tensor, kept: KeptIds, question: KeptQuestion) -> KeptStats:
    """Compute the statistics in plain PyTorch, which torch.func can differentiate and batch: from
    rows (N, W), where W is the most ids that a token keeps. On a GPU, the host waits for W.
    """
    options, live = question.of_tokens, kept.live_tokens
    temperature, softcap, scale = options.values()
    if not len(kept.ids):  # all tokens are ignored
        zeros = logits.sum() + logits.new_zeros(live.shape)
        return question.answer([zeros] * len(question.asked))
    column = torch.arange(max(1, int(kept.counts.max())), device=logits.device)
    inside = column < kept.counts.unsqueeze(1)
    place = (kept.offsets[:-1].unsqueeze(1) + column).clamp(max=len(kept.ids) - 1)

    def rows(values: Tensor, outside: float | int) -> Tensor:
        return torch.where(inside, values[place], outside)

    # For a token that keeps one id, 0 stands in for its logit, which may be anything.
    chosen = torch.where(kept.with_choice, logits, 0.0)
    stats = reference.token_stats(
        rows(reference.capped_logits(chosen, softcap, scale), -torch.inf),
        torch.where(live, kept.own - kept.offsets[:-1], -100), temperature=temperature,
        entropy=question.entropy, with_stats=[x for x in question.with_stats if "sq" in x],
    )  # fmt: skip
    capped = reference.capped_logits(logits, softcap, scale)
    z = rows(capped, -torch.inf) / _columns(temperature)
    empty = (z == -torch.inf).all(1)
    lse = torch.where(empty, -torch.inf, torch.where(empty.unsqueeze(1), 0.0, z).logsumexp(1))
    mean = (rows(capped, 0.0) / _columns(temperature)).sum(1) / kept.counts.clamp(min=1)
    on_top = z.detach() == z.detach().amax(1, keepdim=True)
    first = torch.where(on_top, rows(kept.ids, _NO_ID), _NO_ID).amin(1)
    is_top1 = kept.alone | ((first == kept.targets) & ~empty & (lse < torch.inf))
    every = (stats.logprob, stats.entropy, lse, is_top1, mean, stats.log_sum_sq_probs)
    return question.answer(
        None if x is None else torch.where(live, x, torch.zeros_like(x)) for x in every
    )
