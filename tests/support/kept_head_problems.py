"""Hidden states, a head and the ids that are kept for each token, beside the logits of all ids."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import linear_token_stats, reference
from support.kept import random_support

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
NAMES = ("is_top1", "mean_logit", "log_sum_sq_probs")
SEQUENCES, TOKENS, WIDTH, VOCAB = 3, 5, 24, 37
SHAPE = (SEQUENCES, TOKENS)


class Problem:
    """Hidden states with garbage in an ignored row, a head, targets and their support."""

    def __init__(self, dtype=torch.float64, device="cpu", trained=True, **options):
        self.targets = torch.randint(VOCAB, SHAPE)
        self.targets[0, 2] = -100
        self.support = random_support(self.targets, VOCAB, **options)
        hidden = torch.randn(*SHAPE, WIDTH)
        hidden[0, 2] = torch.nan
        tensors = hidden, torch.randn(VOCAB, WIDTH) / 3, torch.randn(VOCAB)
        needs = True, trained, trained
        leaves = [
            x.to(dtype).to(device).requires_grad_(need)
            for x, need in zip(tensors, needs, strict=True)
        ]
        self.hidden, self.weight, self.bias = leaves
        self.wanted = [x for x in leaves if x.requires_grad]
        self.targets = self.targets.to(device)
        self.support = tuple(x.to(device) for x in self.support)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """Logits in fp64, and what they are made of."""
        inputs = [x.detach().cpu().double().nan_to_num() for x in self.head]
        for x, of in zip(inputs, self.head, strict=True):
            x.requires_grad_(of.requires_grad)
        return F.linear(*inputs), [x for x in inputs if x.requires_grad]

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def stats(self, **options):
        return linear_token_stats(
            self.hidden, self.weight, self.targets, bias=self.bias, support=self.support, **options
        )

    def defined(self, logits: Tensor, **options):
        support = tuple(x.cpu() for x in self.support)
        own = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
        return reference.kept_token_stats(logits, self.targets.cpu(), support, **own)
