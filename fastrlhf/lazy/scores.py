"""Statistics of the logits of tokens: log-probs, log-sum-exp, entropies, divergences, ...

`endings` and `losses` call these functions. They ask a scorer of the source (`Source.scorer`),
which scores tokens without holding all their logits. Results are differentiable with respect to
what entered the head, unless a docstring says otherwise.

Dims: U hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrlhf.hf.scored_divergence import scored_divergence
from fastrlhf.losses.cross_entropy import cross_entropies, summed_cross_entropy
from fastrlhf.losses.cross_entropy_options import CrossEntropy
from fastrlhf.ops.kept_logits import KeptRows, kept_logits
from fastrlhf.ops.linear_precision import exact, matmul_dtype
from fastrlhf.ops.scorer import LinearScorer, Scorer
from fastrlhf.reference import TokenStats, accumulation_dtype, capped_logits

from .meaning import Distribution, OfSource

_OF_TWO = 4  # how much more than log-probs a divergence holds: both logits, and its terms
IGNORED = -(2**30)  # not the id of any word, and within int32


def _scorer_and_targets(
    of: Distribution, targets: Tensor
) -> tuple[Scorer, Tensor, Callable[..., Tensor]]:
    """A scorer of the tokens of a distribution, the targets in the order of its tokens, and a
    function that brings its results into the shape of `targets`.

    targets: in the shape of the tokens, or (..., k), for several of each token.
    """
    rows, temperature = of.rows.numbers, of.temperature
    if targets.ndim > rows.ndim:
        rows = rows.unsqueeze(-1).expand_as(targets)
        temperature = None if temperature is None else temperature.unsqueeze(-1)
    if temperature is not None:
        temperature = temperature.expand_as(targets).reshape(-1)
    flat = rows.reshape(-1)
    if not of.rows.distinct or rows is not of.rows.numbers:
        scorer = of.source.scorer(of, temperature=temperature, rows=flat)
        return scorer, targets.reshape(-1), lambda values: values.view(targets.shape)
    # Each hidden state is scored as one token. One that no token has is ignored and costs nothing.
    whole = targets.new_full((of.source.tokens,), IGNORED)
    whole[flat] = targets.reshape(-1)
    if temperature is not None:
        temperature = temperature.new_ones(of.source.tokens).index_put((flat,), temperature)
    scorer = of.source.scorer(of, temperature=temperature)
    return scorer, whole, lambda values: values[flat].view(targets.shape)


@dataclass
class Known:
    """Statistics of tokens with some targets, in the inner graph or without one."""

    of: OfSource
    targets: Tensor
    stats: TokenStats
    entropy_grad: bool
    may_be_ruled_out: bool  # whether a target may be a word whose offset is -inf
    with_gradient: Tensor | None = None  # the lse with its gradient, once it is asked for

    def serves(self, of: OfSource, *, entropy_grad: bool) -> bool:
        """Whether these answer a question that depends on no target, whether it is for values only
        or, in grad mode, for gradients too.
        """
        in_graph = self.stats.logprob.requires_grad or not torch.is_grad_enabled()
        enough = self.entropy_grad or not entropy_grad
        return in_graph and enough and not self.may_be_ruled_out and self.of == of

    def without_graph(self) -> Known:
        of_tokens: Any = (None if x is None else x.detach() for x in self.stats)
        return replace(self, stats=TokenStats(*of_tokens), with_gradient=None)

    def lse(self, of: Distribution) -> Tensor:
        """The log-sum-exp, of a head that is a matrix. Its gradient is computed as that of
        z - ln p for the target, which equals the lse whatever the word.
        """
        if not self.stats.logprob.requires_grad:
            return self.stats.lse
        if self.with_gradient is None:
            slope = picked(of.flat(), self.targets.reshape(-1)) - self.stats.logprob
            self.with_gradient = self.stats.lse + (slope - slope.detach())
        return self.with_gradient


def _stats(of: Distribution, targets: Tensor | None = None, *, entropy_grad: bool = False) -> Known:
    """Statistics of the tokens, in one dimension, with these targets or, if None, with any.

    All that is asked of one distribution is found in one pass, and has one backward: the value of
    the entropy never costs a matmul of its own, and where the head is trained, nor does its
    gradient.
    """
    source, of = of.source, of.flat()
    # Compared as if a gradient went back, since a value is the same whether one does or not.
    asked = of.with_gradient(True).of_source()
    may_be_ruled_out = of.offset is not None and targets is not None
    if targets is None:
        for known in source.known:
            if known.serves(asked, entropy_grad=entropy_grad):
                return known if torch.is_grad_enabled() else known.without_graph()
        targets = _some_word(of)
    entropy_grad = entropy_grad or source.head_is_trained
    scorer, laid_out, taken = _scorer_and_targets(of, targets.reshape(-1))
    stats = scorer.stats(laid_out, ignore_index=IGNORED, entropy=True, entropy_grad=entropy_grad)
    of_tokens: Any = (None if x is None else taken(x) for x in stats)
    known = Known(asked, targets, TokenStats(*of_tokens), entropy_grad, may_be_ruled_out)
    source.known.append(known)
    return known


def _whole(of: Distribution) -> tuple[Distribution, Tensor | None]:
    """The distribution to compute statistics of, and the places of these tokens in it, or None
    where it has just these tokens.

    A loop that scales each part in its own way has no use for statistics of the whole: once
    statistics of the whole were computed with another scale, a part is computed alone.
    """
    if of.part_of is None:
        return of, None
    asked = of.part_of[0].with_gradient(True).of_source()
    same_rows = [known.of for known in of.source.known if known.of.rows.same_as(asked.rows)]
    if same_rows and asked not in same_rows:
        return of._replace(part_of=None), None
    return of.part_of


def _of_places(of_whole: Tensor, of: Distribution, places: Tensor | None) -> Tensor:
    """Statistics of these tokens, from those of the whole, which are in one dimension."""
    return of_whole.view(of.rows.numbers.shape) if places is None else of_whole[places]


def logprobs(of: Distribution, targets: Tensor) -> Tensor:
    """The log-probs of targets: in the shape of the tokens, or (..., k)."""
    if of.part_of is not None and is_linear(of):
        lse = log_sum_exp(of)
        return picked(of, targets) - (lse if targets.ndim == lse.ndim else lse.unsqueeze(-1))
    if targets.ndim > of.rows.numbers.ndim:
        scorer, laid_out, taken = _scorer_and_targets(of, targets)
        return taken(scorer.stats(laid_out, ignore_index=IGNORED, lse=False).logprob)
    return _stats(of, targets).stats.logprob.view(targets.shape)


def picked(of: Distribution, targets: Tensor) -> Tensor:
    """The logits of the targets, by products with a few rows of a head that is a matrix."""
    scorer = of.source.scorer(of)
    assert isinstance(scorer, LinearScorer)
    rows, temperature = of.rows.numbers, of.temperature
    if targets.ndim > rows.ndim:
        rows = rows.unsqueeze(-1).expand_as(targets)
        temperature = None if temperature is None else temperature.unsqueeze(-1)
    ids, dtype = targets.reshape(-1), matmul_dtype(scorer.hidden)
    _check_ids(ids, scorer.vocab)
    pairs = KeptRows(rows.reshape(-1), ids, torch.ones_like(ids, dtype=torch.bool), dtype)
    with exact(scorer.hidden):
        raw = kept_logits(
            scorer.hidden.to(dtype), scorer.weights, scorer.bias, pairs, of.source.impl
        )
    logits = capped_logits(raw, scorer.softcap, scorer.scale).view(targets.shape)
    return logits if temperature is None else logits / temperature


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= 0 and ids.max() < vocab):
        raise IndexError(f"index out of range: expected ids in [0, {vocab})")


def _some_word(of: Distribution) -> Tensor:
    """Return for each token some word that is not ruled out by the bias."""
    bias = of.source.bias_of(of)
    word = torch.zeros((), dtype=torch.int64, device=of.source.device)
    if bias is not None:
        word = bias.detach().argmax()
    return word.expand(of.rows.numbers.shape)


def log_sum_exp(of: Distribution) -> Tensor:
    """The log-sum-exp of a head that is a matrix."""
    whole, places = _whole(of)
    return _of_places(_stats(whole).lse(whole), of, places)


def entropies(of: Distribution) -> Tensor:
    """-Σ p ln p."""
    whole, places = _whole(of)
    entropy = _stats(whole, entropy_grad=torch.is_grad_enabled()).stats.entropy
    assert entropy is not None
    return _of_places(entropy, of, places)


def expected_logits(of: Distribution) -> Tensor:
    """Σ p z = ln Σ e^z + Σ p ln p, of a head that is a matrix."""
    entropy = entropies(of)
    return log_sum_exp(of) - entropy


def has_mean_row(of: Distribution) -> bool:
    """Whether the mean of a token's logits is the product with the mean row of the weight."""
    return not of.capped and all(isinstance(x, Tensor) for x in of.source.weights)


