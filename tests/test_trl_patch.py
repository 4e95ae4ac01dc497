"""What the patch of TRL replaces and puts back, and its log-probs and divergences by themselves."""

import subprocess
import sys
import threading
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, make
from support.trl_trainers import (
    KINDS,
    ROUNDING,
    assert_same,
    build,
    distillation_trainer,
    in_another_order,
    quiet,
    train,
    trl,
    utils,
)
from torch import Tensor

from fastrlhf.integrations import trl as patching
from fastrlhf.integrations import trl_head

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def attributes() -> dict[tuple[str, str], Any]:
    """Every attribute of every module of TRL that is imported, and of every class that it has."""
    for kind in KINDS.values():
        getattr(trl, f"{kind.name}Trainer")  # there only once it was asked for
    owners: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and isinstance(module, ModuleType):
            owners[name] = module
            classes = [x for x in list(vars(module).values()) if isinstance(x, type)]
            owners |= {f"{x.__module__}.{x.__qualname__}": x for x in classes}
    return {
        (owner, name): value
        for owner, x in owners.items()
        for name, value in list(vars(x).items())
        if owner.split(".")[0] == "trl" and name not in ("__dict__", "__weakref__")
    }


@pytest.fixture
def before() -> dict[tuple[str, str], Any]:
    with patching.patched():  # what it imports is there before and after
        pass
    return attributes()


def is_as(before: dict[tuple[str, str], Any]) -> bool:
    after = attributes()
    return after.keys() == before.keys() and all(after[x] is before[x] for x in before)


def test_unpatch_puts_everything_back(before) -> None:
    try:
        patching.patch()
        assert not is_as(before)
        patching.patch()
    finally:
        patching.unpatch()
    assert is_as(before)
    patching.unpatch()
    assert is_as(before)


def test_patched_nests_and_ends_with_errors(before) -> None:
    with pytest.raises(RuntimeError, match="mine"), patching.patched():
        inside = attributes()
        with pytest.raises(KeyError), patching.patched():
            assert is_as(inside)
            raise KeyError
        assert is_as(inside)
        raise RuntimeError("mine")
    assert is_as(before)


def test_patched_leaves_a_patch_in_place(before) -> None:
    try:
        patching.patch()
        inside = attributes()
        with patching.patched():
            pass
        assert is_as(inside)
    finally:
        patching.unpatch()
    assert is_as(before)


def test_unpatch_within_patched_waits_for_its_end(before) -> None:
    with patching.patched():
        inside = attributes()
        patching.patch()
        patching.unpatch()
        assert is_as(inside)
    assert is_as(before)


def test_threads_share_a_patch(before) -> None:
    """Two threads enter and leave in each order; within, everything is patched."""
    seam = utils._ChunkedLogProbFunction
    wrong: list[str] = []
    start = threading.Barrier(4)

    def enter_and_leave() -> None:
        start.wait()
        for _ in range(200):
            with patching.patched():
                if utils._ChunkedLogProbFunction is seam:
                    wrong.append("not patched within")

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert is_as(before)


def test_one_thread_leaves_while_another_stays(before) -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with patching.patched():
            entered.set()
            may_leave.wait()

    thread = threading.Thread(target=stay)
    with patching.patched():
        inside = attributes()
        thread.start()
        entered.wait()
    try:
        assert is_as(inside)
    finally:
        may_leave.set()
        thread.join()
    assert is_as(before)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_imports_nothing_of_trl() -> None:
    code = "import sys, {}; print([x for x in sys.modules if x.split('.')[0] == 'trl'])"
    assert run(code.format("fastrlhf")) == "[]"
    assert run(code.format("fastrlhf.integrations.trl")) == "[]"


def test_without_trl_it_says_what_to_install() -> None:
    said = run("""
import sys
sys.modules["trl"] = None
from fastrlhf.integrations import trl
for enter in (trl.patch, trl.patched().__enter__):
    try:
        enter()
    except ImportError as error:
        print(error)
trl.unpatch()
""")
    assert len(said.splitlines()) == 2
    assert all("pip install" in line and "trl" in line for line in said.splitlines())


