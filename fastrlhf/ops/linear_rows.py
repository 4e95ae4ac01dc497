"""The tokens that have a target, in blocks small enough that their logits fit into memory.

Ignored rows cost nothing, because they never reach a matmul: only rows with a target are gathered,
a block at a time, in the order in which they are needed. Their number must be known before the
matmuls can be launched, so on a GPU the host waits for the targets once. The targets are usually
there long before the hidden states. Where the number cannot be known (while a graph is compiled or
captured), all rows are kept, and hidden states of ignored ones are set to 0.

Dims: N tokens, n tokens with a target, K width of the hidden states.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .row_spans import Span
from .tracing import being_traced
from .transform import Transform

# How many bytes of fp32 logits are held at once. A GPU needs blocks of many rows to be busy; a CPU
# is as fast with few.
_WORKSPACE_BYTES = {"cpu": 2**26}
_GPU_WORKSPACE_BYTES = 2**29

# A GPU's matmuls work on this many rows at a time, and waste what the last rows do not fill.
_WHOLE_ROWS = 128


class SharedRows(NamedTuple):
    """Which hidden state predicts each of N tokens. In a tree of sequences, one hidden state may
    predict several tokens.

    A *state* is a hidden state at one temperature, and so has one row of effective logits.
    """

    row: Tensor  # (N,) numbers of hidden states
    state: Tensor  # (N,) numbers of states
    row_of_state: Tensor  # (S,) numbers of hidden states


class BlockStates(NamedTuple):
    """The states of a block of tokens."""

    of_token: Tensor  # (n,) which of the m states predicts each token
    numbers: Tensor  # (m,) their numbers among all states
    rows: Tensor  # (m,) numbers of their hidden states
    transform: Transform  # its temperatures (m,)

    def any(self, of_tokens: Tensor) -> Tensor:
        """Given a bool (n,) of tokens, tell which states (m,) have a token where it is True."""
        nowhere = torch.zeros_like(self.numbers, dtype=torch.bool)
        return nowhere.index_fill(0, self.of_token[of_tokens], True)


class Block(NamedTuple):
    """Consecutive rows of the order: their places among all tokens, and their data."""

    place: Tensor | slice
    hidden: Tensor  # (n, K); where tokens share hidden states (m, K)
    targets: Tensor  # (n,)
    transform: Transform
    states: BlockStates | None = None  # where tokens share hidden states


class Rows(NamedTuple):
    """All N tokens, flattened, and the order of those that count."""

    hidden: Tensor  # (N, K); where tokens share them (U, K)
    targets: Tensor  # (N,)
    transform: Transform  # its temperatures (N,)
    ignore_index: int
    order: Tensor | None  # (n,) indices of the tokens with a target; None: all N as they come
    shared: SharedRows | None = None

    @property
    def size(self) -> int:
        """The number of rows to work on."""
        return self.targets.shape[0] if self.order is None else self.order.shape[0]

    def block(self, span: Span) -> Block:
        """Gather the rows of a span."""
        first, last = span
        temperature = self.transform.token_temperature
        index = slice(first, last) if self.order is None else self.order[first:last]
        if self.shared is not None:
            assert isinstance(index, Tensor)
            return self._block_of_shared(self.shared, index)
        hidden, targets = self.hidden[index], self.targets[index]
        if self.order is None:
            # Ignored rows may hold anything, NaN too, and must not spoil the sums over rows.
            hidden = torch.where((targets != self.ignore_index).unsqueeze(1), hidden, 0.0)
        if temperature is not None:
            temperature = temperature[index]
        return Block(index, hidden, targets, self.transform._replace(token_temperature=temperature))

    def _block_of_shared(self, shared: SharedRows, index: Tensor) -> Block:
        numbers, of_token = shared.state[index].unique(return_inverse=True)
        rows, of_states, of_tokens = shared.row_of_state[numbers], self.transform, self.transform
        if self.transform.token_temperature is not None:
            temperature = self.transform.token_temperature[index]
            of_tokens = of_tokens._replace(token_temperature=temperature)
            one_each = temperature.new_empty(len(numbers)).scatter(0, of_token, temperature)
            of_states = of_states._replace(token_temperature=one_each)
        states = BlockStates(of_token, numbers, rows, of_states)
        return Block(index, self.hidden[rows], self.targets[index], of_tokens, states)

    def spans(self, chunk: int) -> list[Span]:
        """Cut the order into blocks of at most `chunk` rows of logits. Tokens that share a state
        follow each other in the order, and are not separated.
        """
        if self.shared is None or self.order is None:
            return even_spans(self.size, chunk)
        of_states = self.shared.state[self.order].unique_consecutive(return_counts=True)[1]
        ends = [0, *of_states.cumsum(0).tolist()]
        return [(ends[first], ends[last]) for first, last in even_spans(len(ends) - 1, chunk)]


def at(place: Tensor | slice, some: Tensor) -> Tensor:
    """Return the places of some rows, given by their indices within `place`."""
    return some + place.start if isinstance(place, slice) else place[some]


def default_chunk(vocab: int, device: torch.device) -> int:
    """Return how many rows of fp32 logits fill the workspace: 512 MiB, on a CPU 64 MiB."""
    rows = _WORKSPACE_BYTES.get(device.type, _GPU_WORKSPACE_BYTES) // (4 * vocab)
    return max(1, rows // _WHOLE_ROWS * _WHOLE_ROWS or rows)


def live_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Find the indices of the tokens with a target."""
    return (targets != ignore_index).nonzero().squeeze(1)