def mean_logits(of: Distribution) -> Tensor:
    """The mean of z over all words, of a head that is a matrix."""
    if has_mean_row(of):
        return _by_mean_row(of)
    if torch.is_grad_enabled():
        # mean = lse - (lse - mean), where both terms have a gradient.
        every_word = cross_entropy_of(of, _some_word(of), label_smoothing=1.0)
        return log_sum_exp(of) - every_word
    scorer, laid_out, taken = _scorer_and_targets(of, _some_word(of))
    stats = scorer.stats(laid_out, ignore_index=IGNORED, with_stats=("mean_logit",), lse=False)
    return taken(stats._asdict()["mean_logit"])


def _by_mean_row(of: Distribution) -> Tensor:
    scorer = of.source.scorer(of)
    assert isinstance(scorer, LinearScorer)
    dtype = matmul_dtype(scorer.hidden)
    sums = accumulation_dtype(dtype)
    mean = torch.cat([x[0 : x.shape[0]].to(dtype).to(sums).mean(0) for x in scorer.weights])
    with exact(scorer.hidden):
        means = scorer.hidden.to(dtype).to(sums)[of.rows.numbers] @ mean
        if scorer.bias is not None:
            means = means + scorer.bias.to(sums).mean()
    means = means * scorer.scale
    return means if of.temperature is None else means / of.temperature


