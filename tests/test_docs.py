"""The examples of the pages on losses, run as they stand; and that the names in them are there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make
from torch import Tensor

import fastrlhf
from fastrlhf import AdaptiveKLController, kto_kl

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "losses").glob("*.md"))
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", flags=re.M | re.S)


def examples() -> dict[str, Any]:
    """What all examples of the pages define."""
    names: dict[str, Any] = {}
    for page in PAGES:
        for indent, block in BLOCK.findall(page.read_text()):
            code = re.sub(rf"^{indent}", "", block, flags=re.M)
            exec(compile(code, str(page), "exec"), names)
    return names


def tokens() -> dict[str, Tensor]:
    logprobs = -3 * torch.rand(4, 6)
    noise = {name: logprobs + 0.3 * torch.randn(4, 6) for name in ("old", "rollout", "ref")}
    mask = torch.arange(6) < torch.tensor([[6], [4], [0], [1]])
    return {"logprobs": logprobs, "mask": mask, "advantages": torch.randn(4, 6), **noise}


def test_examples_of_losses_from_log_probs_run() -> None:
    names, x = examples(), tokens()
    four = x["logprobs"].requires_grad_(), x["old"], x["advantages"], x["mask"]
    for name in ("kl_cov_loss", "clip_cov_loss"):
        loss, _ = names[name](*four)
        loss.backward()
    logprobs, old, *rest = four
    loss, metrics = names["corrected_loss"](logprobs, old, x["rollout"], *rest)
    assert loss.isfinite() and "rollout_corr/rollout_is_mean" in metrics
    weights = names["seq_mask_tis"](old, x["rollout"], x["mask"], low=0.5, high=2.0)
    assert weights.any() and not weights[~x["mask"]].any()
    advantages, returns = names["vapo_estimates"](x["ref"], x["old"], x["mask"])
    assert advantages.shape == returns.shape == (4, 6)


def test_the_example_of_a_controller_raises_the_coefficient_of_a_policy_that_is_far() -> None:
    names, x = examples(), tokens()
    controller = AdaptiveKLController(init_kl_coef=0.05, target=0.1, horizon=10_000)
    parameter = torch.zeros((), requires_grad=True)
    batch = {"old_logprobs": x["old"], "advantages": x["advantages"], "mask": x["mask"]}
    batch["ref_logprobs"] = x["logprobs"] - 5
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    names["controlled_step"](controller, x["logprobs"] + parameter, batch, optimizer)
    assert controller.value > 0.05


def batch_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(3, 40, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.long)
    completion = (torch.arange(8) >= 3).long().expand(3, 8)
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


def test_the_example_of_kto_is_that_of_the_log_probs() -> None:
    model, reference = make("Llama"), make("Llama")
    batch, mismatched = batch_of(0) | {"desirable": torch.tensor([True, False, True])}, batch_of(1)
    names = examples()
    loss, rewards = names["kto_step"](model, reference, batch, mismatched)
    loss.backward()

    def sums(scorer: Any, b: dict[str, Tensor]) -> Tensor:
        logits = scorer(b["input_ids"]).logits[:, :-1].log_softmax(-1)
        found = logits.gather(-1, b["input_ids"][:, 1:, None])[..., 0]
        return (found * b["completion_mask"][:, 1:]).sum(-1)

    with torch.no_grad():
        kl = kto_kl(sums(model, mismatched), sums(reference, mismatched))
        expected, _ = fastrlhf.kto_loss(
            sums(model, batch), sums(reference, batch), batch["desirable"], kl
        )
    torch.testing.assert_close(loss.detach(), expected.mean())
    assert rewards.shape == (3,)


def test_the_example_of_distillation_takes_what_a_server_sends() -> None:
    model, batch = make("Llama"), batch_of(0)
    teacher = torch.randn(3, 7, model.config.vocab_size).log_softmax(-1)
    best = teacher.topk(3, dim=-1)
    words = [
        [
            dict(zip(ids, values, strict=True)) if t >= 2 else {}
            for t, (ids, values) in enumerate(zip(*sequence, strict=True))
        ]
        for sequence in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    loss = examples()["topk_distillation_step"](model, batch, words, k=5)
    loss.backward()
    logits = model(batch["input_ids"]).logits[:, :-1]
    expected = fastrlhf.topk_kl_divergence(
        logits, best.values, best.indices, mask=batch["completion_mask"][:, 1:]
    )
    torch.testing.assert_close(loss, expected.sum() / batch["completion_mask"][:, 1:].sum())


@pytest.mark.parametrize("page", [*PAGES, DOCS / "lazy_logits.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere_and_tables_have_as_many_cells_in_each_row(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("http") or (page.parent / link.split("#")[0]).exists(), link
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        cells = {len(re.sub(r"\\\|", "", row).split("|")) for row in table.splitlines()}
        assert len(cells) == 1, table[:80]


def test_every_loss_type_has_a_row() -> None:
    page = (PAGES[0].parent / "policy.md").read_text()
    for name in fastrlhf.losses.grpo._GRPO:
        assert f"\n| `{name}` |" in page, name
    page = (PAGES[0].parent / "preference.md").read_text()
    for name in fastrlhf.losses.preference.LOSS_TYPES:
        assert f"`{name}`" in page, name
