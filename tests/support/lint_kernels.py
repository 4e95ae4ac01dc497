"""Compile every kernel at the launches its launcher makes, and print a report on each as a line of
JSON.

Usage: python lint_kernels.py fewest|few|all|prefetching TARGET... (with tests/ on PYTHONPATH and
without TRITON_INTERPRET). The fewest are of every kernel, in bf16: with every option on rows that
start at 16 bytes, and without any on rows that do not. The few are in fp32 too. A launch that is
prefetching has three tiles in flight.
"""

import json
import re
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from fastrlhf.kernels import (
    divergence,
    fisher,
    kept_ids,
    policy_loss,
    preference_loss,
    scan,
    token_stats,
)
from fastrlhf.kernels.launch import SHAPES
from fastrlhf.reference import FURTHER_STATS
from support.compile_lint import Launch, captured_launches, compile_launch, launch_key

VOCABS = [32000, 50257, 128256, 151936, 262144]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FEWEST = [(32000, torch.bfloat16, True), (50257, torch.bfloat16, False)]
FEW = {
    "fewest": FEWEST,
    "few": [*FEWEST, (32000, torch.float32, False)],
    "prefetching": [(32000, torch.bfloat16, False)],
}
ROWS = 96


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_token_stats(
    vocab: int, dtype: torch.dtype, everything: bool, with_stats: tuple[str, ...] = ()
) -> None:
    """Forward and backward, plain or with every option, and some further statistics."""
    acc = torch.promote_types(dtype, torch.float32)
    logits = meta(1, ROWS, vocab, dtype=dtype)
    targets = meta(ROWS, dtype=torch.int64)
    transform = {
        "temperature": meta(ROWS, dtype=acc) if everything else 1.0,
        "softcap": 30.0 if everything else None,
        "scale": 1.0,
    }
    stats = token_stats.token_stats_forward(
        logits, targets, ignore_index=-100, entropy=everything, with_stats=with_stats, **transform
    )
    logprob, entropy, _, peak, log_norm, *_ = stats
    token_stats.token_stats_backward(
        logits,
        logits,
        targets,
        (logprob, entropy, peak, log_norm),
        logprob,
        entropy if everything else None,
        logprob if everything else None,
        logprob if everything else None,
        **transform,
    )
    # Of ranks that share the vocabulary.
    question = token_stats.RowQuestion(
        targets, transform["temperature"], transform["softcap"], 1.0, -2, everything, with_stats
    )
    message = token_stats.token_stats_message(logits, question)
    token_stats.token_stats_of_messages(meta(8, *message.shape, dtype=acc), question)
    # With words left out.
    left_out = meta(ROWS, 100 if everything else 3, dtype=torch.int32)
    without = question._replace(entropy=False, with_stats=(), left_out=left_out)
    token_stats.token_stats_message(logits, without)


