"""What every operation that has a kernel means, in eager PyTorch and in any floating dtype.

`token_stats` and `preference_loss` are definitions: plain tensor code that autograd differentiates,
as often as wanted. Tests evaluate them in fp64. `token_stats_forward` and `token_stats_backward`
compute the numbers of `token_stats` and their gradient in closed form, as the kernels do, for a few
rows at a time: they are what runs where Triton does not.

Dims: N rows, V vocabulary, B sequences, T tokens, P pairs, ... any leading shape. Imports only
torch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of the distribution over the vocabulary at each position; fp32 (fp64 for fp64
    logits).

    logprob: (...,) ln p(target) in nats; exactly 0 where the target is ignored.
    entropy: (...,) in nats, None unless asked for; 0 where the target is ignored.
    lse: (...,) log-sum-exp of the effective logits, not differentiable; 0 where the target is
    ignored.

    What `with_stats` names is there besides, in `FurtherTokenStats`; here it is None.

    Example:
        >>> stats = fastrlhf.token_stats(torch.zeros(2, 8), torch.tensor([0, 5]), entropy=True)
        >>> logprob, entropy, lse = stats
        >>> entropy
        tensor([2.0794, 2.0794])
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor

    @property
    def is_top1(self) -> Tensor | None: ...

    @property
    def mean_logit(self) -> Tensor | None: ...

    @property
    def log_sum_sq_probs(self) -> Tensor | None: ...


class FurtherTokenStats(NamedTuple):
    """`TokenStats` with what was named in `with_stats`, and None for what was not; a class of its
    own, so that `logprob, entropy, lse = stats` goes on to hold where nothing was.

    These are not differentiable. Of the effective logits z, or of their probabilities p:

    is_top1: (...,) bool, z.argmax(-1) == target: of equal logits, the first is on top. False where
    the target is ignored, and without a distribution: where all logits are -inf, or one is NaN or
    inf.
    mean_logit: (...,) z.mean(-1) over the vocabulary, -inf if any of them is; 0 where the target is
    ignored.
    log_sum_sq_probs: (...,) ln Σ p², 0 where all logits are -inf or the target is ignored.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> further = "is_top1", "mean_logit"
        >>> stats = fastrlhf.token_stats(logits, torch.tensor([0, 1]), with_stats=further)
        >>> stats.is_top1, stats.mean_logit
        (tensor([ True, False]), tensor([1.0000, 0.3333]))
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


# What `with_stats` may name.
FURTHER_STATS = FurtherTokenStats._fields[3:]


