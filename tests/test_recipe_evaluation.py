"""How policies are judged, by what data, and from which files: beside formulas written here."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "rich"):
    pytest.importorskip(name)

from support.compare import assert_as_accurate, budget  # noqa: E402
from support.recipe_models import (  # noqa: E402, F401  the fixtures are of every test
    EOS,
    PEFT_READS_AN_OLD_NAME,
    dropping,
    one_thread,
    plain_logits_one_by_one,
    randomize_adapters,
    write_tiny_model,
)
from torch import Tensor  # noqa: E402

from fastrlhf.recipes import models  # noqa: E402
from fastrlhf.recipes.comparison import logprob_memory  # noqa: E402
from fastrlhf.recipes.dpo import DPOOptions  # noqa: E402
from fastrlhf.recipes.draws import draw  # noqa: E402
from fastrlhf.recipes.evaluation import Evaluation, compared, evaluate, exact_kl  # noqa: E402
from fastrlhf.recipes.models import add_adapters, dense_folder, load_model  # noqa: E402
from fastrlhf.recipes.preference import PairData  # noqa: E402
from fastrlhf.recipes.prompts import HELD_OUT_PROMPTS, TRAIN_PROMPTS  # noqa: E402
from fastrlhf.recipes.rankings import ranked  # noqa: E402
from fastrlhf.recipes.rollout import rollout  # noqa: E402
from fastrlhf.recipes.run import Run  # noqa: E402
from fastrlhf.recipes.sampling import Sample, samples_of  # noqa: E402
from fastrlhf.recipes.sentiment import Pair, accuracy, vader  # noqa: E402

pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)

CPU = torch.device("cpu")
PROMPTS = ["the", "the film was good", "film was"] * 3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fresh(model_folder: Path):
    """A policy whose adapters do nothing yet, and its tokenizer."""
    base, tokenizer = load_model(str(model_folder), CPU)
    return add_adapters(base, rank=2), tokenizer


@pytest.fixture
def adapted(fresh):
    policy, tokenizer = fresh
    randomize_adapters(policy)
    return policy, tokenizer


def sample(prompt: list[int], completion: list[int], text: str = "", name: str = "the") -> Sample:
    return Sample(name, text, torch.tensor(prompt), torch.tensor(completion))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_exact_kl_is_the_sum_over_the_vocabulary(adapted, temperature) -> None:
    policy, tokenizer = adapted
    batch = rollout(policy, tokenizer, PROMPTS, new_tokens=6, temperature=temperature)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    mask = batch["completion_mask"][:, 1:]
    assert not mask[:, -6:].all()  # some end early

    def formula(dtype: torch.dtype) -> Tensor:
        logits = plain_logits_one_by_one(policy, ids, attention, dtype)[:, :-1] / temperature
        with policy.disable_adapter():
            ref = plain_logits_one_by_one(policy, ids, attention, dtype)[:, :-1] / temperature
        log_p, log_q = logits.log_softmax(-1), ref.log_softmax(-1)
        return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum(-1)

    found = exact_kl(policy, batch, temperature)
    assert found.shape == (len(PROMPTS),) and not found.requires_grad
    plain, exact = formula(torch.float32), formula(torch.float64)
    assert exact.min() > 0.1
    assert_as_accurate(found, plain, exact, size=6 * 12, of="KL")
    # What was sampled estimates it: another direction, or another mask, would be no mean of it.
    torch.manual_seed(1)
    many = rollout(policy, tokenizer, PROMPTS * 40, new_tokens=6, temperature=temperature)
    ratios = (many["logprobs"] - many["ref_logprobs"]).double().sum(-1)
    differences = ratios - exact_kl(policy, many, temperature).double()
    error = float(differences.std()) / math.sqrt(len(differences))
    assert abs(float(differences.mean())) < 4.5 * error


def test_exact_kl_of_fresh_adapters_is_zero(fresh) -> None:
    policy, tokenizer = fresh
    batch = rollout(policy, tokenizer, PROMPTS, new_tokens=6)
    assert (exact_kl(policy, batch, 1.0) == 0).all()
    assert torch.equal(batch["logprobs"], batch["ref_logprobs"])


def test_dropout_is_off_in_exact_kl(model_folder) -> None:
    base, tokenizer = load_model(str(model_folder), CPU)
    dropped = dropping(base)
    policy = add_adapters(base, rank=2)
    randomize_adapters(policy)
    batch = rollout(policy, tokenizer, PROMPTS, new_tokens=6, logprobs=False)
    expected = exact_kl(policy, batch, 1.0)
    before = [module.training for module in policy.train().modules()]
    found = exact_kl(policy, batch, 1.0)
    assert [module.training for module in policy.modules()] == before
    assert not dropped
    assert torch.equal(found, expected)


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Run:
    return Run("judge", options(model_folder, tmp_path))


def options(model_folder: Path, output: Path, **changes) -> DPOOptions:
    small = {"eval_prompts": 3, "eval_completions": 2, "new_tokens": 5, "batch_size": 4}
    given = {"model": str(model_folder), "output": str(output), "device": "cpu", **small}
    return DPOOptions(**{**given, **changes})


def test_an_evaluation_is_the_same_whenever_it_is_made(run, adapted) -> None:
    policy, tokenizer = adapted
    torch.manual_seed(1)
    first = evaluate(run, policy, tokenizer, run.options, "before")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = evaluate(run, policy, tokenizer, run.options, "after")
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if it had not been
    assert [one.completion for one in first.samples] == [one.completion for one in second.samples]
    assert first.kl == second.kl and first.ended == second.ended


def test_an_evaluation_is_of_the_held_out_prompts(run, adapted) -> None:
    policy, tokenizer = adapted
    found = evaluate(run, policy, tokenizer, run.options, "before")
    expected = [prompt for prompt in HELD_OUT_PROMPTS[:3] for _ in range(2)]
    assert [one.prompt for one in found.samples] == expected
    ends = [one.completion_ids[-1] == EOS for one in found.samples]
    assert found.ended == pytest.approx(sum(ends) / 6)
    lengths = [len(one.completion_ids) for one in found.samples]
    assert all(end or length == 5 for length, end in zip(lengths, ends, strict=True))
    scores = vader([one.completion for one in found.samples])
    pairs = zip(scores[::2], scores[1::2], strict=True)
    assert found.reward == pytest.approx([(one + two) / 2 for one, two in pairs])
    kl = zip(found.kl[::2], found.kl[1::2], strict=True)
    assert found.divergence == pytest.approx([(one + two) / 2 for one, two in kl])
    for one, value in zip(found.samples, found.kl, strict=True):
        alone = {
            "input_ids": torch.cat((one.prompt_ids, one.completion_ids))[None],
            "completion_mask": torch.arange(len(one.prompt_ids) + len(one.completion_ids))[None]
            >= len(one.prompt_ids),
        }
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        again = float(exact_kl(policy, alone, run.options.temperature))
        assert value == pytest.approx(again, abs=budget(0.0, torch.float32, size=5 * 12))


def test_completions_of_one_prompt_count_once() -> None:
    samples = [sample([2], [3], "good", "a"), sample([2], [3], "bad", "b")]
    samples += [sample([2], [3], "good", "a")]
    judged = Evaluation(samples, [1.0, 5.0, 2.0], 0.5)
    good, bad = vader(["good", "bad"])
    assert judged.reward == pytest.approx([good, bad])
    assert judged.divergence == [1.5, 5.0]


def test_a_comparison_has_the_error_of_paired_means() -> None:
    before, after = [0.0, 1.0, 2.0, 5.0], [0.5, 1.4, 2.6, 5.5]
    found = compared(before, after)
    assert found.before.mean == 2.0 and found.after.mean == pytest.approx(2.5)
    assert found.before.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert found.difference.mean == pytest.approx(0.5)
    # Of the differences 0.5, 0.4, 0.6 and 0.5: far below that of two independent means.
    assert found.difference.standard_error == pytest.approx(math.sqrt(0.02 / 3 / 4))
    with pytest.raises(ValueError):
        compared(before, after[:3])


@pytest.mark.parametrize(
    "margins, expected",
    [([1.0, 2.0], 1.0), ([-1.0, 1.0], 0.5), ([0.0, 0.0], 0.5), ([0.0, 1.0, -1.0, 1.0], 0.625)],
)
def test_a_tie_is_half_right(margins, expected) -> None:
    assert accuracy(torch.tensor(margins)) == expected


def test_a_ranking_drops_what_is_close_to_the_next_better_one() -> None:
    great, fine, plain = vader(["great", "a fine table", "a table"])
    assert great - fine > 0.4 and 0.1 < fine - plain < 0.3
    samples = [sample([2], [3], text) for text in ("a table", "great", "a fine table")]
    (ranking,) = ranked(samples, size=3, minimal_gap=0.3)
    assert [one.completion for one in ranking.samples] == ["great", "a fine table"]
    assert ranking.sentiment == [great, fine]
    (ranking,) = ranked(samples, size=3, minimal_gap=0.1)
    assert ranking.sentiment == [great, fine, plain]
    assert ranked(samples, size=3, minimal_gap=0.7) == []


@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_each_prompt_comes_once_in_a_pass(count) -> None:
    total = len(TRAIN_PROMPTS)
    steps = math.ceil(3 * total / count)
    drawn = [prompt for step in range(steps) for prompt in draw(TRAIN_PROMPTS, step, count, seed=3)]
    assert len(drawn) == steps * count
    passes = [tuple(drawn[start : start + total]) for start in range(0, 3 * total, total)]
    for one in passes:
        assert Counter(one) == Counter(TRAIN_PROMPTS)
    assert len(set(passes)) == 3 and TRAIN_PROMPTS not in passes  # each in an order of its own


def test_what_is_drawn_depends_on_nothing_else() -> None:
    items = range(64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(items, 5, 8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    draw(items, 4, 8, seed=2)
    assert draw(items, 5, 8, seed=2) == first
    assert draw(items, 5, 8, seed=3) != first
    assert draw(items, 6, 8, seed=2) != first
    # The same passes whatever the size of a step.
    assert draw(items, 2, 16, 2) == draw(items, 4, 8, 2) + draw(items, 5, 8, 2)
    # The passes of one seed are not those of the next.
    orders = {tuple(draw(items, step, 64, seed)) for seed in range(4) for step in range(4)}
    assert len(orders) == 16
    assert draw(["only"], 3, 4, seed=0) == ["only"] * 4


def pairs_of(count: int) -> list[Pair]:
    """Pairs that differ from each other in their chosen completion, of unequal lengths."""
    return [
        Pair(sample([2, 3], [5 + number, 4, EOS][: 2 + number % 2]), sample([2, 3], [4] * 3))
        for number in range(count)
    ]


@pytest.fixture
def data(adapted) -> PairData:
    policy, _ = adapted
    return PairData(policy, pairs_of(7), pad_token_id=EOS, batch_size=3, temperature=0.7)


def numbers_of(data: PairData, step: int, size: int, seed: int) -> list[int]:
    """Which pairs a step has: by the first token of what is chosen."""
    batch, reference = data.of_step(step, size, seed)
    assert reference.shape == (len(batch.input_ids),)
    return (batch.input_ids[batch.chosen, 2] - 5).tolist()


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_each_pair_comes_once_in_a_pass(data, size) -> None:
    numbers: list[int] = []
    for step in range(math.ceil(21 / size)):
        numbers += numbers_of(data, step, size, seed=1)
    passes = [tuple(numbers[start : start + 7]) for start in range(0, 21, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(passes)) == 3


def test_pairs_of_a_step_depend_on_nothing_else(data) -> None:
    state = torch.get_rng_state()
    first = numbers_of(data, 3, 3, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    numbers_of(data, 2, 3, seed=2)
    assert numbers_of(data, 3, 3, seed=2) == first
    orders = {tuple(numbers_of(data, step, 7, seed)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


def test_reference_log_probs_stay_with_their_pairs(data, adapted) -> None:
    policy, _ = adapted
    batch, reference = data.of_step(1, 3, seed=0)

    def formula(dtype: torch.dtype) -> Tensor:
        with policy.disable_adapter():
            logits = plain_logits_one_by_one(policy, batch.input_ids, batch.attention_mask, dtype)
        log_p = (logits[:, :-1] / 0.7).log_softmax(-1)
        return (log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.scored).sum(-1)

    plain, exact = formula(torch.float32), formula(torch.float64)
    assert exact[batch.chosen].unique().numel() == 3
    assert_as_accurate(reference, plain, exact, size=3 * 12, of="reference")


def test_log_probs_hold_less_than_plain_ones(adapted) -> None:
    policy, tokenizer = adapted
    batch = rollout(policy, tokenizer, PROMPTS, new_tokens=6, logprobs=False)
    samples = samples_of(batch)
    before = [p.grad for p in policy.parameters()]
    found = logprob_memory(policy, samples, EOS)
    longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in samples)
    assert found.tokens == len(samples) * longest
    assert found.fused_bytes < found.plain_bytes
    # Plain: the logits and their log-softmax at once, at least, of every position.
    assert found.plain_bytes >= 2 * found.tokens * 2013 * 4
    assert [p.grad for p in policy.parameters()] == before


# A GGUF file is made dense once.


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were made dense; nothing is read of them but their bytes."""
    files: list[Path] = []

    def write(file: Path, folder: Path) -> None:
        assert not folder.exists()
        folder.mkdir()
        (folder / "weights").write_bytes(file.read_bytes())
        files.append(file)

    monkeypatch.setattr(models, "_write_dense", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files


def gguf(folder: Path, content: bytes = b"some weights", name: str = "tiny.gguf") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def test_a_dense_model_is_written_once(written, tmp_path) -> None:
    file = gguf(tmp_path)
    folder = Path(dense_folder(str(file)))
    assert (folder / "weights").read_bytes() == b"some weights"
    assert folder.parent == tmp_path / "cache" / "fastrlhf"
    assert folder.name.startswith("tiny-")
    assert dense_folder(str(file)) == str(folder)
    assert written == [file]
    assert list(folder.parent.iterdir()) == [folder]  # nothing unfinished stays


def test_a_file_of_other_content_is_another_model(written, tmp_path) -> None:
    first = dense_folder(str(gguf(tmp_path)))
    second = dense_folder(str(gguf(tmp_path, b"other weights")))
    assert first != second and len(written) == 2
    assert Path(second, "weights").read_bytes() == b"other weights"
    # What differs beyond the first block that is read does too.
    large = bytes(2**20)
    folders = {dense_folder(str(gguf(tmp_path, large + tail))) for tail in (b"1", b"2")}
    assert len(folders) == 2


@pytest.mark.parametrize("source", ["name/of-a-model", "/some/folder", "model.gguf.d"])
def test_other_sources_stay_as_they_are(written, source) -> None:
    assert dense_folder(source) == source
    assert not written


def test_another_process_may_be_faster(written, tmp_path, monkeypatch) -> None:
    write = models._write_dense
    file = gguf(tmp_path)
    finished: list[Path] = []

    def slower(source: Path, folder: Path) -> None:
        if not finished:  # the other one begins later, and is done before
            finished.append(Path())
            finished[0] = Path(dense_folder(str(file)))
            (finished[0] / "other").touch()
        write(source, folder)

    monkeypatch.setattr(models, "_write_dense", slower)
    assert Path(dense_folder(str(file))) == finished[0]
    assert (finished[0] / "other").exists()
    assert list(finished[0].parent.iterdir()) == [finished[0]]


def test_a_folder_that_cannot_get_its_name(written, tmp_path, monkeypatch) -> None:
    """Of which nobody else has made one: there is nothing to load."""
    file = gguf(tmp_path)

    def refuse(source: Path, target: Path) -> Path:
        raise PermissionError(f"{source} -> {target}")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "rename", refuse)
        dense_folder(str(file))
    assert list((tmp_path / "cache" / "fastrlhf").iterdir()) == []
    assert Path(dense_folder(str(file)), "weights").exists()


def test_a_failure_leaves_nothing_that_looks_finished(written, tmp_path, monkeypatch) -> None:
    write = models._write_dense
    file = gguf(tmp_path)

    def fail(source: Path, folder: Path) -> None:
        write(source, folder)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(models, "_write_dense", fail)
        dense_folder(str(file))
    assert list((tmp_path / "cache" / "fastrlhf").iterdir()) == []
    assert Path(dense_folder(str(file)), "weights").exists()


@pytest.mark.parametrize("given", [None, ""])
def test_the_cache_is_in_the_home_folder_by_default(written, tmp_path, monkeypatch, given) -> None:
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    folder = Path(dense_folder(str(gguf(tmp_path))))
    assert folder.parent == tmp_path / "home" / ".cache" / "fastrlhf"


def test_a_missing_file_is_named(written, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf"):
        dense_folder(str(tmp_path / "gone.gguf"))
