"""The plan KEEP_SLOPES (see `linear_plans.py`) where several tokens share a hidden state.

Under this plan the forward keeps slopes for the backward: derivatives of the statistics with
respect to the hidden state. A *state* is a hidden state at one temperature, and its *leader* is the
target whose logit is the largest of the state's targets (see `shared_targets.py`). The forward
keeps u = ∂logprob/∂hidden of each state's leader. The slope of another target y of the state
differs from u by two rows of the weight, those of y and of the leader, which the backward looks up.

Dims: N tokens, S states, U hidden states, K their width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .add_at import add_at
from .linear_plans import AllStats, Workbench, put, room_for_all_tokens, room_for_slopes
from .linear_problem import LinearProblem
from .linear_rows import Span
from .linear_statistics import Slopes
from .weighted_rows import add_weighted_rows, sorted_sums


def statistics_and_shared_slopes(
    bench: Workbench, spans: Iterable[Span]
) -> tuple[AllStats, tuple[Tensor, ...]]:
    """Read the statistics, and what the backward needs. For each state: ∂logprob/∂hidden of its
    leader, and ∂entropy/∂hidden, (S, K) each. For each token (N,) that does not lead its state: the
    id of the leader, the factor of its own target's logit, and the factor of the leader's logit.
    """
    shared, tokens = bench.rows.shared, bench.rows.targets
    assert shared is not None
    all_stats = room_for_all_tokens(bench)
    of_states = bench.rows.hidden.new_empty(()).expand(
        len(shared.row_of_state), bench.rows.hidden.shape[1]
    )
    u_logprob = room_for_slopes(of_states, alone=False)
    u_entropy = torch.zeros_like(u_logprob if bench.question.entropy_grad else u_logprob[:0])
    leader, factors = torch.zeros_like(tokens), all_stats[0].new_zeros(2, len(tokens))
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(all_stats, block, stats)
        states, targets = block.states, stats.shared
        assert states is not None and targets is not None
        leader[block.place] = targets.leader[targets.of_token]
        factors[:, block.place] = torch.stack(targets.factors)
        # The slopes of a state are computed as if it had one token, whose target is the leader.
        alone = block._replace(targets=targets.leader, transform=states.transform, states=None)
        of_leaders = stats.of_leaders()
        one, zero = torch.ones_like(of_leaders.logprob), torch.zeros_like(of_leaders.logprob)
        room = bench.head.room
        if bench.question.entropy_grad:
            slopes = Slopes(zero, one)
            d_logits = bench.d_logits(alone, logits, of_leaders, slopes, room=room, overwrite=False)
            u_entropy[states.numbers] = bench.head.pull_back(d_logits).to(u_entropy.dtype)
            del d_logits
        d_logits = bench.d_logits(alone, logits, of_leaders, Slopes(one), room=room)
        u_logprob[states.numbers] = bench.head.pull_back(d_logits).to(u_logprob.dtype)
    return all_stats, (u_logprob, u_entropy, leader, *factors)


def times_shared_slopes(
    problem: LinearProblem,
    kept: list[Any],
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor | None:
    """Multiply what the forward kept by the upstream gradients (N,), and return the gradient of the
    hidden states in their shape.
    """
    shared, hidden = problem.options.shared, problem.hidden
    u_logprob, u_entropy, leader, own_factor, leader_factor = kept
    targets = problem.targets.reshape(-1)
    live = targets != problem.options.question.ignore_index
    assert shared is not None

    def of_states(upstream: Tensor) -> Tensor:
        zeros = u_logprob.new_zeros(len(u_logprob), 1)
        return add_at(zeros, shared.state, torch.where(live, upstream, 0.0).unsqueeze(1))

    d_states = torch.zeros_like(u_logprob)
    if d_logprob is not None:
        d_states += u_logprob * of_states(d_logprob)
    if d_entropy is not None:
        d_states += u_entropy * of_states(d_entropy)
    d_hidden = add_at(u_logprob.new_zeros(hidden.shape), shared.row_of_state, d_states)
    if d_logprob is not None:
        g = torch.where(live, d_logprob, 0.0)
        ids = torch.cat((torch.where(live, targets, 0), leader))
        g = torch.cat((g * own_factor, -g * leader_factor))
        _add_rows_of_weight(d_hidden, g, problem, ids, shared.row.repeat(2))
    return d_hidden.to(hidden.dtype)


def _add_rows_of_weight(
    d_hidden: Tensor, factors: Tensor, problem: LinearProblem, ids: Tensor, rows: Tensor
) -> None:
    sums = sorted_sums(rows, ids, len(d_hidden))
    first = 0
    for weight in problem.weights:
        columns = slice(first, first + weight.shape[1])
        first = columns.stop
        part = torch.zeros_like(d_hidden[:, columns], memory_format=torch.contiguous_format)
        options = problem.options
        add_weighted_rows(part, factors, weight, sums, options.impl, operands=options.dtype)
        d_hidden[:, columns] += part
