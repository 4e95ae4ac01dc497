"""Inputs of a model with lazy logits, and what tests do with them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastrlhf
from support.lazy_wrappers import warnings_of_builds
from support.wrapped_losses import make_batch

X = make_batch(0)
INPUTS = {"input_ids": X.ids, "attention_mask": X.attention}


@contextmanager
def nothing_built() -> Iterator[None]:
    with warnings_of_builds() as said:
        yield
    assert not said
    assert not fastrlhf.lazy_report().built


def log_probs(logits: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, X.ids[:, 1:, None])[..., 0]


def saved(x: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return buffer
