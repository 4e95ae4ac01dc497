"""Statistics over kept ids (see `kept_ids.py`) from hidden states.

The logits of kept ids are so few that all of them are held until the backward. So no plan
(`linear_plans.py`) has to be chosen, and no logits are made again.
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
    kept, options = problem.kept, problem.options
    entropy, with_stats = options.question.entropy, options.question.with_stats
    assert kept is not None
    question = KeptQuestion(problem.transform, entropy, with_stats, options.impl)
    row = kept.token if options.shared is None else options.shared.row[kept.token]
    wanted = question.wanted(kept, lse=options.question.lse)
    ids, here = of_part(kept, options.part)
    group = None if options.part is None else options.part.group
    if group is not None:
        refuse_transforms_of_ranks("linear_token_stats")
    pairs = KeptRows(row, ids, wanted if here is None else wanted & here, options.dtype)
    hidden = problem.hidden.reshape(-1, problem.hidden.shape[-1])
    if group is not None:
        # Converted first, so that the ranks' parts of its gradient are added up before it is
        # rounded.
        hidden = shared_by_ranks(hidden.to(accumulation_dtype(hidden.dtype)), group)
    with exact(hidden):
        logits = kept_logits(hidden, problem.weights, problem.bias, pairs, options.impl)
        # Where ranks share the vocabulary, each has the logits of its own ids, and 0 for all
        # others, so that their sum over ranks is the logits of all ids.
        return kept_stats(sum_over_ranks(logits, group), kept, question)
