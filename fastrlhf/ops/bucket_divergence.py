"""Divergences of teacher and student over a few buckets.

There is a bucket for each word whose log-prob the teacher gave, and one more for all other words of
the vocabulary. `bucket_logits.py` makes the student's buckets, `teacher_words.py` the teacher's.

Dims: N rows, k words, k + 1 buckets.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.reference import expm1_minus, log_to_mixture

from .checks import check_between, check_bool, check_one_of
from .divergence import DIRECTIONS as PLAIN_DIRECTIONS
from .divergence import kl_divergence
from .tracing import replaced

DIRECTIONS = (*PLAIN_DIRECTIONS, "skewed_forward", "skewed_reverse")


class BucketMeasure(NamedTuple):
    """Which divergence is measured: the options of `topk_kl_divergence`."""

    direction: str
    tail: bool
    renormalize: bool
    beta: float
    skew: float

    def checked(self) -> "BucketMeasure":
        """Check the options, and return them with beta and skew as floats.

        Raises:
            TypeError, ValueError: an option that is not what it should be, or does not fit another.
        """
        check_one_of("direction", self.direction, DIRECTIONS)
        check_bool("tail", self.tail)
        check_bool("renormalize", self.renormalize)
        if self.tail and self.renormalize:
            raise ValueError(
                "renormalize: expected False with tail=True, whose buckets are the whole "
                "distribution already; or tail=False"
            )
        beta, skew = check_between("beta", self.beta, 0, 1), check_between("skew", self.skew, 0, 1)
        return replaced(self, beta=beta, skew=skew)

    @property
    def complete(self) -> bool:
        """Whether the buckets that are compared add up to 1 on either side."""
        return self.tail or self.renormalize

    @property
    def skewed(self) -> bool:
        return self.direction.startswith("skewed")


def bucket_divergence(
    student: Tensor, teacher: Tensor, keep: Tensor, measure: BucketMeasure, impl: str
) -> Tensor:
    """Compute the divergence (N,) of buckets (N, k + 1), 0 for rows that are not kept. The
    student's buckets are logits and differentiable, the teacher's are log-probs. The last bucket
    stands for all words without one of their own.
    """
    if measure.renormalize:
        student, teacher = student[:, :-1], teacher[:, :-1]
    student = relative_to_largest(student)
    if measure.complete and not measure.skewed:
        return kl_divergence(
            student, teacher, direction=measure.direction, beta=measure.beta, mask=keep,
            impl="triton" if impl == "triton" else "eager",
        )  # fmt: skip
    student_empty, teacher_empty = ((x == -torch.inf).all(-1) for x in (student, teacher))
    regular = keep & ~student_empty & ~teacher_empty
    log_s, log_t = (
        F.log_softmax(torch.where(regular.unsqueeze(-1), x, 0.0), dim=-1)
        for x in (student, teacher)
    )
    if not measure.complete:
        log_s, log_t = log_s[:, :-1], log_t[:, :-1]
    values = _of_distributions(log_s, log_t, measure)
    # Where a side has no distribution, the values are those that `kl_divergence` gives then.
    forward = measure.direction == "forward"
    forward |= (measure.direction, measure.beta) == ("jsd", 0)
    forward |= (measure.direction, measure.skew) == ("skewed_forward", 0)
    missed = torch.inf if forward else 0.0
    values = torch.where(student_empty & ~teacher_empty, missed, values)
    return torch.where(keep & ~teacher_empty, values, 0.0)


def relative_to_largest(buckets: Tensor) -> Tensor:
    """Subtract the largest of buckets (N, .), which leaves their softmax as it is.

    The largest becomes the constant 0. So its gradient is minus the sum of the gradients of all
    others. Where its probability is nearly 1, these are tiny, and the softmax's own formula for the
    gradient of the largest would round to 0.
    """
    largest, place = buckets.max(-1, keepdim=True)
    there = largest != -torch.inf
    is_largest = torch.arange(buckets.shape[-1], device=buckets.device) == place
    return torch.where(is_largest & there, 0.0, buckets - torch.where(there, largest, 0.0))


def _of_distributions(log_s: Tensor, log_t: Tensor, measure: BucketMeasure) -> Tensor:
    """Compute the divergence (N,) from log-probs (N, .), which need not add up to 1."""
    beta, skew, complete = measure.beta, measure.skew, measure.complete
    direction = measure.direction
    if direction == "jsd" and 0 < beta < 1:
        of_teacher = kl_to_mixture(log_t, log_s, beta, complete=complete)
        of_student = kl_to_mixture(log_s, log_t, 1 - beta, complete=complete)
        return beta * of_teacher + (1 - beta) * of_student
    share = skew if measure.skewed else 0.0
    forward = direction in ("forward", "skewed_forward") or (direction == "jsd" and beta == 0)
    own, other = (log_t, log_s) if forward else (log_s, log_t)
    return kl_to_mixture(own, other, share, complete=complete)


def kl_to_mixture(log_own: Tensor, log_other: Tensor, share: float, *, complete: bool) -> Tensor:
    """Compute Σ own·ln(own/m), m = share·own + (1-share)·other, from log-probs (N, .).

    If the distributions are complete, m - own is added to each term. Its sum is 0, and then no term
    is negative, so that the sum is accurate for nearly equal distributions. 0·ln 0 = 0.
    """
    own, possible = log_own.exp(), log_own.exp() > 0
    gap = torch.where(possible, log_other, 0.0) - torch.where(possible, log_own, 0.0)
    to_mixture = log_to_mixture(gap, share, 1 - share) if share > 0 else gap
    if not complete:
        return torch.where(possible, -own * to_mixture, 0.0).sum(-1)
    near = to_mixture.abs() < 0.5
    close = own * expm1_minus(torch.where(near, to_mixture, 0.0))
    surplus = (1 - share) * (log_other.exp() - own)
    far = surplus - torch.where(possible, own * to_mixture, 0.0)
    return torch.where(near & possible, close, far).sum(-1)
