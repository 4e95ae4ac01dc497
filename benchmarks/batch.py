"""The batch that every operation and every provider of the benchmarks starts from.

It has B sequences of T tokens. For DPO these are the chosen sequences, then the rejected ones; for
PPO and GRPO they are samples with advantages. A share of each sequence is a prompt, whose tokens no
loss counts. The batch holds the model's outputs: log-probs, logits, or hidden states with a head,
depending on the source of the operation. For an operation that compares two models, it holds the
same kind of outputs of a second model (a teacher or a reference).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

IGNORED = -100
TILE = 4096  # no kernel processes more entries of a row at a time

Source = Literal["tokens", "logits", "two logits", "hidden", "two hidden"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch, and the other properties on which its cost depends."""

    sequences: int
    tokens: int
    vocab: int = 0
    width: int = 0
    prompt: float = 0.5
    trained: bool = False  # whether the head needs a gradient, if there is a head
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        """Number of all tokens, including prompts."""
        return self.sequences * self.tokens

    @property
    def live(self) -> int:
        """Number of tokens that a loss counts."""
        return self.sequences * (self.tokens - self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt of each sequence, which no loss counts."""
        return round(self.tokens * self.prompt)

    def small(self) -> Shape:
        """Return the shape of a small batch of the same kind, for a quick check.

        Its rows are longer than a tile of a kernel. They start at multiples of 16 bytes if the rows
        of `self` do.
        """
        vocab = TILE + (16 if self.vocab % 16 == 0 else 17)
        return replace(self, sequences=4, tokens=16, vocab=vocab, width=min(self.width, 64))


@dataclass
class Batch:
    """Tensors of a training step. Tensors that the operation's source does not give are None."""

    shape: Shape
    targets: Tensor  # (B, T), IGNORED at the prompt
    upstream: Tensor  # (B, T) gradient of the log-probs, if these are the result
    advantages: Tensor  # (B,)
    old: Tensor  # (B, T) log-probs at sampling, such that some ratios are clipped
    logprobs: Tensor | None = None  # (B, T)
    logits: Tensor | None = None  # (B, T, V)
    other_logits: Tensor | None = None
    hidden: Tensor | None = None  # (B, T, H)
    weight: Tensor | None = None  # (V, H)
    other_hidden: Tensor | None = None
    other_weight: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Mask (B, T) of the tokens that a loss counts."""
        return self.targets != IGNORED

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Tensors that require a gradient, by name."""
        tensors = {name: getattr(self, name) for name in ("logprobs", "logits", "hidden", "weight")}
        return {name: x for name, x in tensors.items() if x is not None and x.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are not None, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def restore(self, *, logits: bool) -> None:
        """Drop the gradients. With `logits`, restore the logits, which a backward overwrote."""
        for leaf in self.leaves.values():
            leaf.grad = None
        if logits:
            _fill(self.logits, 1)

    def exact(self) -> Batch:
        """Return a copy in fp64."""
        return replace(
            self,
            **{
                name: value.detach().double().requires_grad_(value.requires_grad)
                for name, value in self.tensors().items()
                if value.is_floating_point()
            },
        )


def make_batch(
    source: Source, shape: Shape, device: torch.device, *, gradients: bool = True
) -> Batch:
    """Draw a batch. The same arguments give the same batch; `gradients`: leaves require them."""
    b, t, v, h = shape.sequences, shape.tokens, shape.vocab, shape.width
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    targets = torch.randint(max(v, 1), (b, t), generator=generator)
    targets[:, : shape.prompt_tokens] = IGNORED
    # Log-ratios are ±0.1 and ±0.3. With bounds of 0.2 those of ±0.3 are clipped, and none is so
    # close to a bound that rounding could move it across.
    log_ratios = torch.tensor([-0.3, -0.1, 0.1, 0.3])[torch.randint(4, (b, t), generator=generator)]
    batch = Batch(
        shape, targets.to(device), normal(b, t), advantages=normal(b), old=log_ratios.to(device)
    )
    batch.upstream *= batch.mask

    def tensor(seed: int, *size: int, scale: float = 2.0) -> Tensor:
        return _fill(torch.empty(size, device=device, dtype=shape.dtype), seed, scale)

    # Logits have a standard deviation of 2, so that predictions are neither certain nor uniform.
    if source == "tokens":
        batch.logprobs = tensor(1, b, t).abs_().neg_().requires_grad_(gradients)
        return batch
    if "logits" in source:
        batch.logits = tensor(1, b, t, v).requires_grad_(gradients)
    else:
        batch.hidden = tensor(1, b, t, h, scale=1.0).requires_grad_(gradients)
        batch.weight = tensor(2, v, h, scale=2 * h**-0.5)
        batch.weight.requires_grad_(gradients and shape.trained)
    if source == "two logits":
        batch.other_logits = tensor(3, b, t, v)
    if source == "two hidden":
        batch.other_hidden = tensor(3, b, t, h, scale=1.0)
        batch.other_weight = tensor(4, v, h, scale=2 * h**-0.5)
    batch.old.neg_().add_(_logprobs(batch))
    return batch


@torch.no_grad()
def _fill(tensor: Tensor, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return tensor.normal_(0, scale, generator=generator)


@torch.no_grad()
def _logprobs(batch: Batch) -> Tensor:
    """Compute log-probs of the targets, one sequence at a time to save memory."""
    rows = []
    for i, targets in enumerate(batch.targets):
        logits = batch.hidden[i] @ batch.weight.T if batch.logits is None else batch.logits[i]
        picked = targets.clamp(min=0)[:, None]
        rows.append(logits.float().log_softmax(-1).gather(-1, picked)[:, 0])
    return torch.stack(rows)
