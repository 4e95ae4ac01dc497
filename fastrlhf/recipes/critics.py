"""What predicts the return from each token on: a head on the policy, or a model of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from .models import add_adapters, dense_folder, source_of
from .settings import LoraOptions

_HEADS = ("score", "classifier")  # as architectures call a token classifier's


class ValueHead(nn.Module):
    """A linear layer on what enters the policy's head.

    The gradient of its error ends at the states: with rewards of another scale, the value loss
    would outweigh what the policy is meant to learn.
    """

    def __init__(self, width: int):
        """Start at 0: the first advantages are the returns themselves."""
        super().__init__()
        # The states' entries are about 1: a step of Adam at rate r moves a value by 4 r √width, by
        # some tenth at the recipe's rate, for returns between -1 and 1.
        self.scale = 4 * width**-0.5
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def of(cls, policy: PeftModel, options: LoraOptions) -> "ValueHead":
        """Make one for the hidden states of a policy."""
        return cls(policy.config.get_text_config().hidden_size).to(policy.device)

    def forward(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Value the states before input_ids[:, 1:]: (B, T-1), from hidden (B, T, H)."""
        values: Tensor = self.linear(hidden.detach().float() * self.scale)
        return values[:, :-1, 0]


class SeparateCritic(nn.Module):
    """A copy of the model with LoRA adapters and a value head of its own."""

    def __init__(self, source: str, rank: int, targets: str | None, device: torch.device):
        """Load the model in fp32 with one label a token, and put adapters on it."""
        super().__init__()
        model = AutoModelForTokenClassification.from_pretrained(
            dense_folder(source), num_labels=1, dtype=torch.float32
        )
        head = next(getattr(model, name) for name in _HEADS if hasattr(model, name))
        nn.init.zeros_(head.weight)
        self.model = add_adapters(model.to(device), rank, targets, task="TOKEN_CLS")

    @classmethod
    def of(cls, policy: PeftModel, options: LoraOptions) -> "SeparateCritic":
        """Make one from what the policy was loaded from."""
        source = source_of(options.model)
        return cls(source, options.lora_rank, options.lora_targets, policy.device)

    def forward(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Value the states before input_ids[:, 1:]: (B, T-1); the policy's states are not used."""
        logits: Tensor = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        return logits[:, :-1, 0].float()
