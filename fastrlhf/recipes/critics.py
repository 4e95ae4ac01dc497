"""Critics of PPO: they predict the return from each token on.

A critic is either a value head on the policy's hidden states (the default) or a separate model
(`--separate-critic`). The recipe `ppo` calls both in the same way.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from .models import add_adapters, dense_folder, source_of
from .settings import LoraOptions

_HEADS = ("score", "classifier")  # the names that architectures give a token classifier's head


class ValueHead(nn.Module):
    """A linear layer on the policy's last hidden states, which also enter the language model head.

    The gradient of the value loss stops at the hidden states and does not reach the policy. With
    rewards of a larger scale, the value loss would otherwise outweigh the policy's own loss.
    """

    def __init__(self, width: int):
        """Start with all values at 0, so that the first advantages equal the returns."""
        super().__init__()
        # The entries of the hidden states are about 1. With this scale, one step of Adam at the
        # learning rate r moves a value by 4 r √width. At the recipe's rate this is about a tenth,
        # which suits returns between -1 and 1.
        self.scale = 4 * width**-0.5
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def of(cls, policy: PeftModel, options: LoraOptions) -> "ValueHead":
        """Make a value head for the hidden states of a policy."""
        return cls(policy.config.get_text_config().hidden_size).to(policy.device)

    def forward(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Predict values (B, T-1) of the states before input_ids[:, 1:], from hidden (B, T, H)."""
        values: Tensor = self.linear(hidden.detach().float() * self.scale)
        return values[:, :-1, 0]


class SeparateCritic(nn.Module):
    """A copy of the model with LoRA adapters and a value head of its own."""

    def __init__(self, source: str, rank: int, targets: str | None, device: torch.device):
        """Load the model in fp32 with one output for each token, and put adapters on it."""
        super().__init__()
        model = AutoModelForTokenClassification.from_pretrained(
            dense_folder(source), num_labels=1, dtype=torch.float32
        )
        head = next(getattr(model, name) for name in _HEADS if hasattr(model, name))
        nn.init.zeros_(head.weight)
        self.model = add_adapters(model.to(device), rank, targets, task="TOKEN_CLS")

    @classmethod
    def of(cls, policy: PeftModel, options: LoraOptions) -> "SeparateCritic":
        """Make a critic from the model that the policy was loaded from."""
        source = source_of(options.model)
        return cls(source, options.lora_rank, options.lora_targets, policy.device)

    def forward(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Predict values (B, T-1) of the states before input_ids[:, 1:].

        `hidden` is not used: the critic runs its own forward.
        """
        logits: Tensor = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        return logits[:, :-1, 0].float()
