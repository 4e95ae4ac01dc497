"""What a teacher says of each token: the log-probs of a few words, and by that of all others.

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

# What log-probs leave of 1 is only known to so many roundings of 1.
_ROUNDINGS = 4
# By how much probabilities of log-probs in 16 bits may exceed 1.
_SLACK = 2.0**-5


class TeacherWords(NamedTuple):
    """The words of N tokens, by increasing number."""

    ids: Tensor  # (N, k) int64; V where there is no word
    logprobs: Tensor  # (N, k); -inf where there is no word
    rest: Tensor  # (N,) ln of what all other words have
    unsure: Tensor  # (N,) bool, whether that could be 0 but for rounding

    def at(self, rows: Tensor) -> "TeacherWords":
        """Take those of some tokens."""
        return TeacherWords(*(x[rows] for x in self))

    def buckets(self, student: Tensor) -> Tensor:
        """The log-probs (N, k + 1) of words and rest, given the student's buckets.

        A rest that could as well be 0 is 0 where the student has none either, which would be
        infinitely far.
        """
        nothing = self.unsure & (student[:, -1] == -torch.inf)
        rest = torch.where(nothing, -torch.inf, self.rest)
        return torch.cat((self.logprobs, rest.unsqueeze(-1)), dim=-1).to(student.dtype)


def checked_words(
    teacher_logprobs: Tensor, teacher_ids: Tensor, keep: Tensor, vocab: int
) -> TeacherWords:
    """Check the words (..., k) of tokens, of which those of `keep` (...) count, and sort them.

    What the tensors hold is checked here on the CPU; on a GPU, by an assertion when the device gets
    there.

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
    """What the words leave: ln(1 - Σ e^logprob), and whether that is no more than rounding."""
    log_sum = torch.logsumexp(logprobs.double(), dim=-1)  # from which 1 is subtracted
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
    """Whether something is known to be wrong; asserts that nothing is where only the device
    knows.
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
