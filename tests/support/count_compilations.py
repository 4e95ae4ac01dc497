"""Count how often Triton would compile the fused policy loss over many batches and settings, the
kernels of kept ids over many lengths, and statistics that leave out any number of words.

Usage: python count_compilations.py (with tests/ on PYTHONPATH and without TRITON_INTERPRET). Prints
a line of JSON: compilations by surrogate, dtype and model, or by kernel. Nothing is compiled and no
kernel runs: launches are recorded, and Triton's own key of its cache says which of them would share
a binary.
"""

import json
from collections.abc import Iterator

import pytest
import torch

import fastrlhf
from fastrlhf.kernels.token_stats import RowQuestion, token_stats_message
from fastrlhf.losses import fused_policy
from support.compile_lint import cache_key, captured_launches
from support.lint_kernels import launch_kept_ids

SURROGATES = ["clip", "cispo", "sapo", "plain", "dppo_tv", "dppo_kl"]
DTYPES = [torch.bfloat16, torch.float32]
# One whose rows all start at 16 bytes, and one whose rows do not.
VOCABS = [128, 131]


def settings() -> Iterator[tuple[int, int, dict]]:
    """Twenty batch shapes, each with its own temperature, bounds, coefficients and reduction."""
    reductions = ["token-mean", "sequence-mean", "sequence-sum", "constant"]
    for i in range(20):
        yield 1 + i % 3, 3 + 5 * i, {
            "temperature": 0.5 + 0.05 * i, "clip_low": 0.01 * i, "clip_high": 0.02 * i,
            "dual_clip": None if i % 3 == 0 else 2.0 + i, "kl_coef": 0.01 * (i % 4),
            "entropy_coef": 0.005 * (i % 2), "reduction": reductions[i % 4], "normalizer": 1.0 + i,
            "sapo_temperatures": (1.0 + 0.1 * i, 1.0), "scale": 1.0 + 0.1 * i,
        }  # fmt: skip


def step(surrogate: str, dtype: torch.dtype, vocab: int, batch: int, tokens: int, given: dict):
    """One loss; its log-probs are slices that start anywhere in memory, its integers vary."""
    logits = torch.zeros(batch, tokens, vocab, dtype=dtype, requires_grad=True)
    targets = torch.zeros(batch, tokens, dtype=torch.int32 if tokens % 2 else torch.int64)
    rows = torch.zeros(batch, tokens + 1)[:, 1:]
    fastrlhf.logits_policy_loss(
        logits, targets, None if tokens % 7 == 0 else rows, torch.ones(batch),
        torch.ones(batch, tokens), surrogate=surrogate, ref_logprobs=rows,
        kl_weights=rows if tokens % 3 == 0 else None, **given,
    )  # fmt: skip


def compilations_of_kept_ids() -> dict[str, int]:
    keys: dict[str, set] = {}
    for i in range(20):
        with captured_launches(pytest.MonkeyPatch()) as launches:
            launch_kept_ids(64, torch.bfloat16, True, tokens=1 + 3 * i, kept=1 + 17 * i)
        for launch in launches:
            keys.setdefault(launch.kernel.__name__, set()).add(cache_key(launch))
    return {name: len(of_kernel) for name, of_kernel in keys.items()}


def compilations_of_words_left_out() -> int:
    """Of 17 to 32 words, whose numbers start anywhere in memory."""
    keys = set()
    for words in range(17, 33):
        logits = torch.zeros(1, words, 128, dtype=torch.bfloat16)
        question = RowQuestion(
            torch.zeros(words, dtype=torch.int64), 1.0, None, 1.0, -2, False,
            left_out=torch.zeros(words, words, dtype=torch.int32),
        )  # fmt: skip
        with captured_launches(pytest.MonkeyPatch()) as launches:
            token_stats_message(logits, question)
        keys |= {cache_key(x) for x in launches if "fwd" in x.kernel.__name__}
    return len(keys)


def main() -> None:
    fused_policy.use_triton = lambda *_: True  # no GPU, and no interpreter
    found, keys_of = {}, {}
    for vocab in VOCABS:
        for surrogate in SURROGATES:
            for dtype in DTYPES:
                with captured_launches(pytest.MonkeyPatch()) as launches:
                    for batch, tokens, given in settings():
                        step(surrogate, dtype, vocab, batch, tokens, given)
                assert len(launches) == 20
                keys = {cache_key(launch) for launch in launches}
                keys_of[surrogate, dtype, vocab] = keys
                found[f"{surrogate}, {dtype}, {vocab}"] = len(keys)
    both = set.union(*(keys_of["clip", torch.bfloat16, vocab] for vocab in VOCABS))
    found["both vocabularies"] = len(both)
    found["words left out"] = compilations_of_words_left_out()
    print(json.dumps(found | compilations_of_kept_ids()))


if __name__ == "__main__":
    main()
