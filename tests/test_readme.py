"""The README's examples, run as they stand."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_example(text: str) -> dict:
    """Execute an example in a namespace of its own."""
    namespace: dict = {}
    exec(compile(text, "README.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_examples_run(index) -> None:
    run_example(EXAMPLES[index])


@pytest.mark.parametrize("name", ["dpo_step", "dpo_step_from_logits"])
def test_the_trainer_example_is_short_and_trains_a_hugging_face_model(name) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    (example,) = [text for text in EXAMPLES if f"def {name}(" in text]
    assert len(example.split(f"def {name}(")[1].strip().splitlines()) <= 10
    dpo_step = run_example(example)[name]
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(97, (4, 12))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.arange(12).expand(4, 12) >= 5,
    }
    with torch.no_grad():
        plain = model(ids).logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None])
    ref = plain[..., 0].sum(-1)
    loss, rewards = dpo_step(model, batch, ref)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    torch.testing.assert_close(rewards, torch.zeros(4), atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss.backward()
    optimizer.step()
    assert dpo_step(model, batch, ref)[0] < loss
