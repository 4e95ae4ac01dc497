"""Logits that are computed only when code reads their numbers, which most training loops never do:
so a loop that nobody edits takes the fused path.

A *lazy* tensor stands for logits, or for a tensor made from them, and holds no numbers. A *plain*
tensor is an ordinary one. To *build* logits is to compute them, tokens × vocabulary, after all.

Where a reader starts, in the order of a call:

    head               lets a model's head return a lazy tensor in place of logits
    tensor             the lazy tensor: PyTorch functions that are called on it arrive here
    functions          the functions that are known, which need no built logits; views, maps,
                       endings and losses say what each of them does
    meaning            what a lazy tensor's numbers are, in terms of the head's logits
    scores, source     compute what a known function returns from what entered the head
    graph, gradient    bring gradients back to what entered the head
    asked_gradients    hooks, retain_grad and other calls that ask for the gradient of logits
    building, recipe   for a function that is not known: build the logits, and repeat on them the
                       calls that made the lazy tensors
    report             which lines of code used lazy logits, and which built them
"""

from .head import disable_lazy_logits, enable_lazy_logits, lazy_logits
from .report import LazyReport, LazyUse, lazy_report

__all__ = [
    "LazyReport",
    "LazyUse",
    "disable_lazy_logits",
    "enable_lazy_logits",
    "lazy_logits",
    "lazy_report",
]
