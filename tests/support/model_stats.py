"""What the statistics of a model's tokens must be, from the model's own logits."""

import torch
from torch import nn

import fastrlhf
from support.tiny_models import VOCAB, batch


def expected(model: nn.Module, inputs: dict[str, torch.Tensor], temperature: float = 1.0):
    """Log-prob and entropy from the model's own logits, in fp64."""
    ids, mask = inputs["input_ids"], inputs["mask"]
    logits = model(ids, attention_mask=inputs["attention_mask"], use_cache=False).logits
    log_p = (logits[:, :-1].double() / temperature).log_softmax(-1)
    logprob = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    return logprob * mask[:, 1:], -(log_p.exp() * log_p).sum(-1) * mask[:, 1:]


def assert_same(model: nn.Module, tolerance: float = 1e-4, **options) -> None:
    """Compare values, and the gradients of all parameters."""
    inputs = batch()
    stats = fastrlhf.model_token_stats(model, **inputs, entropy=True, temperature=0.7, **options)
    logprob, entropy = expected(model, inputs, 0.7)
    assert stats.logprob.shape == (3, 8)
    bounds = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(stats.logprob.double(), logprob, **bounds)
    torch.testing.assert_close(stats.entropy.double(), entropy, **bounds)
    assert logprob.std() > 0.1
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn(3, 8)
    found, wanted = (
        torch.autograd.grad(
            ((a + 0.5 * b) * weights).sum(), list(trained.values()), allow_unused=True
        )
        for a, b in ((stats.logprob, stats.entropy), (logprob, entropy))
    )
    scale = max(float(g.norm()) for g in wanted if g is not None)
    for name, a, b in zip(trained, found, wanted, strict=True):
        if b is None or a is None:
            assert a is b is None, name
        else:
            # Of its own size, so that a gradient that is missing fails; rounding has a floor.
            bound = 10 * tolerance * max(float(b.norm()), 1e-3 * scale)
            assert float((a - b).norm()) <= bound, name
            assert float(b.norm()) > bound or float(b.norm()) < 1e-5 * scale, name


BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
