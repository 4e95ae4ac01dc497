"""A random language model in a folder, which the recipes load as they load any, and its plain use.

Half of its texts' words are ones that VADER knows, so that its completions differ in sentiment.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.one_thread import one_thread  # noqa: F401  for the tests that import it from here

EOS = 0
VALUED = ["good", "bad", "great", "awful", "happy", "sad", "love", "hate"]
WORDS = ["<eos>", "<unk>", "the", "film", "was", *VALUED]
# peft reads a property of the model that transformers has renamed, at every switch of the adapters.
PEFT_READS_AN_OLD_NAME = "ignore:.*is_gradient_checkpointing:FutureWarning"


@pytest.fixture(autouse=True, scope="module")
def as_on_a_cpu() -> Iterator[None]:
    """Run recipes as on a machine without a GPU: no interpreted kernels, accelerate on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        yield


def write_tiny_model(folder: Path, fillers: int = 2000, **changes) -> Path:
    """Write a random Llama of two layers whose vocabulary has words that VADER knows.

    With many fillers there are more rows than words: a vocabulary next to which the other tensors
    of a loss are small. `changes` are of the config.
    """
    words = WORDS + [f"filler{number}" for number in range(fillers)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    shape = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(
        bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS, **{**shape, **changes}
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the words that VADER knows come up often
        model.lm_head.weight[len(WORDS) :] *= 0.1
        model.lm_head.weight[: len(WORDS)] *= 40
    model.save_pretrained(folder)
    return folder


def randomize_adapters(model: nn.Module, std: float = 0.3) -> None:
    """Let the adapters do something: fresh ones do nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def dropping(model: nn.Module) -> list[int]:
    """Put dropout that acts on the logits, and count how often it did."""
    dropped: list[int] = []

    class Dropout(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                dropped.append(1)
            return super().forward(x)

    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, Dropout(0.5))
    return dropped


def plain_logits_one_by_one(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits (B, T, V) of sequences that the model reads alone and without padding; 0 at padding.

    Those of the model's own forward in `dtype`, and not of anything of this package.
    """
    own = next(model.parameters()).dtype
    rows = []
    with torch.no_grad():
        model.to(dtype)
        for ids, kept in zip(input_ids, attention_mask.bool(), strict=True):
            logits = model(input_ids=ids[kept][None], use_cache=False).logits[0]
            row = logits.new_zeros(len(ids), logits.shape[-1])
            row[kept] = logits
            rows.append(row)
        model.to(own)
    return torch.stack(rows)