def stats_tuple(
    logprob: Tensor, entropy: Tensor | None, lse: Tensor, further: dict[str, Tensor]
) -> TokenStats:
    """Make the statistics of either class, by whether there are further ones."""
    if further:
        # It has all that a TokenStats has.
        return cast(TokenStats, FurtherTokenStats(logprob, entropy, lse, **further))
    return TokenStats(logprob, entropy, lse)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every other floating dtype is computed in fp32."""
    return torch.promote_types(dtype, torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """σ(x), by way of the tail in which it is small.

    PyTorch's derivative σ·(1 - σ) is 0 as soon as σ rounds to 1, at x = 17 in fp32. This one keeps
    its relative accuracy in both tails, and so does the derivative of it.
    """
    small = x <= 0
    tail = torch.sigmoid(torch.where(small, x, -x))
    return torch.where(small, tail, 1 - tail)


def log_sigmoid(x: Tensor) -> Tensor:
    """Ln σ(x), with relative accuracy in both tails for the second derivative too, which that of
    `F.logsigmoid` loses where σ rounds to 1.
    """
    negative = x <= 0
    decay = torch.exp(torch.where(negative, x, -x))
    return torch.where(negative, x, 0.0) - torch.log1p(decay)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """Ln(e^a + e^b), not both of them infinite. The second derivative of `torch.logaddexp` is NaN
    where they lie more than 88 apart.
    """
    first = a > b
    return torch.where(first, a, b) + torch.log1p(torch.exp(torch.where(first, b - a, a - b)))


def capped_logits(logits: Tensor, softcap: float | Tensor | None, scale: float | Tensor) -> Tensor:
    """softcap·tanh(scale·x / softcap), or scale·x without a cap: the logits but for the
    temperature.
    """
    scaled = logits if _is_one(scale) else logits * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def cap_slope(logits: Tensor, softcap: float | Tensor, scale: float | Tensor) -> Tensor:
    """Compute 1 - tanh²(scale·x / softcap), without its cancellation where the cap saturates.

    As 4d/(1 + d)² with d = e^-2|·|, since the bits of PyTorch's cosh depend on where in memory a
    number lies.
    """
    decay = logits.abs().mul_(-2 * (scale / softcap)).exp_()
    return decay.mul(4).div_(decay.add_(1).square_())


def row_sums(x: Tensor) -> Tensor:
    """Sum (..., V) to (..., 1). A lone row comes twice, for PyTorch would sum it in as many parts
    as there are threads, and its bits would not be those that it has among others.
    """
    if _compiles_for_cpu(x):
        # The compiler adds one number after the other, where PyTorch adds up sums of parts: fp32
        # would not do.
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    lone = x.ndim == 2 and x.shape[0] == 1
    return (x.expand(2, -1) if lone else x).sum(-1, keepdim=True)[: x.shape[0]]


def _compiles_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_dynamo_compiling() and x.device.type == "cpu"


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
) -> TokenStats:
    """Define `fastrlhf.token_stats` by `log_softmax` and `gather`; differentiable to any order.

    A row of nothing but -inf has no distribution: log-prob and lse -inf, entropy 0, gradient 0.
    """
    return public_stats(
        differentiable_stats(
            logits, targets, temperature=temperature, softcap=softcap, scale=scale,
            ignore_index=ignore_index, entropy=entropy, entropy_grad=entropy_grad,
            with_stats=with_stats,
        )
    )  # fmt: skip


def public_stats(stats: TokenStats) -> TokenStats:
    """Leave a gradient to log-prob and entropy alone, as those who are given statistics know it."""
    named = {name: x for name, x in stats._asdict().items() if x is not None}
    further = {name: named[name].detach() for name in FURTHER_STATS if name in named}
    return stats_tuple(stats.logprob, stats.entropy, stats.lse.detach(), further)


def differentiable_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
) -> TokenStats:
    """Define the same statistics, of which the lse and the mean logit have a gradient too."""
    targets = targets.long()
    live = targets != ignore_index
    empty = (capped_logits(logits, softcap, scale) == -torch.inf).all(-1)
    regular = (live & ~empty).unsqueeze(-1)
    x = torch.where(regular, logits, 0.0).to(accumulation_dtype(logits.dtype))
    rows_t = (
        temperature.to(x.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    )
    capped = capped_logits(x, softcap, scale)
    log_p = F.log_softmax(capped / rows_t, dim=-1)
    lse = torch.logsumexp(capped / rows_t, dim=-1)
    index = torch.where(live, targets, 0)
    logprob = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def of_row(value: Tensor, if_empty: float) -> Tensor:
        return torch.where(live, torch.where(empty, if_empty, value), 0.0)

    row_entropy = None
    if entropy:
        # 0·ln 0 = 0, also for the derivative: a token without probability takes no part.
        finite_log_p = torch.where(log_p == -torch.inf, 0.0, log_p)
        row_entropy = of_row(-(log_p.exp() * finite_log_p).sum(-1), 0.0)
        row_entropy = row_entropy if entropy_grad else row_entropy.detach()
    further = {}
    if "is_top1" in with_stats:
        top = capped.detach().argmax(-1)
        further["is_top1"] = (top == index) & (lse < torch.inf) & live & ~empty
    if "mean_logit" in with_stats:
        further["mean_logit"] = of_row((capped / rows_t).mean(-1), -torch.inf)
    if "log_sum_sq_probs" in with_stats:
        further["log_sum_sq_probs"] = of_row(torch.logsumexp(2 * log_p.detach(), -1), 0.0)
    return stats_tuple(of_row(logprob, -torch.inf), row_entropy, of_row(lse, -torch.inf), further)


def kept_token_stats(
    logits: Tensor,
    targets: Tensor,
    support: tuple[Tensor, Tensor],
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    with_stats: Iterable[str] = (),
) -> TokenStats:
    """Define `fastrlhf.token_stats` over kept ids by logits that are -inf everywhere else.

    Where a token keeps its target alone, log-prob and entropy are 0, whatever its logit is.
    """
    live = targets != ignore_index
    ids, offsets = support
    token = torch.repeat_interleave(offsets.diff())
    of_live = live.reshape(-1)[token]
    kept = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).view(
        -1, logits.shape[-1]
    )
    kept[token[of_live], ids[of_live].long()] = True
    kept = kept.view(logits.shape)
    counts = kept.sum(-1)
    x = torch.where(kept, logits, 0.0).to(accumulation_dtype(logits.dtype))
    capped = torch.where(kept, capped_logits(x, softcap, scale), -torch.inf)
    certain = (counts == 1).unsqueeze(-1)
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}
    names = [name for name in with_stats if name != "mean_logit"]
    found = token_stats(
        torch.where(certain, torch.where(kept, 0.0, -torch.inf), capped), targets,
        entropy=entropy, with_stats=names, **options,
    )  # fmt: skip
    lse = torch.where(certain.squeeze(-1), token_stats(capped, targets, **options).lse, found.lse)
    further = {name: getattr(found, name) for name in names}
    if "mean_logit" in with_stats:
        total = torch.where(kept, capped, 0.0).sum(-1).detach()
        further["mean_logit"] = torch.where(live, total / counts.clamp(min=1) / temperature, 0.0)
    return stats_tuple(found.logprob, found.entropy, lse, further)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> TokenStats:
    """Define `fastrlhf.linear_token_stats`: the statistics of the logits of a linear head."""
    dtype = accumulation_dtype(hidden.dtype)
    live = (targets != ignore_index).unsqueeze(-1)
    # What ignored rows hold must not reach the gradient of the weight, a sum over rows.
    logits = torch.where(live, hidden, 0.0).to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_stats(logits, targets, ignore_index=ignore_index, **options)


class RowParts(NamedTuple):
    """What columns of rows of logits say of the rows: the protocol by which splits of a row, or
    ranks that share a vocabulary, put its statistics together. Each (N,); those that were not asked
    for are empty.
    """

    peak: Tensor  # the largest logit before the temperature, as are all logits here
    rest: Tensor  # Σ e^(z - peak) over all columns but the target, z divided by the temperature
    target: Tensor  # the target's logit; -inf if it is in none of the columns
    moment: Tensor  # Σ e^(z - peak)·(z - peak) over the same columns
    before: Tensor  # the peak if it stands before the target, else anything smaller
    total: Tensor  # Σ of all logits
    squares: Tensor  # Σ e^2(z - peak) over the same columns


class RowStats(NamedTuple):
    """Statistics of rows of logits, and what their gradient takes besides, each (N,). The entropy
    and the last three are empty unless asked for.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    # The largest logit before the temperature, and lse - peak / temperature: apart, they keep the
    # accuracy that their sum loses for large logits.
    peak: Tensor
    log_norm: Tensor
    is_top1: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor

    @property
    def of_tokens(self) -> tuple[Tensor, ...]:
        """The fields of `FurtherTokenStats`, in their order."""
        return self.logprob, self.entropy, self.lse, *self[5:]


def token_stats_forward(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    entropy: bool,
    with_stats: Iterable[str] = (),
) -> RowStats:
    """Compute the statistics of (N, V) logits, none of whose rows is ignored."""
    with_stats = tuple(with_stats)
    parts = row_parts(
        logits, targets, temperature=temperature, softcap=softcap, scale=scale, entropy=entropy,
        with_stats=with_stats,
    )  # fmt: skip
    return statistics_of_parts(parts, logits.shape[-1], temperature)


def row_parts(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    entropy: bool,
    with_stats: tuple[str, ...] = (),
) -> RowParts:
    """Compute the parts of rows (N, V), V > 0, whose targets may lie outside of these columns:
    below 0 in earlier ones, from V on in later ones.
    """
    index = targets.long().unsqueeze(-1)
    rows_t = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    capped = capped_logits(logits.to(accumulation_dtype(logits.dtype)), softcap, scale)
    peak = capped.amax(-1, keepdim=True)
    terms = row_terms(capped, None, peak, index, rows_t, entropy=entropy, with_stats=with_stats)
    sums = [row_sums(x).view(-1) for x in terms]
    target, before = target_parts(capped, peak, index, with_stats)
    return named_parts(peak.view(-1), target, before, sums, entropy, with_stats)


