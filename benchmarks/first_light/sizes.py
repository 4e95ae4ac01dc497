"""The sizes of all inputs: as in real models, or small enough for Triton's interpreter."""

from typing import NamedTuple

import torch

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


class Sizes(NamedTuple):
    """Sizes of the inputs of checks and timings."""

    # Two vocabularies: with the first all rows start at multiples of 16 bytes, with the second they
    # start anywhere. For each, the dtypes of the checks from logits and of those from hidden
    # states.
    vocabs: tuple[int, int]
    dtypes: tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]
    linear_dtypes: tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]
    tokens: int  # length of the two sequences in checks from logits
    past_int32: tuple[int, int]  # rows and vocabulary of the largest checked tensor
    linear_rows: int  # rows in checks from hidden states, a multiple of 4
    linear_width: int
    scan_lengths: tuple[int, ...]
    products: tuple[tuple[int, int, int], ...]  # (m, k, n)
    copied_bytes: int
    matmul_side: int
    timed: tuple[tuple[int, int], ...]  # (rows, vocabulary), the central one first
    few_rows: int  # compiles the same code as the timed numbers of rows
    scan: tuple[int, int]  # sequences and tokens
    step: tuple[int, int]  # sequences and tokens of a step whose launches are counted
    plan_rows: int
    plan_width: int
    chunk: int  # rows of a single matmul
    workspaces: tuple[int, int]  # bytes of fp32 logits held at a time
    waiting: tuple[int, int]  # bytes of gradients of logits that wait to be added to the weight's
    variants: int | None  # number of launch shapes tried for a kernel; None: all
    model: dict[str, int]  # options of the random model that trainers train
    trainer_batch: tuple[int, int]  # sequences, and tokens of the longest one
    trainer_rounds: int


REAL = Sizes(
    vocabs=(128256, 50257),
    dtypes=((_BF16, _FP32), (_BF16, _FP32)),
    linear_dtypes=((_BF16, _FP16, _FP32), (_BF16, _FP16, _FP32)),
    tokens=5,
    past_int32=(2**31 // 262144 + 2, 262144),
    linear_rows=160,
    linear_width=256,
    scan_lengths=(1, 33, 777, 1024, 2500, 5000),
    products=((1, 64, 50257), (96, 64, 512), (96, 512, 50257), (130, 4096, 1000)),
    copied_bytes=2**31,
    matmul_side=8192,
    timed=((8192, 128256), (8192, 151936), (8192, 50257)),
    few_rows=16,
    scan=(8, 1024),
    step=(8, 128),
    plan_rows=8192,
    plan_width=4096,
    chunk=1024,
    workspaces=(2**29, 2**30),
    waiting=(0, 2**30),
    variants=None,
    # This model has 0.6 billion parameters.
    model={
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    trainer_batch=(16, 512),
    trainer_rounds=5,
)  # fmt: skip

TINY = Sizes(
    vocabs=(1056, 1057),
    dtypes=((_BF16,), (_FP32,)),
    linear_dtypes=((_BF16,), ()),
    tokens=2,
    past_int32=(3, 1056),
    linear_rows=8,
    linear_width=16,
    scan_lengths=(1, 33, 70),
    products=((1, 8, 17), (3, 8, 16)),
    copied_bytes=2**20,
    matmul_side=64,
    timed=((2, 1056), (2, 1057)),
    few_rows=2,
    scan=(2, 64),
    step=(2, 2),
    plan_rows=8,
    plan_width=16,
    chunk=4,
    workspaces=(2**15, 2**16),
    waiting=(0, 2**16),
    variants=2,
    model={
        "vocab_size": 1056, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    trainer_batch=(4, 8),
    trainer_rounds=2,
)  # fmt: skip
