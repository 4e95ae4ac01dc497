"""Score completions, with VADER itself or with the reward model of an earlier run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .models import load_adapters, load_reward_model, load_tokenizer
from .rollout import Rollout
from .sampling import Sample, padded, samples_of
from .sentiment import vader
from .settings import OptionError

Scorer = Callable[[Rollout], Tensor]
_FACTS = "reward.json"


def described(reward: str) -> str:
    """Return a short name of a reward, for the title of a curve."""
    return "VADER" if reward == "vader" else "reward model"


def scorer(reward: str, device: torch.device, batch_size: int) -> Scorer:
    """Make the function that scores each completion of a rollout: (B,).

    Args:
        reward: "vader", or the output folder of the recipe `reward`.
        device: the device on which a reward model is loaded.
        batch_size: how many sequences a reward model scores at once.

    Raises:
        ValueError: there is no reward model in that folder.
    """
    if reward == "vader":
        return lambda batch: torch.tensor(vader(batch["completions"]), device=device)
    model = RewardModel.load(reward, device)

    return lambda batch: model.scores(samples_of(batch), batch_size)


class RewardModel:
    """A sequence classifier with one score, shifted and scaled to mean 0 and deviation 1.

    The Bradley-Terry loss does not determine the zero of a reward, and the scale of a reward
    depends on how certain the preferences are. With normalised scores, a coefficient of a KL
    penalty has the same meaning for every reward model.
    """

    def __init__(self, model: PeftModel, pad_token_id: int, mean: float, deviation: float):
        self.model, self.pad_token_id = model, pad_token_id
        self.mean, self.deviation = mean, deviation

    def raw(self, samples: list[Sample]) -> Tensor:
        """Return the model's scores (B,), not normalised, with gradients if these are enabled."""
        ids, attention, _ = padded(samples, self.pad_token_id)
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention).logits
        return logits[:, 0].float()

    @torch.no_grad()
    def scores(self, samples: list[Sample], batch_size: int) -> Tensor:
        """Return normalised scores (B,), computed for `batch_size` sequences at a time."""
        parts = range(0, len(samples), batch_size)
        raw = [self.raw(samples[start : start + batch_size]) for start in parts]
        return (torch.cat(raw) - self.mean) / self.deviation

    def save(self, folder: Path, base: str, quantize: bool, tokenizer: Any) -> None:
        """Write the adapters, the head that gives the score, and the facts that `load` needs."""
        self.model.save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
        base = str(Path(base).resolve()) if Path(base).exists() else base
        facts = {"base": base, "quantize": quantize, "mean": self.mean, "deviation": self.deviation}
        (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str, device: torch.device) -> "RewardModel":
        """Read what `save` wrote."""
        file = Path(folder, _FACTS)
        if not file.exists():
            raise OptionError(
                "argument --reward: expected vader or a folder of the recipe reward, "
                f"{folder} has no {_FACTS}"
            )
        facts = json.loads(file.read_text(encoding="utf-8"))
        base = load_reward_model(facts["base"], device, facts["quantize"])
        model = load_adapters(base, Path(folder, "adapter"))
        pad = load_tokenizer(facts["base"]).pad_token_id
        return cls(model, pad, facts["mean"], facts["deviation"])
