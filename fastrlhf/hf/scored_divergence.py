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
        frozen = theirs._replace(
            weights=[x.detach() if isinstance(x, Tensor) else x for x in theirs.weights],
            bias=None if theirs.bias is None else theirs.bias.detach(),
        )
        return divergence_of(
            ours, frozen, scored, direction=direction, beta=beta, sum_expected=True, entropy=entropy
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
