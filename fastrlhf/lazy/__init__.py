"""Logits that are not computed until somebody asks for them, and mostly never: a training loop that
nobody edits takes the fused path.

Where a reader starts: `head` puts a lazy tensor where a model's head would return logits; `tensor`
is that tensor; `functions` lists what is known of it, which `views`, `maps`, `endings` and `losses`
do; `scores` computes it from a `source`, what entered the head; `graph` and `gradient` bring
gradients back. For what is not known, `building` takes plain tensors, which `recipe` makes.
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
