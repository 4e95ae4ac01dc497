"""Statistics over kept ids from hidden states: at the cost of the kept ids, whatever the plan.

The logits of kept ids are few enough to be held until the loss is known, so that there is nothing
to choose, and nothing to make again.
"""

from fastrlhf.reference import accumulation_dtype

from .kept_ids import of_part
from .kept_logits import KeptRows, kept_logits
from .kept_stats import KeptQuestion, KeptStats, kept_stats
from .linear_precision import exact
from .linear_problem import LinearProblem
from .ranks import refuse_transforms_of_ranks, shared_by_ranks, sum_over_ranks


def kept_stats_of(problem: LinearProblem) -> KeptStats:
    """Compute the statistics (N,) of a problem with a support."""
    kept, options, asked = problem.kept, problem.options, problem.options.question
    assert kept is not None
    question = KeptQuestion(problem.transform, asked.entropy, asked.with_stats, options.impl)
    row = kept.token if options.shared is None else options.shared.row[kept.token]
    wanted = question.wanted(kept, lse=asked.lse)
    ids, own = of_part(kept, options.part)
    group = None if options.part is None else options.part.group
    if group is not None:
        refuse_transforms_of_ranks("linear_token_stats")
    pairs = KeptRows(row, ids, wanted if own is None else wanted & own, options.dtype)
    hidden = problem.hidden.reshape(-1, problem.hidden.shape[-1])
    if group is not None:
        # Each rank's part of the gradient is rounded once they are added up.
        hidden = shared_by_ranks(hidden.to(accumulation_dtype(hidden.dtype)), group)
    with exact(hidden):
        logits = kept_logits(hidden, problem.weights, problem.bias, pairs, options.impl)
        # Where ranks share the vocabulary, each has the logits of its ids, and zeros.
        return kept_stats(sum_over_ranks(logits, group), kept, question)
