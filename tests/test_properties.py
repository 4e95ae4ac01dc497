"""Properties of the operations over random shapes and strides."""

import pytest
import torch

import fastrlhf

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate
from support.oracle import token_stats_oracle
from support.plain import plain_token_stats


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_property_any_shape_and_stride(data) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lead = data.draw(st.lists(st.integers(1, 3), max_size=3))
    vocab, pad, step = (data.draw(st.integers(1, n)) for n in (90, 3, 3))
    backing = torch.randn(*lead, vocab * step + pad, device=device) * 5
    logits = backing[..., pad : pad + vocab * step : step]
    targets = torch.randint(vocab, tuple(lead), device=device)
    if lead and data.draw(st.booleans()):
        logits, targets = logits.transpose(0, len(lead) - 1), targets.transpose(0, len(lead) - 1)
    flat = logits.reshape(-1, vocab)
    expected = token_stats_oracle(flat, targets.reshape(-1))
    plain = plain_token_stats(flat, targets.reshape(-1))
    for impl in ("eager", "triton"):
        stats = fastrlhf.token_stats(logits, targets, impl=impl, entropy=True)
        for name, by_plain in zip(("logprob", "entropy", "lse"), plain, strict=True):
            value, exact = getattr(stats, name), getattr(expected, name)
            assert value.shape == targets.shape
            size = max(1.0, float(flat.abs().max()))  # of the logits, which may cancel
            assert_as_accurate(value.reshape(-1), by_plain, exact, size=size, of=name)
