"""The divergence of what two heads make of the same tokens, however the heads are stored."""

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
        frozen = _cut_as(ours, theirs)
        frozen = frozen._replace(
            hidden=frozen.hidden.detach(),
            weights=[x.detach() if isinstance(x, Tensor) else x for x in frozen.weights],
            bias=None if frozen.bias is None else frozen.bias.detach(),
        )
        return divergence_of(
            ours, frozen, scored, direction=direction, beta=beta, sum_expected=True, entropy=entropy
        )
    if any(getattr(side, "part", None) is not None for side in (ours, theirs)):
        raise ValueError(
            "teacher: expected heads of which both are known as matrices, where one of them is "
            "tensor parallel"
        )
    temperatures = None
    if isinstance(ours.temperature, Tensor):
        temperatures = token_temperatures(ours.temperature, scored).reshape(-1)

    def of_rows(rows: Tensor) -> Tensor:
        """The divergences of some tokens (n, 1), or (n, 2) with the entropies."""
        with torch.no_grad():
            ref_logits = theirs.logits(rows)
        logits = ours.logits(rows)
        dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
        temperature = ours.temperature if temperatures is None else temperatures[rows]
        found = [
            kl_divergence(
                logits.to(dtype), ref_logits.to(dtype), direction=direction, beta=beta,
                impl=ours.impl, temperature=temperature,
            )
        ]  # fmt: skip
        if entropy:
            stats = token_stats(
                logits.detach(), torch.zeros_like(rows), entropy=True, temperature=temperature,
                impl=ours.impl,
            )  # fmt: skip
            assert stats.entropy is not None
            found.append(stats.entropy.to(found[0]))
        return torch.stack(found, dim=-1)

    rows = scored.reshape(-1).nonzero()[:, 0]
    size = max(checked_chunk(x.chunk_size, x.vocab, x.hidden.device) for x in (ours, theirs))
    parts = torch.cat(in_chunks(of_rows, rows, size))
    values, *entropies = (
        part.new_zeros(scored.numel()).index_put((rows,), part).view(scored.shape)
        for part in parts.unbind(-1)
    )
    return values, entropies[0].detach() if entropy else None


def _cut_as(ours: LinearScorer, theirs: LinearScorer) -> LinearScorer:
    """The rows of a frozen head that this rank has of ours, where ranks share the vocabulary.

    Raises:
        ValueError: a head that is cut among ranks otherwise.
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
