"""The divergence between the distributions that two heads give, however the heads are stored.

Used by `model_divergence.py`, by `fastrlhf/lazy/scores.py` and by
`fastrlhf/integrations/trl_head.py`. Where the matrices of both heads are known,
`fastrlhf/ops/linear_divergence.py` computes it; otherwise it is taken from logits, a chunk of
tokens at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops.divergence import kl_divergence
from fastrlhf.ops.linear_arguments import checked_chunk
from fastrlhf.ops.linear_divergence import divergence_of
from fastrlhf.ops.scorer import LinearScorer, Scorer, in_chunks
from fastrlhf.ops.token_stats import token_stats
from fastrlhf.ops.transform import token_temperatures


def scored_divergence(
    ours: Scorer,
    theirs: Scorer,
    scored: Tensor,
    *,
    direction: str,
    beta: float,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence of each scored token (...), differentiable in ours, and if asked for
    our entropy, a value; 0 elsewhere.
    """
    if isinstance(ours, LinearScorer) and isinstance(theirs, LinearScorer):
        return divergence_of(
            ours, _without_graph(_cut_as(ours, theirs)), scored, direction=direction, beta=beta,
            sum_expected=True, entropy=entropy,
        )  # fmt: skip
    if any(getattr(side, "part", None) is not None for side in (ours, theirs)):
        raise ValueError(
            "teacher: expected heads of which both are known as matrices, where one of them is "
            "tensor parallel"
        )
    temperatures = None
    if isinstance(ours.temperature, Tensor):
        temperatures = token_temperatures(ours.temperature, scored).reshape(-1)
    of_logits = _OfLogits(ours, theirs, temperatures, direction, beta, entropy)
    rows = scored.reshape(-1).nonzero()[:, 0]
    size = max(checked_chunk(x.chunk_size, x.vocab, x.hidden.device) for x in (ours, theirs))
    columns = torch.cat(in_chunks(of_logits.of_rows, rows, size))
    values, *entropies = (
        column.new_zeros(scored.numel()).index_put((rows,), column).view(scored.shape)
        for column in columns.unbind(-1)
    )
    return values, entropies[0].detach() if entropy else None


class _OfLogits(NamedTuple):
    """The divergence where the matrix of a head is not known: from the logits that it makes."""

    ours: Scorer
    theirs: Scorer
    temperatures: Tensor | None  # (N,) of each token; None: one for all
    direction: str
    beta: float
    entropy: bool

    def of_rows(self, rows: Tensor) -> Tensor:
        """Compute the divergences of some tokens (n, 1), or (n, 2) with the entropies."""
        ours, theirs = self.ours, self.theirs
        with torch.no_grad():
            ref_logits = theirs.logits(rows)
        logits = ours.logits(rows)
        dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
        temperature = ours.temperature if self.temperatures is None else self.temperatures[rows]
        columns = [
            kl_divergence(
                logits.to(dtype), ref_logits.to(dtype), direction=self.direction, beta=self.beta,
                impl=ours.impl, temperature=temperature,
            )
        ]  # fmt: skip
        if self.entropy:
            stats = token_stats(
                logits.detach(), torch.zeros_like(rows), entropy=True, temperature=temperature,
                impl=ours.impl,
            )  # fmt: skip
            assert stats.entropy is not None
            columns.append(stats.entropy.to(columns[0]))
        return torch.stack(columns, dim=-1)


def _without_graph(scorer: LinearScorer) -> LinearScorer:
    """Detach a head that is not trained, and its hidden states."""
    return scorer._replace(
        hidden=scorer.hidden.detach(),
        weights=[x.detach() if isinstance(x, Tensor) else x for x in scorer.weights],
        bias=None if scorer.bias is None else scorer.bias.detach(),
    )


def _cut_as(ours: LinearScorer, theirs: LinearScorer) -> LinearScorer:
    """Cut a frozen head as `ours` is cut: to this rank's rows, where ranks share the vocabulary.

    Raises:
        ValueError: theirs is cut among ranks, but not as ours is; or ours is cut, and theirs is
            quantized.
    """
    if theirs.part is None and ours.part is None:
        return theirs
    if theirs.part is not None and ours.part is not None and theirs.part.is_that_of(ours.part):
        return theirs._replace(part=ours.part)
    dense = [weight for weight in theirs.weights if isinstance(weight, Tensor)]
    if theirs.part is not None or ours.part is None or len(dense) < len(theirs.weights):
        raise ValueError(
            "teacher: expected a head that is cut among ranks as that of the model, or whole and "
            "not quantized where the model's is cut"
        )
    rows = ours.part.columns
    return theirs._replace(
        weights=[weight[rows] for weight in dense],
        bias=None if theirs.bias is None else theirs.bias[rows],
        part=ours.part,
    )
