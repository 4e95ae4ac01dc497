"""transformers.Trainer with its loss fused by one line: the logits are never held.

    python examples/transformers_trainer.py --steps 10   # a tiny random model, on a CPU
    python examples/transformers_trainer.py --model Qwen/Qwen3-0.6B

Losses, gradients and what is logged are the Trainer's own to rounding: with accumulated gradients,
as here, on several devices, and in evaluation without compute_metrics.
"""

import argparse
import tempfile

import torch
import transformers as hf

from fastrlhf.integrations import transformers


def load(name):
    if name:
        return hf.AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=4000, num_attention_heads=4, **sizes))


def rows(vocabulary, count, length=24, prompt=8):
    """Random ids stand for a tokenizer's. -100: no loss of the prompt."""
    ids = torch.randint(vocabulary, (count, length))
    labels = ids.masked_fill(torch.arange(length) < prompt, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    model = load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        training = hf.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3 if not options.model else 1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = hf.Trainer(model, training, train_dataset=rows(model.config.vocab_size, 64))
        with transformers.patched():  # or, for good, transformers.patch()
            trainer.train()
    return trainer


if __name__ == "__main__":
    main()
