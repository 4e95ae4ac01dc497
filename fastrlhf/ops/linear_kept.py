"""Statistics over kept ids from hidden states: at the cost of the kept ids, whatever the plan.

The logits of kept ids are few enough to be held until the loss is known, so that there is nothing
to choose, and nothing to make again.
"""

from .kept_logits import KeptRows, kept_logits
from .kept_stats import KeptQuestion, KeptStats, kept_stats
from .linear_arguments import LinearProblem, exact


def kept_stats_of(problem: LinearProblem) -> KeptStats:
    """Compute the statistics (N,) of a problem with a support."""
    kept, options = problem.kept, problem.options
    assert kept is not None
    question = KeptQuestion(
        problem.transform, options.entropy, options.with_stats, options.impl
    )  # fmt: skip
    row = kept.token if options.shared is None else options.shared.row[kept.token]
    pairs = KeptRows(row, kept.ids, question.wanted(kept, lse=options.lse))
    hidden = problem.hidden.reshape(-1, problem.hidden.shape[-1])
    with exact(hidden):
        logits = kept_logits(hidden, problem.weights, problem.bias, pairs, options.impl)
        return kept_stats(logits, kept, question)
