"""The teacher's side of a token: the log-probs of a few words of the vocabulary.

They also say how probable all other words are together, the *rest*, since probabilities add up to
1.

Used by `topk_divergence.py`, where the formulas are, and by `linear_topk_divergence.py`.

Dims: N tokens, k words, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import accumulation_dtype

from .backend import is_batched
from .checks import (
    assert_on_device,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    known_on_host,
    wide_integers,
)

# The rest, 1 minus the probabilities of the words, is only known to within so many roundings of 1.
_ROUNDINGS = 4
# By how much the sum of probabilities may exceed 1, since log-probs may come in 16 bits.
_SLACK = 2.0**-5


class TeacherWords(NamedTuple):
    """The words of N tokens, those of each token by increasing number."""

    ids: Tensor  # (N, k) int64; V for a missing word
    logprobs: Tensor  # (N, k); -inf for a missing word
    rest: Tensor  # (N,) ln of the probability that all other words have together
    unsure: Tensor  # (N,) bool, whether that probability may be 0, and what is left only rounding

    def at(self, rows: Tensor) -> "TeacherWords":
        """Take the words of some tokens."""
        return TeacherWords(*(x[rows] for x in self))

    def buckets(self, student: Tensor) -> Tensor:
        """Return the log-probs (N, k + 1) of words and rest, given the student's buckets.

        Where the student's rest has probability 0, and the teacher's may be 0 but for rounding, it
        is taken as 0. Otherwise rounding alone would make their divergence infinite.
        """
        nothing = self.unsure & (student[:, -1] == -torch.inf)
        rest = torch.where(nothing, -torch.inf, self.rest)
        return torch.cat((self.logprobs, rest.unsqueeze(-1)), dim=-1).to(student.dtype)


def checked_words(
    teacher_logprobs: Tensor, teacher_ids: Tensor, keep: Tensor, vocab: int
) -> TeacherWords:
    """Check the words (..., k) of the tokens that `keep` (...) selects, and sort them.

    The values of tensors are checked at once on the CPU. On a GPU an assertion checks them, when
    the device gets there.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; log-probs that require a
            gradient, or whose probabilities exceed 1; a word outside [0, V) or twice.
    """
    check_floating("teacher_logprobs", teacher_logprobs)
    check_integer("teacher_ids", teacher_ids)
    tokens, shape = tuple(keep.shape), tuple(teacher_ids.shape)
    if shape[:-1] != tokens or len(shape) != len(tokens) + 1 or shape[-1] == 0:
        expected = ", ".join(map(str, (*tokens, "k")))
        raise ValueError(f"teacher_ids: expected shape ({expected}) with k > 0, got {shape}")
    check_shape("teacher_logprobs", teacher_logprobs, shape, "the shape of teacher_ids")
    if teacher_logprobs.requires_grad:
        raise ValueError(
            "teacher_logprobs: expected a tensor without gradient (detach it), got one that "
            "requires it"
        )
    for name, x in (("teacher_logprobs", teacher_logprobs), ("teacher_ids", teacher_ids)):
        check_same_device(name, x, "the student", keep)
    keep = keep.reshape(-1, 1)
    ids = wide_integers(teacher_ids).reshape(len(keep), shape[-1])
    logprobs = teacher_logprobs.reshape(ids.shape)
    logprobs = logprobs.to(accumulation_dtype(logprobs.dtype))
    there = keep & (ids != -1) & (logprobs != -torch.inf)
    _check_numbers(ids, there, vocab)
    if _found(there & logprobs.isnan(), "teacher_logprobs: NaN"):
        raise ValueError(
            "teacher_logprobs: expected log-probs, got NaN; -inf, or an id of -1, is no word"
        )
    ids, order = torch.where(there, ids, vocab).sort(dim=-1)
    logprobs = torch.where(there, logprobs, -torch.inf).gather(-1, order)
    _check_once(ids, vocab)
    return TeacherWords(ids, logprobs, *_rest(ids, logprobs, vocab))


def _rest(ids: Tensor, logprobs: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Compute the rest, ln(1 - Σ e^logprob), and whether it may be mere rounding."""
    log_sum = torch.logsumexp(logprobs.double(), dim=-1)  # fp64, since the difference to 1 cancels
    _check_sum(log_sum)
    least = _ROUNDINGS * torch.finfo(logprobs.dtype).eps
    left = -torch.expm1(log_sum.clamp(max=0.0))
    unsure = left <= least
    rest = torch.where(unsure, least, left).log()
    all_words = (ids < vocab).sum(-1) == vocab
    return torch.where(all_words, -torch.inf, rest), unsure


def _check_numbers(ids: Tensor, there: Tensor, vocab: int) -> None:
    outside = there & ((ids < 0) | (ids >= vocab))
    if _found(outside, "teacher_ids: a word is outside [0, vocabulary)"):
        worst = int(ids[outside][0])
        raise ValueError(
            f"teacher_ids: expected words in [0, {vocab}), or -1 for none, got {worst}"
        )


def _found(wrong: Tensor, message: str) -> bool:
    """Whether something is wrong. Where the host cannot know without waiting for the device, False,
    after an assertion on the device that nothing is.
    """
    if known_on_host(wrong):
        return bool(wrong.any())
    if not is_batched(wrong):
        assert_on_device(~wrong.any(), message)
    return False


def _check_once(ids: Tensor, vocab: int) -> None:
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] < vocab)
    if _found(twice, "teacher_ids: a token has a word twice"):
        token, place = twice.nonzero()[0].tolist()
        raise ValueError(
            f"teacher_ids: expected each word of a token once, got {int(ids[token, place])} twice "
            f"for token {token} (as if flat)"
        )


def _check_sum(log_sum: Tensor) -> None:
    above = log_sum > _SLACK
    if _found(above, "teacher_logprobs: probabilities exceed 1"):
        worst = float(log_sum[above][0].exp())
        raise ValueError(
            "teacher_logprobs: expected log-probs, whose probabilities are 1 at most together, got "
            f"{worst:.4g}; of logits, subtract the log-sum-exp over the vocabulary"
        )
