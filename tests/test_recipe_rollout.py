"""What a rollout holds beside what plain transformers say of it, one sequence at a time."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for name in ("transformers", "peft", "tokenizers"):
    pytest.importorskip(name)

from support import tiny_models  # noqa: E402
from support.compare import assert_as_accurate, budget  # noqa: E402
from support.pages import example  # noqa: E402
from support.recipe_models import (  # noqa: E402, F401  the fixtures are of every test
    EOS,
    PEFT_READS_AN_OLD_NAME,
    VALUED,
    WORDS,
    one_thread,
    plain_logits_one_by_one,
    randomize_adapters,
    write_tiny_model,
)
from support.rollout_models import CPU, GOOD, PROMPTS, assert_logprobs, hostile  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    LlamaForTokenClassification,
)

from fastrlhf import model_policy_loss  # noqa: E402
from fastrlhf.recipes.models import add_adapters, load_model  # noqa: E402
from fastrlhf.recipes.rollout import (  # noqa: E402
    Rollout,
    completion_mask,
    end_tokens,
    rollout,
    token_logprobs,
)

pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
NEW_TOKENS = 8

# Far enough from 1 for the tail to be sampled, of which top-k and top-p would leave nothing.
TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), fillers=100)


@pytest.fixture
def loaded(model_folder: Path):
    return load_model(str(model_folder), CPU)


@pytest.fixture
def adapted(loaded):
    base, tokenizer = loaded
    policy = add_adapters(base, rank=2)
    randomize_adapters(policy)
    return policy, tokenizer


def standard_score(hits: Tensor, chances: Tensor) -> float:
    """How many standard deviations independent events are from their chances (given the past)."""
    return float((hits.double() - chances).sum() / (chances * (1 - chances)).sum().sqrt())


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_tokens_come_from_the_tempered_softmax_alone(loaded, kind) -> None:
    model, tokenizer = loaded
    policy = model if kind == "plain" else add_adapters(model, rank=2)
    if kind == "peft":
        randomize_adapters(policy)
    policy.generation_config = model.generation_config = hostile()
    batch = rollout(policy, tokenizer, PROMPTS * 24, new_tokens=NEW_TOKENS, temperature=TEMPERATURE)
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = plain_logits_one_by_one(policy, ids, batch["attention_mask"], torch.float64)
    chances = (logits[:, :-1] / TEMPERATURE).softmax(-1)
    place = mask.cumsum(1)[mask] - 1  # in the completion
    chances, following = chances[mask], ids[:, 1:][mask]
    earlier = torch.where(batch["attention_mask"] > 0, ids, -1)
    repeats = torch.zeros(*mask.shape, chances.shape[-1], dtype=torch.bool)
    for column in range(mask.shape[1]):
        seen = earlier[:, : column + 1]
        repeats[:, column] = (seen[..., None] == torch.arange(chances.shape[-1])).any(1)
    ranks = chances.argsort(-1, descending=True).argsort(-1)
    nucleus = chances.sort(-1, descending=True).values.cumsum(-1).gather(-1, ranks) > 0.9
    words = torch.arange(chances.shape[-1]).expand_as(chances)
    events = {
        "the likeliest token": ranks == 0,
        "beyond the 50 likeliest": ranks >= 50,
        "outside the nucleus": nucleus,
        "a token that was there before": repeats[mask],
        "an end": (words == EOS) | (words == GOOD),
        "an end among the first": ((words == EOS) | (words == GOOD)) & (place < 4)[:, None],
    }
    common = {word: words == index for index, word in enumerate(WORDS)}
    for event, happens in (events | common).items():
        expected = (chances * happens).sum(-1)
        if event in common and expected.sum() < 30:
            continue
        assert expected.sum() > 10, f"{event}: too rare to be judged"
        hit = happens.gather(-1, following[:, None])[:, 0]
        assert abs(standard_score(hit, expected)) < 4.5, event


def test_a_seed_decides_the_samples(loaded) -> None:
    model, tokenizer = loaded
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS))
    assert torch.equal(found[0]["input_ids"], found[1]["input_ids"])
    assert torch.equal(found[0]["logprobs"], found[1]["logprobs"])
    assert not torch.equal(found[0]["input_ids"], found[2]["input_ids"])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_are_those_of_each_sequence_alone(adapted, temperature) -> None:
    policy, tokenizer = adapted
    batch = rollout(policy, tokenizer, PROMPTS, new_tokens=NEW_TOKENS, temperature=temperature)
    assert_logprobs(batch["logprobs"], policy, batch, temperature)
    with policy.disable_adapter():
        assert_logprobs(batch["ref_logprobs"], policy, batch, temperature)
    difference = (batch["logprobs"] - batch["ref_logprobs"]).abs().max()
    assert difference > 0.01, "the adapters do nothing, and so neither does this test"


def test_a_batch_is_laid_out_as_it_says(loaded) -> None:
    model, tokenizer = loaded
    batch = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS, hidden_states=True)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    rows, width = ids.shape
    assert rows == len(PROMPTS)
    assert all(
        batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "position_ids")
    )
    assert batch["completion_mask"].dtype == batch["truncated"].dtype == torch.bool
    assert batch["prompts"] == PROMPTS
    lengths, ended = [], 0
    for row in range(rows):
        prompt = [WORDS.index(word) for word in PROMPTS[row].split()]
        start = len(prompt)
        assert ids[row, :start].tolist() == prompt
        completion = ids[row, start : start + NEW_TOKENS].tolist()
        length = completion.index(EOS) + 1 if EOS in completion else NEW_TOKENS
        stop = start + length
        assert stop <= width
        assert attention[row].tolist() == [1] * stop + [0] * (width - stop)
        scored = [start <= place < stop for place in range(width)]
        assert batch["completion_mask"][row].tolist() == scored
        assert batch["position_ids"][row].tolist() == list(range(width))
        assert (ids[row, stop:] == tokenizer.pad_token_id).all()
        assert bool(batch["truncated"][row]) == (EOS not in completion)
        text = [tokenizer.convert_ids_to_tokens(token) for token in completion[:length]]
        words = [word for word in text if word not in ("<eos>", "<unk>")]
        assert batch["completions"][row].split() == words
        lengths.append(stop)
        ended += EOS in completion[:-1]
    assert 0 < ended < rows  # both kinds were there
    assert width == max(lengths)
    assert batch["logprobs"].shape == (rows, width - 1)
    assert batch["hidden_states"].shape[:2] == (rows, width)


def test_a_batch_is_as_long_as_its_longest_sequence(loaded) -> None:
    """And not as the longest prompt with the longest completion."""
    model, tokenizer = loaded

    def the_second_ends(module: nn.Module, arguments: object, logits: Tensor) -> Tensor:
        rise = torch.zeros_like(logits)
        rise[0, :, EOS], rise[1, :, EOS] = -1e3, 1e3
        return logits + rise

    with model.lm_head.register_forward_hook(the_second_ends):
        batch = rollout(
            model, tokenizer, ["the", "the film was good"], new_tokens=3, logprobs=False
        )
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["completion_mask"].long().tolist() == [[0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert batch["truncated"].tolist() == [True, False]


def test_a_prompt_may_have_the_tokens_that_end_and_pad(loaded) -> None:
    model, tokenizer = loaded
    assert tokenizer.pad_token_id == EOS
    batch = rollout(model, tokenizer, ["the <eos>", "<eos> the film was <eos>"], new_tokens=4)
    assert batch["input_ids"][0, :2].tolist() == [2, EOS]
    assert batch["input_ids"][1, :5].tolist() == [EOS, 2, 3, 4, EOS]
    assert batch["attention_mask"][1, :5].all() and not batch["completion_mask"][1, :5].any()
    assert batch["completion_mask"][0, 2] and batch["completion_mask"][1, 5]
    assert_logprobs(batch["logprobs"], model, batch, 1.0)


def test_padding_changes_nothing(loaded) -> None:
    model, tokenizer = loaded
    batch = rollout(model, tokenizer, PROMPTS[:4], new_tokens=NEW_TOKENS)
    assert not batch["attention_mask"].all()
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        alone = Rollout(
            input_ids=batch["input_ids"][row : row + 1, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            completion_mask=batch["completion_mask"][row : row + 1, :length],
        )
        with torch.no_grad():
            found, _ = token_logprobs(model, alone)
        together = batch["logprobs"][row, : length - 1]
        allowed = budget(0.0, torch.float32, size=float(found.abs().max()) + 10)
        assert (found[0] - together).abs().max() <= allowed


def test_a_tokenizer_that_pads_on_the_right_is_not_asked(loaded) -> None:
    model, tokenizer = loaded
    torch.manual_seed(1)
    expected = rollout(model, tokenizer, PROMPTS, new_tokens=4)
    tokenizer.padding_side = "right"
    torch.manual_seed(1)
    found = rollout(model, tokenizer, PROMPTS, new_tokens=4)
    assert tokenizer.padding_side == "right"
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])


def test_a_pad_token_of_its_own_ends_nothing(loaded) -> None:
    model, tokenizer = loaded
    pad = WORDS.index("hate")
    torch.manual_seed(1)
    expected = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    tokenizer.pad_token = WORDS[pad]
    torch.manual_seed(1)
    found = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    assert (found["input_ids"][found["attention_mask"] == 0] == pad).all()
    for key in ("attention_mask", "completion_mask", "truncated", "logprobs", "position_ids"):
        assert torch.equal(found[key], expected[key]), key
    # A sampled token that happens to be the padding is a token like any other.
    assert (found["input_ids"][found["completion_mask"]] == pad).any()


def test_a_tokenizer_without_a_pad_token(model_folder, loaded) -> None:
    model, padding = loaded
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.pad_token_id is None and padding.pad_token_id == EOS
    torch.manual_seed(1)
    expected = rollout(model, padding, PROMPTS, new_tokens=NEW_TOKENS)
    torch.manual_seed(1)
    found = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    assert tokenizer.pad_token_id is None
    for key, value in expected.items():
        same = torch.equal(value, found[key]) if isinstance(value, Tensor) else value == found[key]
        assert same, key
    # The first of several ends, wherever the tokenizer's own stands among them.
    tokenizer.eos_token = "good"
    model.generation_config.eos_token_id = [GOOD, WORDS.index("bad"), WORDS.index("film")]
    batch = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    padded = batch["input_ids"][batch["attention_mask"] == 0]
    assert padded.numel() and (padded == WORDS.index("film")).all()


def test_several_tokens_end_a_text(loaded) -> None:
    model, tokenizer = loaded
    model.generation_config.eos_token_id = [GOOD, WORDS.index("bad")]
    ends = {EOS, GOOD, WORDS.index("bad")}
    assert end_tokens(model, tokenizer) == sorted(ends)
    batch = rollout(model, tokenizer, PROMPTS * 2, new_tokens=NEW_TOKENS, temperature=TEMPERATURE)
    seen = set()
    for ids, mask, truncated in zip(
        batch["input_ids"], batch["completion_mask"], batch["truncated"], strict=True
    ):
        tokens = ids[mask].tolist()
        assert not ends & set(tokens[:-1])
        assert truncated == (tokens[-1] not in ends)
        assert len(tokens) == NEW_TOKENS or not truncated
        seen |= ends & set(tokens)
    assert seen == ends
    assert_logprobs(batch["logprobs"], model, batch, TEMPERATURE)


@pytest.mark.parametrize("declared, without", [(None, []), (7, [7]), ([8, EOS, 8], [EOS, 8])])
def test_end_tokens_are_the_tokenizer_s_and_the_model_s(loaded, declared, without) -> None:
    model, tokenizer = loaded
    model.generation_config.eos_token_id = declared
    assert end_tokens(model, tokenizer) == sorted({EOS, *without})
    assert end_tokens(nn.Linear(1, 1), tokenizer) == [EOS]
    tokenizer.eos_token = None
    if without:
        assert end_tokens(model, tokenizer) == without


def test_something_must_end_a_text(loaded) -> None:
    model, tokenizer = loaded
    tokenizer.eos_token = None
    own = model.generation_config
    own.eos_token_id = None
    for model_ in (model, nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"^tokenizer: expected one with an eos token$"):
            end_tokens(model_, tokenizer)
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with an eos token$"):
        rollout(model, tokenizer, ["the"])
    assert model.generation_config is own
    # The model alone may say what does.
    own.eos_token_id = GOOD
    batch = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    rows = zip(batch["input_ids"], batch["completion_mask"], strict=True)
    last = [ids[mask][-1] for ids, mask in rows]
    assert [bool(token != GOOD) for token in last] == batch["truncated"].tolist()
    assert not batch["truncated"].all()


def test_a_completion_may_end_at_its_first_token(loaded) -> None:
    model, tokenizer = loaded

    def only_ends(module: nn.Module, arguments: object, logits: Tensor) -> Tensor:
        return logits.index_add(-1, torch.tensor([EOS]), torch.full((*logits.shape[:-1], 1), 1e3))

    with model.lm_head.register_forward_hook(only_ends):
        batch = rollout(model, tokenizer, PROMPTS[:3], new_tokens=NEW_TOKENS)
    assert batch["input_ids"].shape == (3, 5)
    assert batch["completion_mask"].sum(1).tolist() == [1, 1, 1]
    assert batch["completions"] == ["", "", ""] and not batch["truncated"].any()
    assert (batch["logprobs"] == 0).all()  # certain, and masked elsewhere


@pytest.mark.parametrize("ends", [EOS, [EOS], [EOS, 7]])
def test_completion_mask_keeps_all_up_to_the_first_end(ends) -> None:
    ids = torch.tensor([[5, 7, EOS, EOS], [EOS, 5, 7, 6], [7, 7, 7, 7], [1, 2, 3, EOS]])
    several = ends == [EOS, 7]
    expected = [
        [1, 1, not several, 0], [1, 0, 0, 0], [1] + [not several] * 3, [1, 1, 1, 1],
    ]  # fmt: skip
    assert completion_mask(ids, ends).tolist() == [[bool(x) for x in row] for row in expected]
    assert completion_mask(ids, ends).dtype == torch.bool


def test_a_given_reference_is_scored(loaded, model_folder) -> None:
    model, tokenizer = loaded
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight)
    options = {"new_tokens": NEW_TOKENS, "temperature": 0.7}
    assert "ref_logprobs" not in rollout(model, tokenizer, PROMPTS[:4], **options)
    batch = rollout(model, tokenizer, PROMPTS[:4], ref_model=other, **options)
    assert_logprobs(batch["logprobs"], model, batch, 0.7)
    assert_logprobs(batch["ref_logprobs"], other, batch, 0.7)
    # It is taken for a peft model too, whose base then is no reference.
    policy = add_adapters(model, rank=2)
    batch = rollout(policy, tokenizer, PROMPTS[:4], ref_model=other, **options)
    assert_logprobs(batch["ref_logprobs"], other, batch, 0.7)


def test_log_probs_can_be_left_out(adapted) -> None:
    policy, tokenizer = adapted
    torch.manual_seed(2)
    full = rollout(policy, tokenizer, PROMPTS[:4], new_tokens=4, hidden_states=True)
    torch.manual_seed(2)
    bare = rollout(policy, tokenizer, PROMPTS[:4], new_tokens=4, logprobs=False, hidden_states=True)
    assert set(full) - set(bare) == {"logprobs", "ref_logprobs", "hidden_states"}
    for key, value in bare.items():
        same = torch.equal(value, full[key]) if isinstance(value, Tensor) else value == full[key]
        assert same, key


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "OPT", "Cohere", "Bloom"])
def test_hidden_states_are_what_enters_the_head(loaded, name) -> None:
    model, tokenizer = tiny_models.make(name), loaded[1]
    batch = rollout(model, tokenizer, ["the", "the film"], new_tokens=4, hidden_states=True)
    assert_logprobs(batch["logprobs"], model, batch, 1.0)
    entered: list[Tensor] = []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, arguments: entered.append(arguments[0])):
        plain_logits_one_by_one(model, batch["input_ids"], batch["attention_mask"])
        plain_logits_one_by_one(model, batch["input_ids"], batch["attention_mask"], torch.float64)
    kept = batch["attention_mask"].bool()
    rows = batch["hidden_states"].shape[0]
    found = batch["hidden_states"][kept]
    plain, exact = (torch.cat([x[0] for x in entered[i * rows :][:rows]]) for i in range(2))
    assert not batch["hidden_states"].requires_grad
    assert_as_accurate(found, plain, exact, of="hidden state")


def test_all_values_are_finite_and_belong_to_valued_words(loaded) -> None:
    """The tiny model says what the other tests of recipes need: words of sentiment, and ends."""
    model, tokenizer = loaded
    batch = rollout(model, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    assert batch["logprobs"].isfinite().all() and (batch["logprobs"] <= 0).all()
    assert {word for text in batch["completions"] for word in text.split()} & set(VALUED)


def test_a_rollout_feeds_the_readme_s_ppo(adapted) -> None:
    policy, tokenizer = adapted
    readme = SimpleNamespace(**example("def ppo_targets(").run())
    torch.manual_seed(0)
    config = copy.deepcopy(policy.get_base_model().config)
    config.num_labels = 1
    critic = LlamaForTokenClassification(config).eval()
    batch = rollout(policy, tokenizer, PROMPTS, new_tokens=NEW_TOKENS)
    batch["scores"] = torch.randn(len(PROMPTS))
    with torch.no_grad():
        read = critic(batch["input_ids"], attention_mask=batch["attention_mask"])
    batch["values"] = read.logits[:, :-1, 0]
    batch = readme.ppo_targets(batch)
    keep = batch["completion_mask"][:, 1:]
    advantages = batch["advantages"][keep]
    assert advantages.std() > 0.5  # whitened, and so not all the same

    # Log-probs of a dozen nats or less, from logits of that size, in either of two forwards.
    rounding = budget(0.0, torch.float32, size=2 * 12)
    loss, metrics = model_policy_loss(
        policy, batch["input_ids"], batch["attention_mask"], batch["logprobs"],
        batch["advantages"], mask=batch["completion_mask"],
        clip_low=rounding, clip_high=rounding,
    )  # fmt: skip
    assert metrics["clip_ratio/region_mean"] == 0  # every ratio is 1 to rounding
    expected = -advantages.double().mean()
    allowed = rounding * float(advantages.abs().max())
    assert abs(float(loss.detach()) - expected) <= allowed

    total, metrics = readme.ppo_step(policy, critic, batch)
    value = 0.5 * (batch["values"] - batch["returns"])[keep].double().square().mean()
    allowed += budget(0.0, torch.float32, size=float(batch["returns"].abs().max()) ** 2)
    assert abs(float(total.detach()) - (expected + 0.1 * value)) <= allowed
    total.backward()
    trained = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in trained)
