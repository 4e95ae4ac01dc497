"""Compile ahead what a training run will use.

What is compiled is in `compiled_token_stats.py`, `compiled_divergence.py`, `compiled_fisher.py` and
`compiled_gae.py`; `compiled.py` compiles it.
"""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .backend import backend_of
from .checks import check_bool, check_names
from .compiled import compiler_is_there, required
from .divergence import kl_divergence
from .fisher import softmax_fisher_product
from .gae import gae
from .token_stats import token_stats

OPERATIONS = ("token_stats", "kl_divergence", "softmax_fisher_product", "gae")

# Enough for a function to be called; what is compiled fits all sizes.
_ROWS, _VOCAB = 4, 64


@torch.inference_mode(False)
@torch.enable_grad()
def warm_up(
    dtype: torch.dtype = torch.float32,
    *,
    operations: Iterable[str] = ("token_stats",),
    device: torch.device | str = "cpu",
    entropy: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: str = "compiled",
) -> float:
    """Compile ahead what operations use, forward and backward, and return the seconds it took.

    Eager equivalent: none. It calls each operation on zeros, which has no effect on other results.

    Without it, the first call of an operation compiles what it uses, once for each combination of
    dtypes and options, and never again for another size. The value of a temperature, softcap or
    scale makes no difference, but whether there is one does; so does whether the gradient of the
    entropy is asked for beside that of the log-prob, whether rows of logits have gaps between them,
    and `torch.use_deterministic_algorithms`. What is compiled is kept on disk, where PyTorch's
    compiler keeps all it makes, so that the next process loads it. The log of "fastrlhf" says what
    was compiled, and in how many seconds.

    It does not prepare the jsd, what `with_stats` names, or a divergence of two dtypes.

    Args:
        dtype: of the logits. From hidden states they are fp32 (fp64 for fp64) on a CPU, whatever
            the dtype of the hidden states.
        operations: names of those to prepare: "token_stats", which is what the losses of tokens
            from logits and from hidden states use; "kl_divergence", forward and reverse;
            "softmax_fisher_product"; "gae" (fp32, sequences in rows).
        device: on which they will run.
        entropy: prepare the entropy and its gradient too.
        temperature, softcap, scale: as `token_stats`; the two last also of the divergence, the
            temperature of all.
        impl: "compiled", or another backend, whose first calls are then made. "auto" stands for
            the backend that it takes for large calls.

    Raises:
        TypeError, ValueError: an unknown operation, or an option as `token_stats`.
        RuntimeError: of "compiled", there is no C++ compiler, or no vector instructions; PyTorch's
            compiler failed, is turned off, or cannot work under a mode or a tracer.

    Example:
        >>> seconds = fastrlhf.warm_up(torch.bfloat16, entropy=True, impl="eager")
        >>> seconds > 0
        True
    """
    names = check_names("operations", operations, OPERATIONS)
    check_bool("entropy", entropy)
    device = torch.device(device)
    logits = torch.zeros(_ROWS, _VOCAB, dtype=dtype, device=device)
    impl = backend_of(impl, logits, sys.maxsize)  # of a call that is large enough
    if impl == "compiled" and not compiler_is_there():
        raise RuntimeError(
            "warm_up: found no C++ compiler (the environment variable CXX names one), or no vector "
            "instructions of this processor"
        )
    start = time.perf_counter()
    transform: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "scale": scale}

    def of_tokens() -> None:
        targets = torch.zeros(_ROWS, dtype=torch.int64, device=device)
        stats = token_stats(_leaf(logits), targets, entropy=entropy, impl=impl, **transform)
        stats.logprob.sum().backward(retain_graph=entropy)
        if stats.entropy is not None:
            (stats.logprob + stats.entropy).sum().backward()

    def of_divergence() -> None:
        sides = _leaf(logits), _leaf(logits)
        kl_divergence(*sides, impl=impl, **transform).sum().backward()

    def of_product() -> None:
        softmax_fisher_product(logits, logits, temperature=temperature, impl=impl)

    def of_advantages() -> None:
        tokens = torch.zeros(_ROWS, _VOCAB, dtype=torch.float32, device=device)
        gae(tokens, tokens, torch.ones_like(tokens), impl=impl)

    calls: dict[str, Callable[[], None]] = dict(
        zip(OPERATIONS, (of_tokens, of_divergence, of_product, of_advantages), strict=True)
    )
    with required():
        for name in names:
            calls[name]()
    return time.perf_counter() - start


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_(True)