@pytest.mark.parametrize("version", ["0.29.1", "1.17.0", "1.160.0", "2.0.0.dev0", "2.1.16.0"])
def test_a_version_that_was_never_tried(version, monkeypatch, before) -> None:
    monkeypatch.setitem(vars(trl), "__version__", version)
    for enter in (patching.patch, patching.patched().__enter__):
        with pytest.raises(ImportError) as error:
            enter()
        assert version in str(error.value)
        assert all(known in str(error.value) for known in patching.KNOWN_VERSIONS)
    monkeypatch.undo()
    assert is_as(before)


def scores(labels: Tensor, model: torch.nn.Module, ids: Tensor, **options: Any) -> Any:
    utils.add_fused_lm_head(model, outputs=OUTPUTS, **options)
    return model(input_ids=ids, labels=labels, fused_lm_head=True)


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 7))


def test_a_batch_without_labels_is_a_differentiable_zero() -> None:
    model, ids = make("Llama"), tokens()
    with patching.patched():
        made = scores(torch.full_like(ids, -100), model, ids)
        assert made.loss == 0
        for name in OUTPUTS:
            assert getattr(made, name).shape == (2, 6)
            assert not getattr(made, name).any()
        (made.loss + made.entropy.sum()).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert model.lm_head.weight.grad is not None or model.model.norm.weight.grad is not None


def test_what_is_masked_may_hold_anything() -> None:
    """Neither NaN in hidden states nor words out of the vocabulary matter where no label is."""
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = labels[1, 5:] = -100
    unscored = torch.ones_like(ids, dtype=torch.bool)
    unscored[:, :-1] = labels[:, 1:] == -100

    def gradient(poison: bool) -> tuple[Tensor, Tensor]:
        model = make("Llama")
        if poison:
            model.model.norm.register_forward_hook(
                lambda module, given, made: made.masked_fill(unscored[..., None], torch.nan)
            )
        made = scores(labels, model, ids)
        (made.loss + made.entropy.sum()).backward()
        return made.log_probs.detach(), model.lm_head.weight.grad

    with patching.patched():
        for found, wanted in zip(gradient(True), gradient(False), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_divergence_of_nothing_or_beside_anything(beta) -> None:
    def compared(mask: Tensor, poison: bool) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(2)
        student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
        weights = torch.randn(VOCAB, 8, requires_grad=True), torch.randn(VOCAB, 12)
        if poison:
            student, teacher = (
                x.masked_fill(~mask[..., None], torch.nan) for x in (student, teacher)
            )
        student.requires_grad_()
        loss, entropy, _ = distillation_trainer._chunked_divergence_loss(
            student, teacher, *weights, mask, beta
        )
        loss.backward()
        return loss.detach(), entropy, weights[0].grad

    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    with patching.patched():
        assert [float(x.abs().sum()) for x in compared(mask & False, True)] == [0, 0, 0]
        torch.testing.assert_close(compared(mask, True), compared(mask, False), rtol=0, atol=0)


def test_ties_count_as_in_trl() -> None:
    """Of two words with the same logit, the first is the most likely one."""
    weight = 0.1 * torch.randint(-3, 4, (VOCAB, 16)).sign()
    weight[:11, :11] += 2 * torch.eye(11)
    weight[90:] = weight[:11]
    weight = (8 * weight).round()  # whole numbers, so that logits are exact
    hidden = weight[:11].repeat(2, 1)
    targets = torch.cat([torch.arange(11), torch.arange(90, 101)])

    def top() -> Tensor:
        return utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32768, None, 1.0, OUTPUTS[1:]
        )[4]

    wanted = top()
    with patching.patched():
        assert torch.equal(top(), wanted)
    assert wanted.tolist() == 11 * [True] + 11 * [False]


