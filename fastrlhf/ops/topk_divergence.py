"""The divergence of a student and a teacher of whom the likeliest words are known, from logits.

`teacher_words.py` checks what is known of the teacher, `bucket_logits.py` reduces the student's
logits to its words and the rest, and `bucket_divergence.py` compares both.
`linear_topk_divergence.py` computes the same from hidden states.

Dims: N tokens, k words of the teacher, V vocabulary.
"""

from typing import Literal

from torch import Tensor

from .backend import backend_of, check_impl, under_transform
from .bucket_divergence import BucketMeasure, bucket_divergence
from .bucket_logits import bucket_logits, definition
from .checks import check_bool, check_floating
from .logits_arguments import checked_rows
from .sharded import is_dtensor
from .teacher_words import TeacherWords, checked_words
from .transform import Transform, check_temperatures_on_host, checked_transform

Direction = Literal["forward", "reverse", "jsd", "skewed_forward", "skewed_reverse"]


def topk_kl_divergence(
    logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    direction: Direction = "forward",
    tail: bool = True,
    renormalize: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute the divergence of a student from a teacher's likeliest words, token by token.

    Eager equivalent, of words that are all there, with the effective logits z of `token_stats`::

        log_s, log_t = z.log_softmax(-1).gather(-1, teacher_ids), teacher_logprobs
        if tail:  # all other words as one
            log_s, log_t = (
                torch.cat((x, (1 - x.exp().sum(-1, keepdim=True)).log()), -1)
                for x in (log_s, log_t)
            )
        if renormalize:
            log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)
        forward, KL(t‖s): (log_t.exp() * (log_t - log_s)).sum(-1)
        reverse, KL(s‖t): (log_s.exp() * (log_s - log_t)).sum(-1)
        jsd: beta * KL(t‖m) + (1 - beta) * KL(s‖m), m = beta * t + (1 - beta) * s
        skewed_forward: KL(t‖m), m = skew * t + (1 - skew) * s
        skewed_reverse: KL(s‖m), m = (1 - skew) * t + skew * s

    Args:
        logits: (..., V) of the student, bf16, fp16, fp32 or fp64, any strides.
        teacher_logprobs: (..., k) natural logarithms of the probabilities that the teacher gives
            its words among all of the vocabulary. Of its logits, `logits - lse`, with the
            log-sum-exp over the whole vocabulary. Not differentiable.
        teacher_ids: (..., k) integer, the numbers of these words, in any order, each once. -1, or
            a log-prob of -inf, is no word: tokens may have different numbers of them.
        direction: see above.
        tail: compare the rest of the vocabulary too, as one bucket. It gives the student's
            probabilities outside of the words a gradient of their own, and makes the value a
            divergence, at most that of the whole vocabulary.
        renormalize: with tail=False, compare the distributions over the k words alone. Without
            either, the sum goes over the k words as they are: no divergence, it can be negative.
        beta: weight of the teacher in the mixture of the jsd, in [0, 1]; 0 and 1 stand for the
            forward and the reverse KL.
        skew: weight, in the mixture, of the side that is compared with it, in [0, 1]; 0 is the KL.
        mask: (...) bool or 0/1; where it is 0 nothing is read, and value and gradient are 0.
        temperature: of the student, as that of `token_stats`. The teacher's log-probs must have
            been made at the same one. Values are not multiplied by its square: who wants gradients
            of the size that they have at temperature 1 multiplies by T² (1503.02531, section 2).
        softcap, scale, inplace_backward, impl: as `token_stats`.

    Returns:
        (...) in nats, fp32 (fp64 for fp64 logits). 0 where a token has no word, since there is
        nothing to compare. The forward KL is inf where the student rules out (-inf logits) a word
        that the teacher does not; others are finite, since no word of the teacher's has
        probability 0.

    Differentiable with respect to logits, twice if need be (the second derivative runs eagerly and
    builds tensors of the size of the logits). Under `torch.func` (grad, vmap, jvp, ...) and
    forward-mode differentiation, all of it runs so.

    The student's rest is summed up as it is, and has its places right however small it is. That of
    the teacher is 1 - Σ e^logprob: where no more of it is left than rounding (4 eps), it is taken
    for so much, and for 0 where the words are all there are, or the student has no rest either.

    The kernel reads the logits once forward, and once backward, where it writes their gradient,
    which is all of that size that is allocated. Everything else is of the size of the words.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an option out of range, or
            tail and renormalize together; a word outside [0, V) or twice, log-probs whose
            probabilities exceed 1 (checked here on the CPU; on a GPU, by an assertion).

    Source: the jsd 2306.13649 Eq. 1 (GKD); skewed 2402.03898, section 3.1 (DistiLLM).

    Example:
        >>> logits = torch.zeros(1, 8, requires_grad=True)
        >>> teacher_ids = torch.tensor([[3, 5]])  # the likeliest words of a teacher
        >>> teacher_logprobs = torch.tensor([[0.6, 0.3]]).log()
        >>> divergence = fastrlhf.topk_kl_divergence(logits, teacher_logprobs, teacher_ids)
        >>> divergence.detach()
        tensor([1.0023])
        >>> divergence.sum().backward()
    """
    if is_dtensor(logits):
        raise TypeError("logits: expected a tensor, got a DTensor, which is not served here")
    check_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V > 0, got {tuple(logits.shape)}")
    measure = BucketMeasure(direction, tail, renormalize, beta, skew).checked()
    mask = checked_rows(mask, logits, "logits")
    words = checked_words(teacher_logprobs, teacher_ids, mask, logits.shape[-1])
    transform = checked_transform(temperature, softcap, scale, mask)
    check_bool("inplace_backward", inplace_backward)
    check_impl(impl)
    keep = mask.reshape(-1)
    if under_transform():
        check_temperatures_on_host(transform.token_temperature, mask)
        values = divergence_by_definition(logits, words, keep, transform, measure)
        return values.view(mask.shape)
    backend = backend_of(impl, logits, logits.numel())
    buckets, *_ = bucket_logits(
        logits, words.ids, keep, transform, inplace_backward=inplace_backward, impl=backend
    )
    teacher = words.buckets(buckets)
    return bucket_divergence(buckets, teacher, keep, measure, backend).view(mask.shape)


def divergence_by_definition(
    logits: Tensor, words: TeacherWords, keep: Tensor, transform: Transform, measure: BucketMeasure
) -> Tensor:
    """Compute the divergences (N,) in plain PyTorch, which torch.func can differentiate."""
    buckets = definition(logits, words.ids, keep, transform)
    return bucket_divergence(buckets, words.buckets(buckets), keep, measure, "eager")