def row_terms(
    capped: Tensor,
    columns: Tensor | None,
    peak: Tensor,
    index: Tensor,
    rows_t: float | Tensor,
    *,
    entropy: bool,
    with_stats: tuple[str, ...],
) -> Iterator[Tensor]:
    """Compute, one after the other, what is to be summed of columns (..., V) of rows whose peaks,
    targets and temperatures are (..., 1). `columns`: see `_with_target`.
    """
    if "mean_logit" in with_stats:
        yield capped
    shifted = _divide_(capped - _finite_base(peak), rows_t)
    # Without the target in it, the sum stays accurate where p(target) → 1: see
    # kernels/token_stats.py.
    weight = _with_target(_exp(shifted), index, torch.zeros_like(peak), columns)
    yield weight
    if "log_sum_sq_probs" in with_stats:
        yield weight.square()
    if entropy:
        # e^-inf·(-inf) counts as 0; a finite stand-in for the exponent lets the product say so.
        yield weight.mul_(shifted.clamp_(min=torch.finfo(shifted.dtype).min))


def target_parts(
    capped: Tensor, peak: Tensor, index: Tensor, with_stats: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Compute `target` and `before` of `RowParts` from rows (N, V), their peaks and targets
    (N, 1).
    """
    here, place = (index >= 0) & (index < capped.shape[-1]), index.clamp(0, capped.shape[-1] - 1)
    target = torch.where(here, capped.gather(-1, place), -torch.inf).view(-1)
    if "is_top1" not in with_stats:
        return target, target.new_empty(0)
    earlier = capped.argmax(-1, keepdim=True) < index
    return target, torch.where(earlier, peak, -torch.inf).view(-1)


def named_parts(
    peak: Tensor,
    target: Tensor,
    before: Tensor,
    sums: list[Tensor],
    entropy: bool,
    with_stats: tuple[str, ...],
) -> RowParts:
    """Give names to the sums (N,) of what `row_terms` computes."""
    of_terms, nothing = iter(sums), peak.new_empty(0)
    total = next(of_terms) if "mean_logit" in with_stats else nothing
    rest = next(of_terms)
    squares = next(of_terms) if "log_sum_sq_probs" in with_stats else nothing
    moment = next(of_terms) if entropy else nothing
    return RowParts(peak, rest, target, moment, before, total, squares)


def _with_target(rows: Tensor, index: Tensor, value: Tensor, columns: Tensor | None) -> Tensor:
    """Put a value (N, 1) where the target (N, 1) of rows (N, V) is, if it is in these columns.

    In place; or, where a compiler makes one loop of this and all around it, by a comparison with
    the numbers of the columns (V,) int32, which it would otherwise compute one by one.
    """
    if columns is not None:
        here_or_nowhere = index.clamp(-1, torch.iinfo(columns.dtype).max).to(columns.dtype)
        return torch.where(columns == here_or_nowhere, value, rows)
    here, place = (index >= 0) & (index < rows.shape[-1]), index.clamp(0, rows.shape[-1] - 1)
    return rows.scatter_(-1, place, torch.where(here, value, rows.gather(-1, place)))


def merged_peaks(peaks: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """The peak (N,) of rows of which W runs of columns have peaks (W, N), and by how much to shift
    the exponents of sums that are relative to those.
    """
    peak = peaks.amax(0)
    return peak, (peaks - _finite_base(peak)) / temperature


def merged_parts(parts: RowParts, temperature: float | Tensor) -> RowParts:
    """Merge the parts (W, N) of W runs of columns, in their order, to those of all of them."""
    peak, shift = merged_peaks(parts.peak, temperature)
    fade = shift.exp()
    held = parts.target != -torch.inf  # NaN included
    target = torch.where(held, parts.target, 0.0).sum(0)
    moment, before, total, squares = parts[3:]
    if moment.numel():
        # A sum that fades to nothing (an empty one has peak -inf) must not meet inf·0.
        moment = moment + parts.rest * torch.where(fade > 0, shift, 0.0)
        moment = torch.where(fade > 0, moment * fade, fade).sum(0)
    return RowParts(
        peak, (parts.rest * fade).sum(0), torch.where(held.any(0), target, -torch.inf), moment,
        before.amax(0) if before.numel() else before[:0].view(-1),
        total.sum(0) if total.numel() else total[:0].view(-1),
        (squares * fade.square()).sum(0) if squares.numel() else squares[:0].view(-1),
    )  # fmt: skip


def statistics_of_parts(
    parts: RowParts, vocab: int | Tensor, temperature: float | Tensor
) -> RowStats:
    """Compute what `token_stats_forward` returns from the parts of whole rows, V columns each."""
    peak, rest, target, moment, before, total, squares = parts
    empty, base = peak == -torch.inf, _finite_base(peak)
    target_shifted = _divide_(target - base, temperature)
    target_weight = target_shifted.exp()
    logprob = F.logsigmoid(target_shifted - rest.log())
    norm = rest + target_weight
    log_norm = norm.log()
    lse = base / temperature + log_norm
    is_top1 = peak.new_empty(0, dtype=torch.bool)
    row_entropy, mean_logit, log_squares = (peak.new_empty(0) for _ in range(3))
    if before.numel():
        is_top1 = (target == peak) & ~(before == peak) & ~log_norm.isnan() & ~empty
    if total.numel():
        mean_logit = total / vocab / temperature
    if squares.numel():
        log_squares = _log_sum_squares(squares, target_weight, logprob, log_norm)
        log_squares = torch.where(empty, 0.0, log_squares)
    if moment.numel():
        moment = moment + torch.where(target_weight > 0, target_weight * target_shifted, 0.0)
        row_entropy = torch.where(empty, 0.0, log_norm - moment / norm)
    logprob = torch.where(empty, -torch.inf, logprob)
    return RowStats(
        logprob, row_entropy, lse, peak, log_norm, is_top1, mean_logit, log_squares
    )  # fmt: skip


def _finite_base(peak: Tensor) -> Tensor:
    """The peak, or 0 where there is nothing but -inf: any finite base then gives e^-inf = 0."""
    return torch.where(peak == -torch.inf, 0.0, peak)


def _log_sum_squares(
    squares: Tensor, target_weight: Tensor, logprob: Tensor, log_norm: Tensor
) -> Tensor:
    """Compute ln Σ p², given Σ e^2(z - peak) without the target's, e^(z_target - peak), its ln p,
    and the ln of the sum of all e^(z - peak).

    From the log-prob where the target weighs as much as the peak or nearly, for that is accurate
    where p → 1.
    """
    square = target_weight.square()
    heavy = square > 0.25
    of_heavy = 2 * logprob + torch.log1p(squares / torch.where(heavy, square, 1.0))
    return torch.where(heavy, of_heavy, (squares + square).log() - 2 * log_norm)


def _exp(x: Tensor) -> Tensor:
    """e^x, of which sums are made: as a power of 2, with an error of |x| roundings, where the
    compiler would put an exponential that is used twice into memory in between.
    """
    return torch.exp2(x * math.log2(math.e)) if _compiles_for_cpu(x) else x.exp()


class RowSlopes(NamedTuple):
    """What the gradient of a row's logits is made of, (N,) each: by p⊙others, by p⊙(ln p + H),
    which the entropy wants, the target's own entry, and what all columns get alike.
    """

    others: Tensor
    target: Tensor
    entropy: Tensor | None = None
    mean: Tensor | None = None


def row_slopes(
    logprob: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None = None,
    d_lse: Tensor | None = None,
    d_mean: Tensor | None = None,
    *,
    columns: int | Tensor,
) -> RowSlopes:
    """Turn the gradients of the statistics (N,) into those slopes, for rows of so many columns."""
    # g·(1 - p) at the target, accurate where p is nearly 1.
    others, target = -d_logprob, -d_logprob * torch.expm1(logprob)
    if d_lse is not None:
        others, target = d_lse - d_logprob, target + d_lse * logprob.exp()
    return RowSlopes(others, target, d_entropy, None if d_mean is None else d_mean / columns)


def token_stats_backward(
    logits: Tensor,
    targets: Tensor,
    stats: tuple[Tensor, ...],
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    d_lse: Tensor | None = None,
    d_mean: Tensor | None = None,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Compute d_logits (N, V) in the accumulation dtype; no row is ignored or all -inf. Targets may
    lie outside of these columns, where those are a part of the rows.

    `stats` are the logprob, entropy, peak and log_norm of the forward. With g, h, l and m the
    gradients of log-prob, entropy, lse and the mean of the effective logits z, dz = g·(e_target -
    p) - h·p⊙(ln p + H) + l·p + m/V, times dz/dlogits.
    """
    logprob, row_entropy, peak, log_norm = stats
    slopes = row_slopes(
        logprob, d_logprob, d_entropy, d_lse, d_mean, columns=logits.shape[-1]
    )  # fmt: skip
    return logits_gradient(
        logits, targets, (row_entropy, peak, log_norm), slopes,
        temperature=temperature, softcap=softcap, scale=scale,
    )  # fmt: skip


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    stats: tuple[Tensor | None, Tensor, Tensor],
    slopes: RowSlopes,
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    columns: Tensor | None = None,
) -> Tensor:
    """Compute that gradient from entropy, peak and log_norm. `columns`: see `_with_target`."""
    index = targets.long().unsqueeze(-1)
    rows_t = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    row_entropy, peak, log_norm = stats
    capped = capped_logits(logits.to(peak.dtype), softcap, scale)
    log_p = _divide_(capped - peak.unsqueeze(-1), rows_t).sub_(log_norm.unsqueeze(-1))
    surprise = None
    if slopes.entropy is not None and row_entropy is not None:
        # 0·ln 0 = 0: a finite stand-in for ln 0 lets the product say so.
        surprise = log_p.clamp(min=torch.finfo(log_p.dtype).min).add_(row_entropy.unsqueeze(-1))
        surprise.mul_(log_p.exp()).mul_(slopes.entropy.unsqueeze(-1))
    dz = log_p.exp_().mul_(slopes.others.unsqueeze(-1))
    dz = _with_target(dz, index, slopes.target.unsqueeze(-1), columns)
    if surprise is not None:
        dz.sub_(surprise)
    if slopes.mean is not None:
        dz.add_(slopes.mean.unsqueeze(-1))
    if softcap is not None:
        dz.mul_(cap_slope(logits.to(peak.dtype), softcap, scale))
    dz = _divide_(dz, rows_t)
    return dz if _is_one(scale) else dz.mul_(scale)