def live_rows_if_known(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Find the indices of the tokens with a target; None where they cannot be counted."""
    return None if counts_are_unknown(targets) else live_rows(targets, ignore_index)


def counts_are_unknown(targets: Tensor) -> bool:
    """Whether a graph is being compiled or captured, so that the host cannot count anything."""
    return being_traced() or (targets.is_cuda and torch.cuda.is_current_stream_capturing())


def even_spans(rows: int, chunk: int) -> list[Span]:
    """Cut rows into as few blocks of at most `chunk` rows as possible, of nearly equal sizes."""
    if rows == 0:
        return []
    blocks = -(-rows // chunk)
    size = -(-rows // blocks)
    if blocks > 1:
        size = min(chunk, -(-size // _WHOLE_ROWS) * _WHOLE_ROWS)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def order_by_group(order: Tensor, groups: Tensor) -> tuple[Tensor, list[int]]:
    """Sort rows by group, stably; also return the sizes of the groups."""
    of_rows = groups[order]
    by_group = of_rows.argsort(stable=True)
    sizes = of_rows[by_group].unique_consecutive(return_counts=True)[1]
    return order[by_group], sizes.tolist()


def states_of_groups(states: Tensor, sizes: list[int]) -> list[int]:
    """Count the different states in each group of tokens, given the states (n,) of tokens that are
    sorted by group, and the sizes of the groups.
    """
    group = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64)).to(states.device)
    pairs = torch.stack((group, states)).unique(dim=1)
    return pairs[0].bincount(minlength=len(sizes)).tolist()


def pack_groups(
    sizes: list[int], chunk: int, states: list[int] | None = None
) -> Iterator[list[Span]]:
    """Cut rows into segments of whole groups. A segment has at most `chunk` rows of logits, or is a
    single larger group, which is cut into spans. `states` says how many rows of logits each group
    has; None: one for each token.
    """
    first = last = held = 0
    for size, rows in zip(sizes, sizes if states is None else states, strict=True):
        if held and held + rows > chunk:
            yield [(first, last)]
            first, held = last, 0
        last, held = last + size, held + rows
        if rows > chunk:
            yield [(first + a, first + b) for a, b in even_spans(size, chunk)]
            first, held = last, 0
    if last > first:
        yield [(first, last)]


def shared_rows(rows: Tensor, temperature: Tensor | None, hidden_states: int) -> SharedRows:
    """Number the states of tokens (N,), given their hidden states and temperatures (N,)."""
    if temperature is None:
        return SharedRows(rows, rows, torch.arange(hidden_states, device=rows.device))
    pairs = torch.stack((rows.double(), temperature.double()), dim=1)
    states, number = pairs.unique(dim=0, return_inverse=True)
    return SharedRows(rows, number, states[:, 0].long())
