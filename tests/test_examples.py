"""The files of examples/: each runs, trains, and takes the path that it is there to show."""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.matmuls import MatmulAudit
from torch import Tensor, nn

import fastrlhf

hf = pytest.importorskip("transformers", reason="needs transformers")

FOLDER = Path(__file__).parent.parent / "examples"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
# What the examples print of each step, and the Trainers log.
LOSS = re.compile(r"(?:loss|loss of the last micro-batch|divergence|'loss':) '?(-?[\d.]+)")
# Under torchrun, which has a process for each rank.
IN_PROCESSES_OF_THEIR_OWN = ("tensor_parallel",)

pytestmark = [
    # Of torch's loader without a GPU, and what transformers renames and TRL still uses.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
    ),
]


def example(name: str) -> ModuleType:
    """A file of examples/ as a module, whatever it needs being installed."""
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    for needed in set(re.findall(r"^(?:from|import) (accelerate|trl|datasets)\b", text, re.M)):
        pytest.importorskip(needed, reason=f"needs {needed}")
    if "Trainer" in text:
        pytest.importorskip("accelerate", reason="needs accelerate")
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments() -> Iterator[list[str]]:
    """Of two steps; afterwards accelerate forgets what it found out about this process."""
    yield ["--steps", "2"]
    if "accelerate" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


def weights(of: object) -> list[Tensor]:
    """Copies of the parameters of a model, or of what holds one."""
    while not isinstance(of, nn.Module):
        of = of[0] if isinstance(of, tuple) else of.model
    return [parameter.detach().clone() for parameter in of.parameters()]


def test_there_is_an_example_of_each_kind_and_the_readme_lists_it() -> None:
    listed = re.findall(r"^\| \[(\w+)\.py\]", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert sorted(listed) == FILES


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_short_and_says_how_to_start_it(name) -> None:
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    assert len(text.splitlines()) <= 60
    assert re.search(rf"^    (python|torchrun .*) examples/{name}\.py", text, re.M)


@pytest.mark.parametrize("name", [name for name in FILES if name not in IN_PROCESSES_OF_THEIR_OWN])
def test_an_example_trains(name, arguments, capsys) -> None:
    module = example(name)
    torch.manual_seed(0)
    start = weights(module.load(None))
    torch.manual_seed(0)
    trained = module.main(arguments)
    moved = [not torch.equal(x, y) for x, y in zip(start, weights(trained), strict=True)]
    assert (
        sum(moved) >= len(moved) - 1
    )  # a reward model scores by another head than the vocabulary's
    losses = [float(x) for x in LOSS.findall(capsys.readouterr().out)]
    assert len(losses) >= 2 and all(map(math.isfinite, losses))


def plain_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each token after the first, (B, T - 1)."""
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None])[..., 0]


def test_dpo_of_a_loop_is_the_formula_at_three_matmuls_and_one_of_the_reference() -> None:
    module = example("hf_dpo_loop")
    model, reference = module.load(None), module.load(None).requires_grad_(False)
    ids, attention, mask = module.batch(4000)
    module.step_loss(model, reference, ids, attention, mask)  # at first, the heads are checked
    with MatmulAudit(side=4000) as audit:
        loss, _ = module.step_loss(model, reference, ids, attention, mask)
        loss.backward()
    kept = mask[:, 1:]
    assert audit.operations == (3 + 1) * 2 * int(kept.sum()) * 4000 * 64
    gain = ((plain_logprobs(model, ids) - plain_logprobs(reference, ids)) * kept).sum(-1)
    torch.testing.assert_close(loss, -F.logsigmoid(0.1 * (gain[:2] - gain[2:])).mean())


def test_the_divergence_of_the_example_is_the_formula_at_three_matmuls_and_the_teachers() -> None:
    module = example("distillation")
    student, teacher = module.load(None), module.load(None, width=96)
    ids, mask = module.written(student)
    teacher.requires_grad_(False)
    module.step_loss(student, teacher, ids, mask)  # at first, the heads are checked
    with MatmulAudit(side=1000) as audit:
        loss = module.step_loss(student, teacher, ids, mask)
        loss.backward()
    assert audit.operations == 2 * int(mask[:, 1:].sum()) * 1000 * (3 * 64 + 96)
    p, q = (
        model(ids).logits[:, :-1][mask[:, 1:]].double().softmax(-1) for model in (student, teacher)
    )
    middle = (p + q) / 2
    wanted = (p * (p / middle).log() + q * (q / middle).log()).sum(-1).mean() / 2
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=0)


def test_packed_grpo_is_the_loss_of_each_sequence_alone() -> None:
    module = example("packed_grpo")
    model = module.load(None).eval()
    (ids, _, old, advantages), packed, _ = module.sampled(model)
    ends = packed["cu_seqlens"].tolist()
    assert ends[0] == 0 and ends[-1] == ids.shape[1] and len(ends) == len(advantages) + 1
    parts = [slice(*bounds) for bounds in itertools.pairwise(ends)]
    terms, tokens = [], 0
    for part, advantage in zip(parts, advantages, strict=True):
        alone = plain_logprobs(model, ids[:, part])
        kept = packed["mask"][:, part][:, 1:]
        then = old[:, part.start : part.stop - 1]
        torch.testing.assert_close(alone[kept], then[kept], rtol=1e-4, atol=1e-5)
        terms.append(-(alone[kept] - alone[kept].detach()).exp().sum() * advantage)
        tokens += int(kept.sum())
    loss, _ = module.model_policy_loss(
        model, ids, None, old, advantages, **packed, **module.grpo_options("dapo")
    )
    torch.testing.assert_close(loss, sum(terms) / tokens, rtol=1e-4, atol=1e-5)


def test_lazy_logits_of_the_example_were_fused(arguments, capsys) -> None:
    fastrlhf.lazy_report(clear=True)
    example("lazy_logits").main(arguments)
    said = capsys.readouterr().out
    assert re.search(r"^fused +cross_entropy +3G +2 ", said, re.M)
    assert re.search(r"^fused +argmax +1G +2 ", said, re.M)
    assert not re.search(r"^built", said, re.M)


def test_a_patched_trainer_makes_its_loss_in_place_of_the_logits(arguments, monkeypatch) -> None:
    from fastrlhf.hf import own_loss

    calls, own = [], own_loss.summed_cross_entropy

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(own_loss, "summed_cross_entropy", counting)
    example("transformers_trainer").main(arguments)
    assert len(calls) == 2 * 2  # steps, and micro-batches of each


def test_a_patched_trainer_of_trl_makes_no_log_probs_of_its_own(arguments) -> None:
    pytest.importorskip("trl", reason="needs trl")
    from support import trl_trainers

    with trl_trainers.counted_calls() as calls:
        example("trl_trainer").main(arguments)
    assert calls.by_trl == 0


def test_ranks_that_share_a_vocabulary_have_the_loss_of_one() -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(FOLDER / "tensor_parallel.py"), "--steps", "2",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = re.findall(r"rank (\d), rows (\d+), step (\d): loss ([\d.]+)", done.stdout)
    found = {(int(rank), int(step)): float(loss) for rank, _, step, loss in lines}
    assert len(found) == 4 and {int(rows) for _, rows, _, _ in lines} == {2001, 2000}
    module = example("tensor_parallel")
    model = module.load(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        ids, targets = module.batch(step, 4001)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for rank in range(2):
            assert found[rank, step] == pytest.approx(loss.item(), rel=1e-5)