def _divide_(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide in place, and not at all by the number 1: a pass over the vocabulary less."""
    return x if _is_one(temperature) else x.div_(temperature)


def _divided(x: Tensor, temperature: float | Tensor) -> Tensor:
    return x if _is_one(temperature) else x / temperature


def _is_one(factor: float | Tensor) -> bool:
    """Whether it is known to be 1, which a tensor is not."""
    return isinstance(factor, (int, float)) and factor == 1


class Layout:
    """Where the tokens of each sequence stand: here in rows (B, T).

    `fastrlhf.ops.layout.Runs` is the other kind, of tokens that are packed, one sequence after the
    other.
    """

    cu_seqlens: Tensor | None = None

    def sequences(self, tokens: Tensor) -> int:
        """B."""
        return tokens.shape[0]

    def sums(self, x: Tensor) -> Tensor:
        """Sum each sequence: (B,)."""
        return x.sum(-1)

    def counts(self, mask: Tensor) -> Tensor:
        """How many tokens of the mask each sequence has: (B,) int64."""
        return (mask != 0).sum(-1)

    def total(self, x: Tensor) -> Tensor:
        """Sum all tokens: 0-d."""
        return x.sum()

    def spread(self, x: Tensor) -> Tensor:
        """Give each token the value (B,) of its sequence, in a shape that broadcasts to theirs."""
        return x.unsqueeze(-1)

    def last(self, mask: Tensor) -> Tensor:
        """Which tokens are the last of the mask in their sequence."""
        counts = mask != 0
        return counts & (counts.flip(-1).cumsum(-1).flip(-1) == 1)

    def ids(self, tokens: Tensor) -> Tensor:
        """Number of the sequence, from 0, of each token of such a tensor."""
        return torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1).expand(tokens.shape)

    def tokens(self, x: Tensor) -> Tensor:
        """Rows as they are, or all packed tokens as one: what is 2-d is of tokens, what is 1-d of
        sequences.
        """
        return x


ROWS = Layout()


def masked_sum(values: Tensor, mask: Tensor | None, layout: Layout = ROWS) -> Tensor:
    """Sum tokens of the mask, whatever the others hold, to (B,); without a mask, values are sums
    (B,).
    """
    values = values.to(accumulation_dtype(values.dtype))
    if mask is None:
        return values
    keep = mask if mask.dtype == torch.bool else mask != 0
    return layout.sums(torch.where(keep, values, 0.0))


def sequence_scores(
    policy: Tensor, reference: Tensor, mask: Tensor | None, layout: Layout = ROWS
) -> Tensor:
    """Compute s (B,) = Σ(ln π - ln π_ref); the reference may be summed already."""
    # Converted before the sum, which otherwise would round what it then claims to know.
    dtype = accumulation_dtype(torch.promote_types(policy.dtype, reference.dtype))
    policy, reference = policy.to(dtype), reference.to(dtype)
    if mask is not None and reference.ndim == 2:
        return masked_sum(policy - reference, mask, layout)
    return masked_sum(policy, mask, layout) - masked_sum(reference, None)


def sequence_lengths(
    mask: Tensor | None, lengths: Tensor | None, dtype: torch.dtype, layout: Layout = ROWS
) -> Tensor:
    """Tokens of each sequence (B,), at least 1, from the mask if there is one."""
    counts = layout.counts(mask) if mask is not None else lengths
    assert counts is not None
    return counts.to(dtype).clamp(min=1)


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute (1-ε)·ℓ(βΔ) + ε·ℓ(-βΔ), ℓ = -ln σ: DPO, 2305.18290 Eq. 7; with ε, cDPO."""
    d = beta * margin
    clean = -(1 - label_smoothing) * log_sigmoid(d)
    # An infinite margin is legal as long as nothing is said to be flipped: 0·inf would be NaN.
    return clean - label_smoothing * log_sigmoid(-d) if label_smoothing > 0 else clean


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute [(1-ε)·ℓ(βΔ) - ε·ℓ(-βΔ)] / (1-2ε), unbiased under label noise ε: 2403.00409."""
    d = beta * margin
    clean = -(1 - label_smoothing) * log_sigmoid(d)
    noisy = clean + label_smoothing * log_sigmoid(-d) if label_smoothing > 0 else clean
    return noisy / (1 - 2 * label_smoothing)


def hinge_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute max(0, 1 - βΔ): SLiC, 2305.10425."""
    return torch.relu(1 - beta * margin)


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute (Δ - 1/(2β))², Δ of averages over tokens: IPO, 2310.12036 Eq. 17."""
    return (margin - 0.5 / beta).square()


class MarginLoss(NamedTuple):
    """A loss of the margin Δ between two sequences: its formula here, its name in the kernel, its
    Δ.
    """

    formula: Callable[[Tensor, float, float], Tensor]
    kernel: str
    average: bool = False  # Δ of scores averaged over tokens, not summed
    smoothed: bool = False  # label smoothing has a meaning


MARGIN_LOSSES = {
    "sigmoid": MarginLoss(sigmoid_loss, "sigmoid", smoothed=True),
    "robust": MarginLoss(robust_loss, "robust", smoothed=True),
    "hinge": MarginLoss(hinge_loss, "hinge"),
    "ipo": MarginLoss(ipo_loss, "ipo", average=True),
    "sigmoid_norm": MarginLoss(sigmoid_loss, "sigmoid", average=True),
}


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    layout: Layout = ROWS,
) -> tuple[Tensor, Tensor]:
    """Compute a margin loss of each pair (P,), and the rewards β·s (B,), from sums or masked token
    log-probs.
    """
    loss = MARGIN_LOSSES[loss_type]
    scores = sequence_scores(policy, reference, mask, layout)
    comparable = scores
    if loss.average:
        comparable = scores / sequence_lengths(mask, lengths, scores.dtype, layout)
    margin = comparable[chosen.long()] - comparable[rejected.long()]
    smoothing = label_smoothing if loss.smoothed else 0.0
    return loss.formula(margin, beta, smoothing), (beta * scores).detach()


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns (B, T) of the tokens of the mask, 0 elsewhere: 1506.02438
    Eq. 16. λ may be (B,), and so may be the values after the end, which are 0 otherwise.
    """
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    nothing = values.new_zeros(values.shape[0])
    after_the_end = nothing if last_values is None else last_values.to(dtype)
    everywhere, *_ = advantages_backwards(
        rewards, values, keep, after_the_end, nothing, gamma=gamma, decay=decay(gamma, lam, dtype)
    )
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values


def decay(gamma: float, lam: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Compute γλ, of all sequences or of each (B,)."""
    return gamma * lam.to(dtype) if isinstance(lam, Tensor) else gamma * lam


def advantages_backwards(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    next_value: Tensor,
    next_advantage: Tensor,
    *,
    gamma: float | Tensor,
    decay: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute advantages (B, T), garbage where `keep` is not, from the value and advantage (B,) of
    the token that follows; and those of the first token, for what comes before it.
    """
    found = []
    from_the_end = (reversed(x.unbind(1)) for x in (rewards, values, keep))
    for reward, value, counts in zip(*from_the_end, strict=True):
        delta = reward + gamma * next_value - value
        advantage = delta + decay * next_advantage
        # A token that does not count is passed over: what follows it follows the one before it.
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, value, next_value)
        found.append(advantage)
    everywhere = torch.stack(found[::-1], 1) if found else torch.zeros_like(values)
    return everywhere, next_value, next_advantage


def packed_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    ids: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `gae` does of sequences that follow each other, from vectors (N,) of tokens and
    the ids of their sequences.

    The recurrence is affine in the advantage of the next token, and so are compositions of such
    steps: in log2(N) of them each token has composed all that follow in its sequence.
    """
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    # Of the nearest token that counts, from each on; of one that does not, what follows it.
    found, nearest = suffix_scan(_nearest, (keep, values), ids)
    follows = torch.nn.functional.pad(ids[1:] == ids[:-1], (0, 1)) if len(ids) else keep
    after_the_end = values.new_zeros(()) if last_values is None else last_values.to(dtype)[ids]
    next_value = torch.where(follows & found.roll(-1), nearest.roll(-1), after_the_end)
    delta = torch.where(keep, rewards + gamma * next_value - values, 0.0)
    factor = decay(gamma, lam, dtype)
    factors = factor[ids] if isinstance(factor, Tensor) else delta.new_full((), factor)
    everywhere = suffix_scan(_compose, (torch.where(keep, factors, 1.0), delta), ids)[1]
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values


Pair = tuple[Tensor, Tensor]


def _nearest(near: Pair, far: Pair) -> Pair:
    """Of two values, that of the token nearer to the start, if it counts."""
    return near[0] | far[0], torch.where(near[0], near[1], far[1])


def _compose(near: Pair, far: Pair) -> Pair:
    """Apply the far one of two affine functions first."""
    return near[0] * far[0], near[1] + near[0] * far[1]


def suffix_scan(combine: Callable[[Pair, Pair], Pair], pair: Pair, ids: Tensor) -> Pair:
    """Combine each pair of values (N,) with those that follow in its sequence, by doubling: after
    k steps each has combined 2^k.
    """
    step = 1
    while step < len(ids):
        same = ids[step:] == ids[:-step]
        joined = combine((pair[0][:-step], pair[1][:-step]), (pair[0][step:], pair[1][step:]))
        first, second = (
            torch.cat((torch.where(same, new, old[:-step]), old[-step:]))
            for new, old in zip(joined, pair, strict=True)
        )
        pair = first, second
        step *= 2
    return pair


def log_probs(
    logits: Tensor, temperature: float | Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute ln p (..., V) of the effective logits, and which rows (...) are nothing but -inf:
    those have no distribution, and a uniform one stands in.
    """
    z = capped_logits(logits.to(accumulation_dtype(logits.dtype)), softcap, scale)
    rows_t = (
        temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    )
    z = z if isinstance(rows_t, float) and rows_t == 1.0 else z / rows_t
    empty = z.amax(-1) == -torch.inf
    return F.log_softmax(torch.where(empty.unsqueeze(-1), 0.0, z), dim=-1), empty


def of_live_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Put 0 into the rows (..., V) where the mask (...) is, whatever they hold; None keeps all."""
    return x if mask is None else torch.where((mask != 0).unsqueeze(-1), x, 0.0)


class Distribution(NamedTuple):
    """Softmax of rows of logits, in parts whose differences keep the accuracy of the logits."""

    z: Tensor  # (..., V) effective logits but for the temperature
    peak: Tensor  # (..., 1) the largest, a constant
    log_norm: Tensor  # (..., 1) log-sum-exp of (z - peak) / temperature
    p: Tensor  # (..., V)
    empty: Tensor  # (...) nothing but -inf: there is no distribution, and p is 0


# Peak and log_norm (...) of whole rows, of which there are only some columns.
Norm = tuple[Tensor, Tensor]


def distribution(
    logits: Tensor,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    norm: Norm | None = None,
) -> Distribution:
    """Compute the softmax of the effective logits; the temperature is a number or (..., 1)."""
    z = capped_logits(logits.to(accumulation_dtype(logits.dtype)), softcap, scale)
    peak = z.detach().amax(-1, keepdim=True) if norm is None else norm[0].unsqueeze(-1)
    empty = peak == -torch.inf
    peak = torch.where(empty, 0.0, peak)
    shifted = _divided(z - peak, temperature)
    if norm is None:
        weight = shifted.exp()
        total = torch.where(empty, 1.0, row_sums(weight))
        log_norm, p = total.log(), weight * (1 / total)
    else:
        log_norm = torch.where(empty, 0.0, norm[1].unsqueeze(-1))
        p = (shifted - log_norm).exp()
    return Distribution(z, peak, log_norm, p, empty.squeeze(-1))


def log_ratio(p: Distribution, q: Distribution, temperature: float | Tensor) -> Tensor:
    """Compute ln p - ln q (..., V) from the differences of the logits.

    Those of nearly equal logits are exact, and would not be once something else is subtracted. But
    sides that are far apart as a whole, which changes no distribution, are taken from their peaks.
    """
    far = (p.peak - q.peak).abs() > 1
    anchor_p, anchor_q = (torch.where(far, side.peak, 0.0) for side in (p, q))
    apart = (p.peak - anchor_p) - (q.peak - anchor_q)
    differences = (p.z - anchor_p) - (q.z - anchor_q)
    norms = p.log_norm - q.log_norm
    return _divided(differences, temperature) - (_divided(apart, temperature) + norms)


def expm1(x: Tensor) -> Tensor:
    """Compute e^x - 1, with the derivative e^x: PyTorch's, one more than the value, is 0 where that
    is nearly -1.
    """
    near = x > -0.5
    far = torch.exp(torch.where(near, 0.0, x)) - 1
    return torch.where(near, torch.expm1(torch.where(near, x, 0.0)), far)


def expm1_minus(x: Tensor) -> Tensor:
    """Compute e^x - 1 - x, whose leading term x²/2 would drown in the rounding of e^x - 1."""
    near = x.abs() < 1
    return torch.where(near, _expm1_minus_by_series(x, near), torch.exp(x) - 1 - x)


def _expm1_minus_by_series(x: Tensor, near: Tensor) -> Tensor:
    """Compute e^x - 1 - x where |x| < 1, as x²/2 times Σ 2 x^k / (k + 2)!; 0 elsewhere."""
    small = torch.where(near, x, 0.0)
    terms = 18 if x.dtype == torch.float64 else 10
    series = torch.full_like(x, 2 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series * small + 2 / math.factorial(k)
    return small * small * 0.5 * series


def kl_terms(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Compute q - p + p·w with w = ln p - ln q: what a token adds to KL(p‖q), never negative.

    The sum of q - p is 0. Of p·w alone, the sum over nearly equal distributions is a small
    difference of large numbers. inf where q alone is 0, q where p is.
    """
    near = w.abs() < 1
    far = q - p + p * torch.where(p == 0, 0.0, w)
    return torch.where(near, p * _expm1_minus_by_series(-w, near), far)


def log_to_mixture(gap: Tensor, share: float | Tensor, share_other: float | Tensor) -> Tensor:
    """Compute ln m - ln p, m = share·p + share_other·q, from the gap ln q - ln p."""
    # m / p - 1, which has its relative accuracy however small a share is, where it does not end.
    small = gap < 40
    near, moderate = gap.abs() < 1, torch.where(small, gap, 0.0)
    # The compiler's own expm1 is e^x - 1.
    by_series = _expm1_minus_by_series(gap, near) + torch.where(near, gap, 0.0)
    excess = share_other * torch.where(near, by_series, torch.exp(moderate) - 1)
    small = small & (excess > -0.5)
    # By way of the larger of the two.
    smaller, more = torch.exp(-gap.abs()), gap > 0
    mixed = torch.where(more, share_other + share * smaller, share + share_other * smaller)
    by_the_larger = torch.where(more, gap, 0.0) + mixed.log()
    return torch.where(small, torch.log1p(torch.where(small, excess, 0.0)), by_the_larger)


class Shares(NamedTuple):
    """Of q and of p in a mixture: both, for in fp32 the one is not 1 minus the other."""

    q: float | Tensor
    p: float | Tensor


def _shares(share: float | Shares) -> Shares:
    return share if isinstance(share, Shares) else Shares(share, 1 - share)


def jsd_terms(p: Tensor, q: Tensor, w: Tensor, share: float | Shares) -> Tensor:
    """Compute (1-share)·p·ln(p/m) + share·q·ln(q/m), with share of q in the mixture m and
    w = ln p - ln q: what a token adds to the JSD, never negative.
    """
    w = torch.where((p == 0) & (q == 0), 0.0, w)
    of = _shares(share)
    return of.p * mixture_terms(p, -w, of.p, of.q) + of.q * mixture_terms(q, w, of.q, of.p)


def mixture_terms(
    own: Tensor, gap: Tensor, share: float | Tensor, share_other: float | Tensor
) -> Tensor:
    """Compute m - own + own·ln(own/m), from the gap ln other - ln own: what a token adds to
    KL(own‖m), never negative; but own·ln(own/m) alone where the gap is large, and m - own, whose
    sum weighted by the shares is 0, does not matter. 0 where own is.
    """
    to_mixture = torch.where(own == 0, 0.0, log_to_mixture(gap, share, share_other))
    near = gap.abs() < 0.5
    small = torch.where(near, to_mixture, 0.0)
    return own * torch.where(near, _expm1_minus_by_series(small, near), -to_mixture)


@torch.no_grad()
def surplus(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Compute Σ(q - p) (...) with w = ln p - ln q: what the rounding of the normalisers makes of
    0.
    """
    near = w.abs() < 1
    difference = torch.where(near, p * (_expm1_minus_by_series(-w, near) - w), q - p)
    return row_sums(difference).squeeze(-1)


def divergence(
    logits_p: Tensor,
    logits_q: Tensor,
    mask: Tensor | None,
    *,
    share: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Compute KL(p‖q) of each row (...), or with a share of q in a mixture m their JSD, which is
    share·KL(q‖m) + (1-share)·KL(p‖m); 0 where the mask is.
    """
    sides = (of_live_rows(x, mask) for x in (logits_p, logits_q))
    value, *_ = divergence_and_stats(
        *sides, share=share, temperature=temperature, softcap=softcap, scale=scale
    )
    return value if mask is None else torch.where(mask != 0, value, 0.0)


def of_sums_of_terms(
    value: Tensor,
    excess: Tensor,
    p_is_empty: Tensor,
    q_is_empty: Tensor,
    share: float | Shares | None,
) -> Tensor:
    """Finish divergences (...), given the sums of their terms and those of q - p."""
    # A surplus s of q, which is rounding, adds s²/2 to the KL, as much as there is to one of 1e-13.
    curvature = 1.0 if share is None else _shares(share).q * _shares(share).p
    rounding = 0.5 * curvature * excess.square()
    value = value - torch.minimum(rounding, value).detach()
    # A row of nothing but -inf has no distribution, and so is no distance away from another; but
    # where q is such a row, and p is not, q is 0 where p is not.
    if_q_is_empty = torch.inf if share is None else 0.0
    return torch.where(p_is_empty, 0.0, torch.where(q_is_empty, if_q_is_empty, value))


def divergence_and_stats(
    logits_p: Tensor,
    logits_q: Tensor,
    *,
    share: float | Shares | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
) -> tuple[Tensor, ...]:
    """Compute the divergence of rows (..., V), none of them masked, and after it the six `stats`
    that `divergence_backward` takes, each (...).
    """
    dtype = accumulation_dtype(torch.promote_types(logits_p.dtype, logits_q.dtype))
    rows_t = _of_rows(temperature, dtype)
    p, q = (distribution(x.to(dtype), rows_t, softcap, scale) for x in (logits_p, logits_q))
    return divergence_of_sums(_sums(p, q, rows_t, share), (*_norm_of(p), *_norm_of(q)), share)


def divergence_of_sums(
    sums: tuple[Tensor, ...], norms: tuple[Tensor, ...], share: float | Shares | None
) -> tuple[Tensor, ...]:
    """Compute that from `divergence_sums` of whole rows, and peak and log_norm of p and of q."""
    terms, excess, mean_p, mean_q = sums
    p_is_empty, q_is_empty = (peak == -torch.inf for peak in norms[::2])
    values = of_sums_of_terms(terms, excess, p_is_empty, q_is_empty, share)
    return values, *norms, mean_p, mean_q


def log_ratio_terms(
    z_p: Tensor, z_q: Tensor, peak_p: Tensor, peak_q: Tensor, rows_t: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute, of columns (..., V) of rows whose peaks and temperatures are (..., 1), what is to be
    summed for the norms of p and q and for E_p[ln p - ln q].
    """
    shifted_p, shifted_q = (
        _divided(z - _finite_base(peak), rows_t) for z, peak in ((z_p, peak_p), (z_q, peak_q))
    )
    weight = _exp(shifted_p)
    # A token that p rules out takes no part, whatever q makes of it.
    return weight, _exp(shifted_q), weight * torch.where(weight == 0, 0.0, shifted_p - shifted_q)


def log_ratio_of_sums(
    peak_p: Tensor, peak_q: Tensor, total_p: Tensor, total_q: Tensor, moment: Tensor
) -> tuple[Tensor, ...]:
    """Compute from those sums (N,) peak and log_norm of p and of q, and E_p[ln p - ln q], which is
    KL(p‖q), but with an error of the size of the log-ratios.
    """
    log_p, log_q = total_p.log(), total_q.log()
    return peak_p, log_p, peak_q, log_q, moment / total_p - (log_p - log_q)


def row_norm(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
) -> Norm:
    """Compute peak and log_norm (N,) of rows (N, V)."""
    rows_t = _of_rows(temperature, accumulation_dtype(logits.dtype))
    return _norm_of(distribution(logits, rows_t, softcap, scale))


def _norm_of(side: Distribution) -> Norm:
    return torch.where(side.empty, -torch.inf, side.peak.squeeze(-1)), side.log_norm.squeeze(-1)


def divergence_sums(
    logits_p: Tensor,
    logits_q: Tensor,
    norms: tuple[Norm, Norm],
    *,
    share: float | Shares | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the sums of terms and of q - p, and the mean log-ratios of p and of q, each (N,), of
    some columns (N, V) of rows whose norms are known.
    """
    dtype = norms[0][0].dtype
    rows_t = _of_rows(temperature, dtype)
    p, q = (
        distribution(x.to(dtype), rows_t, softcap, scale, norm)
        for x, norm in zip((logits_p, logits_q), norms, strict=True)
    )
    return _sums(p, q, rows_t, share)


def _sums(
    p: Distribution, q: Distribution, rows_t: float | Tensor, share: float | Shares | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `divergence_sums` computes."""
    w = log_ratio(p, q, rows_t)
    excess = surplus(p.p, q.p, w)
    if share is None:
        value = row_sums(kl_terms(p.p, q.p, w)).squeeze(-1)
        # The terms are q - p + p·w. The gradient with respect to q takes no mean.
        return value, excess, value - excess, value - excess
    value = row_sums(jsd_terms(p.p, q.p, w, share)).squeeze(-1)
    mean_p, mean_q = (
        row_sums(own.p * _ratio(own, ratio, of_p, share)[1]).squeeze(-1)
        for own, ratio, of_p in ((p, w, True), (q, -w, False))
    )
    return value, excess, mean_p, mean_q


def _ratio(
    own: Distribution, w: Tensor, of_p: bool, share: float | Shares | None
) -> tuple[float | Tensor, Tensor]:
    """The share of a side in the divergence, and its log-ratio to the other, which is w, or to the
    mixture: 0 where it has no probability and takes no part.
    """
    part: float | Tensor = 1.0
    if share is not None:
        of = _shares(share)
        part, other = (of.p, of.q) if of_p else (of.q, of.p)
        w = -log_to_mixture(-w, part, other)
    return part, torch.where(own.p == 0, 0.0, w)


def _of_rows(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The number, or the temperatures (...) of rows as (..., 1)."""
    return temperature.to(dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def divergence_backward(
    own: Tensor,
    other: Tensor,
    d_values: Tensor,
    *,
    of_p: bool,
    share: float | Shares | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    stats: Tensor | tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Compute the gradient of the divergence of rows (N, V) with respect to one side, in the dtype
    of d_values (N,); no row is masked. `stats` (6, N), which are needed where these are some
    columns of rows, are peak and log_norm of p and of q, and the mean log-ratio of each.

    With w the log-ratio of the own side p to the other side, or to the mixture, dz = p⊙(w - E_p[w])
    (times the share of the own side in the mixture); of q in KL(p‖q), dz = q - p. Times
    dz/dlogits.
    """
    rows_t = _of_rows(temperature, d_values.dtype)
    of_own, of_other, mean = None, None, None
    if stats is not None:
        norms = (stats[0], stats[1]), (stats[2], stats[3])
        of_own, of_other = norms if of_p else norms[::-1]
        mean = stats[4 if of_p else 5].unsqueeze(-1)
    p = distribution(own.to(d_values.dtype), rows_t, softcap, scale, of_own)
    q = distribution(other.to(d_values.dtype), rows_t, softcap, scale, of_other)
    if share is None and not of_p:
        dz = p.p - q.p
    else:
        part, w = _ratio(p, log_ratio(p, q, rows_t), of_p, share)
        dz = part * p.p * (w - (row_sums(p.p * w) if mean is None else mean))
    dz = torch.where((p.empty | q.empty).unsqueeze(-1), 0.0, dz * d_values.unsqueeze(-1))
    if softcap is not None:
        dz = dz * cap_slope(own.to(dz.dtype), softcap, scale)
    return _divide_(dz, rows_t) * scale


def fisher_product(
    logits: Tensor, tangent: Tensor, mask: Tensor | None, *, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Compute p⊙(u - E_p[u])/T² (..., V) and Var_p(u)/T² (...), 0 where the mask is."""
    dtype = accumulation_dtype(torch.promote_types(logits.dtype, tangent.dtype))
    rows_t = _of_rows(temperature, dtype)
    z, u = (of_live_rows(x, mask).to(dtype) for x in (logits, tangent))
    peak = z.detach().amax(-1, keepdim=True)
    weight = fisher_weight(z, peak, rows_t)
    total, moment = row_sums(weight), row_sums(fisher_moment(weight, u))
    product, centred = fisher_product_of_sums(weight, u, rows_t, total, moment)
    return product, row_sums(product * centred).squeeze(-1)


def fisher_weight(z: Tensor, peak: Tensor, rows_t: float | Tensor) -> Tensor:
    """Compute e^((z - peak)/T) of columns (..., V) of rows whose peaks and temperatures are
    (..., 1).
    """
    return _exp(_divided(z - _finite_base(peak), rows_t))


def fisher_moment(weight: Tensor, u: Tensor) -> Tensor:
    """Compute what E_p[u] is the sum of, but for the norm of p."""
    return weight * where_likely(weight, u)


def fisher_product_of_sums(
    weight: Tensor, u: Tensor, rows_t: float | Tensor, total: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the product (..., V), given the sums (..., 1) of weights and moments, and u - E_p[u]:
    the quadratic form is the sum of the product of both.
    """
    share = 1 / torch.where(total == 0, 1.0, total)
    centred = where_likely(weight, u) - moment * share
    product = weight * share * centred
    product = product if _is_one(rows_t) else product / rows_t**2
    return product, centred


def where_likely(weight: Tensor, u: Tensor) -> Tensor:
    """A token without probability takes no part, whatever its tangent is."""
    return torch.where(weight == 0, 0.0, u)