@pytest.mark.parametrize("asked", [(), *[(name,) for name in OUTPUTS[1:]], OUTPUTS[1:]])
def test_what_is_not_asked_for_is_not_given(asked) -> None:
    model, ids = make("Llama"), tokens()

    def made() -> Any:
        utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *asked))
        result = model(input_ids=ids, labels=ids, fused_lm_head=True)
        del model.forward
        return result

    wanted = made()
    with patching.patched():
        found = made()
    for name in OUTPUTS:
        if getattr(wanted, name) is None:
            assert getattr(found, name) is None
        else:
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
            assert getattr(found, name).requires_grad == getattr(wanted, name).requires_grad


def test_without_the_head_the_forward_is_the_models_own() -> None:
    model, ids = make("Llama"), tokens()
    wanted = model(input_ids=ids, labels=ids)
    with patching.patched():
        utils.add_fused_lm_head(model)
        found = model(input_ids=ids, labels=ids)
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 9)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.loss, wanted.loss)


def test_a_model_made_before_the_patch_is_served_by_it() -> None:
    model, ids = make("Llama"), tokens()
    utils.add_fused_lm_head(model)
    wanted = model(input_ids=ids, labels=ids, fused_lm_head=True)
    with patching.patched():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, wanted.log_probs)
    again = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert torch.equal(again.log_probs, wanted.log_probs)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_liger_at_the_same_time_is_refused(kind, tmp_path) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    with patching.patched(), pytest.raises(ValueError, match="use_liger_kernel: expected False"):
        build(kind, str(tmp_path), use_liger_kernel=True)


HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
OLD_NAMES = "ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_head_is_not_left_out_once_the_patch_is_gone(kind, tmp_path) -> None:
    with patching.patched(), quiet():
        trainer = build(kind, str(tmp_path), lora=HEAD, max_steps=1)
    with pytest.raises(RuntimeError, match="made under fastrlhf's patch"), quiet():
        trainer.train()
    with patching.patched(), quiet():
        trainer.train()


@pytest.mark.filterwarnings(OLD_NAMES)
def test_a_head_that_is_cast_may_be_saved_but_not_adapted() -> None:
    options = {"beta": 0.0, "cast_lm_head_to_fp32": True}
    wanted = train("grpo", lora=SAVED, **options)
    with patching.patched():
        found = train("grpo", lora=SAVED, **options)
        with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head`"):
            train("grpo", lora=HEAD, **options)
    assert_same(found, wanted, ROUNDING, partial(in_another_order, "grpo", lora=SAVED, **options))


@pytest.mark.filterwarnings(OLD_NAMES)
def test_a_trainer_with_log_probs_of_its_own_is_asked_once_a_step(monkeypatch) -> None:
    class Counting(trl.GRPOTrainer):
        calls = 0

        def _get_per_token_logps_and_entropies(self, model, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += model.training
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    monkeypatch.setattr(trl, "GRPOTrainer", Counting)
    wanted = train("grpo")
    asked, Counting.calls = Counting.calls, 0
    with patching.patched():
        found = train("grpo")
    assert Counting.calls == asked > 0
    assert_same(found, wanted, ROUNDING, partial(in_another_order, "grpo"))


@pytest.mark.filterwarnings(OLD_NAMES)
def test_a_weight_that_was_gathered_is_that_of_a_head_without_adapters() -> None:
    """As FSDP2 gives it: another tensor than the head's own."""
    peft = pytest.importorskip("peft", reason="needs peft")
    for lora, served in ((SAVED, True), (HEAD, False)):
        model = peft.get_peft_model(make("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", **lora))
        weight = model.get_output_embeddings().weight.clone()
        with trl_head.heads_in_play(model):
            if served:
                assert trl_head.head_of(weight, None)[1].weight is weight
            else:
                with pytest.raises(RuntimeError, match="sharded by itself"):
                    trl_head.head_of(weight, None)