def launch_preference_loss(
    formula: str, dtype: torch.dtype, per_token: bool, packed: bool = False
) -> None:
    """Forward and backward, from sums or from token log-probs with a mask, in rows or packed."""
    sequences, tokens = 1 if packed else 16, 500 if per_token else 1
    logps = meta(sequences, tokens, dtype=dtype)
    mask = meta(sequences, tokens, dtype=torch.bool) if per_token else None
    cu_seqlens = meta(17, dtype=torch.int64) if packed else None
    index = meta(8, dtype=torch.int64)
    losses, slopes, _, weights = preference_loss.preference_loss_forward(
        logps,
        logps if per_token else logps[:, 0],
        index,
        index,
        mask,
        None,
        formula=formula,
        average=per_token,
        beta=0.1,
        label_smoothing=0.1,
        cu_seqlens=cu_seqlens,
    )
    preference_loss.preference_loss_backward(
        index, index, mask, slopes, weights, losses, tokens=tokens, dtype=dtype,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def launch_policy_loss(
    vocab: int, dtype: torch.dtype, surrogate: str, kl_estimator: str, everything: bool
) -> None:
    """Statistics, loss and gradient, plain or with every option; and the scaling of a gradient."""
    acc = torch.promote_types(dtype, torch.float32)
    logits = meta(1, ROWS, vocab, dtype=dtype)
    rows = meta(ROWS, dtype=acc)
    policy_loss.policy_loss(
        logits, logits, meta(ROWS, dtype=torch.int64), rows, rows, rows, rows, rows,
        surrogate=surrogate, kl_estimator=kl_estimator, kl_bias_correction=everything,
        settings=policy_loss.PolicySettings(0.8, 1.2, 3.0, 1.0, 1.05, 0.1, 0.01),
        entropy=everything, temperature=rows if everything else 1.0,
        softcap=30.0 if everything else None, scale=1.0, ignore_index=-100,
    )  # fmt: skip
    policy_loss.scale_(logits, meta(dtype=acc))


def launch_divergence(
    vocab: int, dtype: torch.dtype, share: float | None, everything: bool
) -> None:
    """Forward, and backward with respect to each side, of a KL or of a mixture."""
    acc = torch.promote_types(dtype, torch.float32)
    logits, rows = meta(1, ROWS, vocab, dtype=dtype), meta(ROWS, dtype=acc)
    mask = meta(ROWS, dtype=torch.bool)
    transform = {
        "temperature": rows if everything else 1.0,
        "softcap": 30.0 if everything else None,
        "scale": 1.0,
    }
    divergence.divergence_forward(logits, logits, mask, share=share, **transform)
    norms = meta(6, ROWS, dtype=acc)  # of ranks that share the vocabulary
    divergence.divergence_sums(logits, logits, mask, norms, share=share, **transform)
    for of_p in (True, False) if share is None else (True,):
        divergence.divergence_backward(
            logits, logits, logits, mask, norms, rows, of_p=of_p, share=share, **transform
        )


def launch_fisher(vocab: int, dtype: torch.dtype, per_token: bool) -> None:
    """Product and quadratic form."""
    logits, mask = meta(1, ROWS, vocab, dtype=dtype), meta(ROWS, dtype=torch.bool)
    rows = meta(ROWS, dtype=torch.promote_types(dtype, torch.float32))
    fisher.fisher_product(logits, logits, mask, temperature=rows if per_token else 1.0, dtype=dtype)


def launch_scan(dtype: torch.dtype, packed: bool = False, per_sequence: bool = False) -> None:
    """Advantages, on blocks as wide as on a GPU, of rows or of packed tokens, with a λ and a last
    value of each sequence or without.
    """
    sequences, cu_seqlens = (1, meta(17, dtype=torch.int64)) if packed else (16, None)
    tokens, mask = meta(sequences, 500, dtype=dtype), meta(sequences, 500, dtype=torch.bool)
    each = meta(16, dtype=torch.float32) if per_sequence else None
    scan.gae(
        tokens, tokens, mask, gamma=1.0, lam=0.95, cu_seqlens=cu_seqlens, lams=each,
        last_values=each,
    )  # fmt: skip


def launch_kept_ids(
    width: int, dtype: torch.dtype, everything: bool, *, tokens: int = ROWS, kept: int = 1001
) -> None:
    """Products with rows of a weight, statistics of them, and gradients."""
    acc = torch.promote_types(dtype, torch.float32)
    hidden, weight = meta(tokens, width, dtype=dtype), meta(1000, width, dtype=dtype)
    ids, targets = meta(kept, dtype=torch.int64), meta(tokens, dtype=torch.int64)
    live, offsets = meta(tokens, dtype=torch.bool), meta(tokens + 1, dtype=torch.int64)
    logits, rows = meta(kept, dtype=acc), meta(tokens, dtype=acc)
    wanted = meta(kept, dtype=torch.bool)
    kept_ids.add_kept_products(logits, hidden, weight, ids, ids, wanted, operands=dtype)
    kept_ids.sum_weighted_rows(hidden, logits, weight, ids, offsets, ids, operands=dtype)
    transform = {
        "temperature": rows if everything else 1.0,
        "softcap": 30.0 if everything else None,
        "scale": 1.0,
    }
    kept_ids.kept_stats_forward(
        logits, ids, offsets, live, targets, targets, entropy=everything,
        with_stats=FURTHER_STATS if everything else (), **transform,
    )  # fmt: skip
    slopes = (rows,) * 4 if everything else (rows, None, None, None)
    kept_ids.kept_stats_backward(
        logits, ids, ids, targets, targets, live, (rows,) * 4, slopes, **transform
    )


def launches_of(which: str) -> dict:
    """Distinct launches, with the vocabulary that each is for (0 for those without)."""
    found: dict = {}

    def record(vocab: int, start: Callable[..., None], *arguments: Any) -> None:
        with captured_launches(pytest.MonkeyPatch()) as launches:
            start(*arguments)
        for one in launches:
            found.setdefault(launch_key(one), (one, vocab))

    every = which == "all"
    settings = list(product(VOCABS, DTYPES, (False, True))) if every else FEW[which]
    for vocab, dtype, everything in settings:
        for with_stats in ((), FURTHER_STATS):
            record(vocab, launch_token_stats, vocab, dtype, everything, with_stats)
        # Surrogates and penalties are a few numbers per row: one stands for them all.
        record(vocab, launch_policy_loss, vocab, dtype, "clip", "k3", everything)
        # Vocabularies matter by their residue alone, which two show.
        if vocab in VOCABS[:2]:
            share = 0.5 if everything else None
            record(vocab, launch_divergence, vocab, dtype, share, everything)
            record(vocab, launch_fisher, vocab, dtype, everything)
    others = [(name, "k3") for name in policy_loss.SURROGATES]
    others += [("clip", name) for name in policy_loss.KL_ESTIMATORS]
    for vocab, names in product(VOCABS if every else [], others):
        record(vocab, launch_policy_loss, vocab, torch.bfloat16, *names, True)
    formulas = list(preference_loss.FORMULAS) if every else ["sigmoid"]
    dtypes = DTYPES if every else sorted({dtype for _, dtype, _ in settings}, key=str)
    layouts = [(False, False), (True, False), (True, True)]
    for formula, dtype, layout in product(formulas, dtypes, layouts):
        record(0, launch_preference_loss, formula, dtype, *layout)
    for dtype, packed in product(dtypes, (False, True)):
        record(0, launch_scan, dtype, packed)
        record(0, launch_scan, dtype, packed, True)
    for dtype, (width, everything) in product(dtypes, ((4096, True), (4099, False))):
        record(width, launch_kept_ids, width, dtype, everything)
    return found


def exchanges_after_stores(assembly: str) -> int:
    """How often threads of an NVIDIA GPU give each other something once tokens are stored."""
    first = re.search(r"\bSTG\.\S*(128|U16)", assembly)
    return len(re.findall(r"\b(?:LDS|STS)\b", assembly[first.start() :])) if first else 0


def thread_bytes(launch: Launch) -> int:
    """Bytes of a tile of a row that each thread of a warp of 32 has; 0 where there are no tiles."""
    tile = launch.arguments.get("LANES", 0) * launch.arguments.get("VEC", 0)
    rows = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    itemsize = max(rows, key=torch.Tensor.numel).itemsize
    return tile * itemsize // (32 * launch.options.get("num_warps", 4))


def main(which: str, targets: list[str]) -> None:
    if which == "prefetching":
        for kernel, shape in SHAPES.items():
            SHAPES[kernel] = shape._replace(stages=3)
    launches = launches_of(which)
    for target, (launch, vocab) in product(targets, launches.values()):
        binary = compile_launch(launch, target)
        report = {
            "target": target,
            "kernel": launch.kernel.__name__,
            "vocab": vocab,
            "dtypes": sorted(
                {str(x.dtype) for x in launch.arguments.values() if hasattr(x, "dtype")}
            ),
            "warps": launch.options.get("num_warps", 4),
            "thread_bytes": thread_bytes(launch),
            "words_left_out": launch.arguments.get("WORDS_PADDED", 0),
            "registers": binary.registers,
            "stack": binary.stack,
            "loads": len(binary.load_bits),
            "wide_loads": binary.load_bits.count(128),
            "asynchronous_copies": binary.assembly.count("LDGSTS"),
            "stores": len(binary.store_bits),
            "wide_stores": binary.store_bits.count(128),
            "asserts": binary.asserts,
            "exchanges_after_stores": exchanges_after_stores(binary.assembly),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