def sum_of_logprobs(of: Distribution) -> Tensor:
    """Σ ln p over all words."""
    return -of.source.vocab * cross_entropy_of(of, _some_word(of), label_smoothing=1.0)


def cross_entropy_of(of: Distribution, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each token, 0 where the target is IGNORED."""
    scorer, laid_out, taken = _scorer_and_targets(of, targets)
    if label_smoothing == 0 or not is_linear(of):
        # A loss for each token, since each may get a factor of its own, such as a mask or a ratio.
        # Nothing is shared with other questions, since tokens without a target get no statistics.
        return -taken(scorer.stats(laid_out, ignore_index=IGNORED, lse=False).logprob)
    assert isinstance(scorer, LinearScorer)
    options = CrossEntropy(label_smoothing)
    return taken(cross_entropies(scorer, laid_out, options, ignore_index=IGNORED))


def is_linear(of: Distribution) -> bool:
    """Whether the head is known as a matrix, and not only by its module."""
    return of.source.parts is not None


def sum_of_cross_entropy(
    of: Distribution, targets: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """The sum of these cross-entropies, each times its weight. Its gradient is computed in the
    forward already.
    """
    scorer, laid_out, _ = _scorer_and_targets(of, targets)
    if weights is not None:
        flat = of.rows.numbers.reshape(-1)
        if laid_out.numel() == flat.numel() and not of.rows.distinct:
            weights = weights.reshape(-1)
        else:
            weights = weights.new_zeros(laid_out.shape).index_put((flat,), weights.reshape(-1))
    return summed_cross_entropy(
        scorer, laid_out, CrossEntropy(label_smoothing), weights, ignore_index=IGNORED
    )[0]


def are_comparable(p: Distribution, q: Distribution) -> bool:
    """Whether `divergences` is known for these two, with its gradients."""
    alike = p.source.vocab == q.source.vocab and p.source.device == q.source.device
    tokens = p.rows.numbers.shape == q.rows.numbers.shape and p.temperature is q.temperature
    return alike and tokens and (p.constant or q.constant)


def divergences(p: Distribution, q: Distribution) -> Tensor:
    """KL(p || q) of each token, of which one at least is a constant."""
    ours, theirs, direction = (p, q, "reverse") if q.constant else (q, p, "forward")
    temperature = None if ours.temperature is None else ours.temperature.reshape(-1)
    rows, their_rows = (x.rows.numbers.reshape(-1) for x in (ours, theirs))
    values, _ = scored_divergence(
        ours.source.scorer(ours, temperature=temperature, only=rows, held=_OF_TWO),
        theirs.source.scorer(theirs, temperature=temperature, only=their_rows, held=_OF_TWO),
        torch.ones_like(rows, dtype=torch.bool), direction=direction, beta=0.5,
    )  # fmt: skip
    return values.view(ours.rows.numbers.shape)


def soft_cross_entropies(p: Distribution, q: Distribution) -> Tensor:
    """-Σ p ln q of each token, which is KL(p || q) plus the entropy of p."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not p.constant):
        of_p = entropies(p)
    return divergences(p, q) + of_p


@torch.no_grad()
def best(of: Distribution, reduce: Callable[[Tensor], Any], dtype: torch.dtype) -> list[Any]:
    """Call `reduce` on the logits (n, V) of some tokens at a time, and return what it gave each
    time, in order. Temperatures are left out: positive ones do not change the order of words.
    """
    rows, source = of.rows.numbers.reshape(-1), of.source
    scorer = source.scorer(of)
    parts = []
    for some in rows.split(max(1, scorer.chunk_size or 1)):
        parts.append(reduce(scorer.logits(some).to(source.dtype).to(dtype)))
    return parts
