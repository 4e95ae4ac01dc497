"""A trainer of TRL on these kernels by one line, before it is made.

    python examples/trl_trainer.py --steps 10            # a tiny random model, on a CPU
    python examples/trl_trainer.py --model Qwen/Qwen3-0.6B

Losses, options and metrics stay TRL's own. The same line serves SFT, DPO, KTO, GRPO, RLOO and
distillation. Needs: pip install '.[trl]'
"""

import argparse
import copy
import tempfile

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

from fastrlhf.integrations import trl

PAIRS = [
    {"prompt": f"{n} plus 1 is", "chosen": f" {n + 1} .", "rejected": f" {n + 2} of course ."}
    for n in range(20)
]


def load(name):
    if name:
        auto = hf.AutoModelForCausalLM, hf.AutoTokenizer
        return tuple(each.from_pretrained(name) for each in auto)
    words = ["<pad>", "</s>", "plus", "is", "of", "course", ".", *map(str, range(22))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ids = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_attention_heads=4, **sizes, **ids)), tokenizer


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model)
    rate = 1e-3 if not options.model else 1e-6
    with tempfile.TemporaryDirectory() as folder, trl.patched():  # or, for good, trl.patch()
        fast = {"max_steps": options.steps, "learning_rate": rate, "logging_steps": 1}
        quiet = {"report_to": "none", "save_strategy": "no", "bf16": torch.cuda.is_available()}
        config = DPOConfig(folder, beta=0.1, per_device_train_batch_size=4, **fast, **quiet)
        data = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tokenizer}
        trainer = DPOTrainer(model, copy.deepcopy(model), config, **data)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
