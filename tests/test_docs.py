"""All pages of the documentation: their examples run, and what they name and link to is there."""

import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pages import DOCS, PAGES, PRINTING, ROOT, Block, blocks
from support.tiny_models import make
from torch import Tensor

import fastrlhf
from fastrlhf import AdaptiveKLController, kto_kl

EXAMPLES = [block for block in blocks("python") if not block.page.startswith(PRINTING)]


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=[f"{x.page}:{x.code.count(chr(10))}" for x in EXAMPLES]
)
def test_examples_run(example: Block) -> None:
    for name in re.findall("^from (trl|transformers|fastrlhf.integrations) ", example.code, re.M):
        pytest.importorskip(name, reason=f"needs {name}")
    namespace = example.run()
    for name in ("trl", "transformers"):  # what an example patches
        if name in namespace:
            namespace[name].unpatch()


# Commands, and names of files.


def commands() -> Iterator[tuple[str, str]]:
    """The page and the line of each command of a shell, without its comment."""
    for block in blocks("(?:ba)?sh"):
        for line in block.code.splitlines():
            if command := line.split("#")[0].strip():
                yield block.page, command


def is_there(command: str) -> bool:
    """Whether what a command names exists: a target, a module, a file, an extra."""
    words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        return all(word in targets for word in words[1:])
    if "-m" in words[:2]:
        return find_spec(words[words.index("-m") + 1]) is not None
    if words[0].endswith("python"):
        return (ROOT / words[1]).is_file()
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)
        return all(
            extra in extras
            for asked in re.findall(r"\[([\w,]+)\]", command)
            for extra in asked.split(",")
        )
    if words[0] == "torchrun":
        return all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    return words == ["pre-commit", "install"]


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_what_a_command_names_is_there(page: str, command: str) -> None:
    assert is_there(command), f"{page}: {command}"


def test_a_command_that_names_nothing_is_noticed() -> None:
    for command in (
        "make nothing", "python -m fastrlhf.nothing", "python benchmarks/nothing.py",
        "pip install '.[nothing]'", "nothing",
    ):  # fmt: skip
        assert not is_there(command), command


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text = PAGES[page]
    for recipe in re.findall(r"fastrlhf\.recipes\.([a-z_]+)", text):
        assert (ROOT / "fastrlhf" / "recipes" / f"{recipe}.py").is_file(), recipe
    for name in re.findall(
        r"`(?:\w+=\w+ )?(?:python |pytest )?((?:benchmarks|tests|fastrlhf|examples)/\w[\w/]*\.\w+)",
        text,
    ):
        if not re.search(r"[/_]x\.py$", name):  # x stands for any name
            assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert is_there(f"make {target}"), target
    for extra in re.findall(r"pip install ['\"](\.\[\w+\])['\"]`", text):
        assert is_there(f"pip install {extra}"), extra


# Links and tables.


def anchors(path: Path) -> set[str]:
    """Those of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(link: str, page: Path) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name) if name else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_tables_have_as_many_cells_in_each_row(page: str) -> None:
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert link.startswith("http") or leads_somewhere(link, ROOT / page), link
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        cells = {len(re.sub(r"\\\|", "", row).split("|")) for row in table.splitlines()}
        assert len(cells) == 1, table[:80]


def test_a_link_that_leads_nowhere_is_noticed() -> None:
    page = DOCS / "index.md"
    assert leads_somewhere("guide/models.md#with-transformerstrainer", page)
    assert not leads_somewhere("guide/models.md#nothing", page)
    assert not leads_somewhere("guide/nothing.md", page)


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The website, of which any warning is an error."""
    pytest.importorskip("sphinx", reason="needs sphinx")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.xdist_group("site")
def test_the_site_has_an_entry_for_every_public_name(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    entries = {name for kind in found.data.values() for name in kind}
    wanted = {f"fastrlhf.{name}" for name in fastrlhf.__all__}
    for library in ("trl", "transformers"):
        wanted |= {f"fastrlhf.integrations.{library}.{x}" for x in ("patch", "unpatch", "patched")}
    assert wanted <= entries, wanted - entries


def test_a_docstring_is_read_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="needs sphinx")
    monkeypatch.syspath_prepend(DOCS)
    docstrings = import_module("docstrings")
    given = """\
        Do |this| to *x*.

        Eager equivalent::

            a | b * c

        Args:
            x, y,
                z: several, on
                two lines.
            w: one.

        Options, which `f` takes:
            a: one.

        Returns:
            loss: one, on
            two lines.
            metrics: the other.

        Example:
            >>> 2 * "a|"
            'a|a|'

        one: a field. Of two
        lines."""
    wanted = """\
        Do ∣this∣ to \\*x\\*.

        Eager equivalent::

            a | b * c

        :Args:

           ``x``, ``y``, ``z``
              several, on
              two lines.

           ``w``
              one.

        Options, which `f` takes:

        ``a``
           one.

        :Returns:

           ``loss``
              one, on
              two lines.

           ``metrics``
              the other.

        :Example:

           >>> 2 * "a|"
           'a|a|'

        ``one``
           a field. Of two
           lines.
        """
    found = "\n".join(docstrings.restructured(textwrap.dedent(given).splitlines()))
    assert re.sub("\n\n+", "\n\n", found.strip()) == textwrap.dedent(wanted).strip()


@pytest.mark.xdist_group("site")
def test_the_site_shows_docstrings_as_they_are_meant(site: Path) -> None:
    text = (site / "reference" / "logits.html").read_text(encoding="utf-8")
    entry = text[
        text.index('id="fastrlhf.token_stats"') : text.index('id="fastrlhf.token_logprobs"')
    ]
    for section in ("Args", "Returns", "Raises"):
        assert f'<dt class="field-odd">{section}' in entry or (
            f'<dt class="field-even">{section}' in entry
        ), section
    # An argument, a block of code, a link to another entry.
    assert '<dt><code class="docutils literal notranslate"><span class="pre">logits</span>' in entry
    assert '<div class="highlight"><pre>' in entry and "is_top1" in entry
    assert 'href="#fastrlhf.shift_targets"' in entry
    assert "`" not in re.sub(r"<[^>]*>", "", entry)


# The pages on losses.


def examples() -> dict[str, Any]:
    """What all examples of the pages on losses define."""
    names: dict[str, Any] = {}
    for block in EXAMPLES:
        if block.page.startswith("docs/losses/"):
            names |= block.run()
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


def test_every_loss_type_has_a_row() -> None:
    page = PAGES["docs/losses/policy.md"]
    for name in fastrlhf.losses.grpo._GRPO:
        assert f"\n| `{name}` |" in page, name
    page = PAGES["docs/losses/preference.md"]
    for name in fastrlhf.losses.preference.LOSS_TYPES:
        assert f"`{name}`" in page, name


# Lists of functions.

TAKERS = {
    name: set(inspect.signature(function).parameters)
    for name, function in vars(fastrlhf).items()
    if name in fastrlhf.__all__ and inspect.isfunction(function)
}


def takers(argument: str) -> set[str]:
    """The public functions that take it."""
    return {name for name, arguments in TAKERS.items() if argument in arguments}


def named(text: str) -> set[str]:
    """The public functions that are named in a text."""
    return set(re.findall(r"`(\w+)`", text)) & TAKERS.keys()


def between(page: str, start: str, end: str) -> str:
    return PAGES[page].split(start)[1].split(end)[0]


def test_the_functions_that_are_said_to_take_packed_tokens_are_those_that_do() -> None:
    listed = between("docs/guide/packed.md", "That goes for:", "What does not ask")
    assert named(listed) == takers("cu_seqlens")


LINEAR = {name for name in TAKERS if name.startswith("linear_")}


def test_the_functions_that_are_said_to_take_a_group_are_those_that_do() -> None:
    page = "docs/guide/devices.md"
    from_logits = between(page, "Tensor parallelism spreads it.", " and the `linear_*` operations")
    without = between(page, "operations take `group=`, but not", ":")
    of_sequences = between(page, "(context parallel): `group=` of", "How")
    of_batches = between(page, "**Statistics of the batch:**", "have a `group=`")
    assert named(without) == LINEAR - takers("group")
    listed = [named(text) for text in (from_logits, of_sequences, of_batches)]
    assert set.union(*listed) == takers("group") - LINEAR - {"global_normalizer"}
    # The page that shows each step says the same.
    page = "docs/distributed.md"
    of_logits, of_linear = (
        named(re.search(rf"^\| {start}.*$", PAGES[page], flags=re.M).group())  # type: ignore[union-attr]
        for start in ("logits that are cut", "a head that you cut yourself")
    )
    assert of_logits == listed[0] and of_linear == named(without)
    of_sequences = between(page, "sums over sequences need one", "take the\nsame `group=`")
    assert named(of_sequences) | {"sequence_logprobs"} == listed[1]
    assert named(between(page, "## Statistics of a batch", "take `group=`")) == listed[2]


def test_every_file_of_operations_has_a_place_in_the_table() -> None:
    table = between("CONTRIBUTING.md", "is one flat folder", "###")
    patterns = [
        pattern
        for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M)
        for pattern in re.findall(r"`([\w*]+)`", row)
    ]
    files = [path.stem for path in (ROOT / "fastrlhf" / "ops").glob("[!_]*.py")]
    assert [name for name in files if not any(fnmatch(name, x) for x in patterns)] == []
    assert [x for x in patterns if not any(fnmatch(name, x) for name in files)] == []


@pytest.mark.parametrize("page", ["docs/concepts/backends.md", "docs/guide/logits.md"])
def test_the_functions_that_are_said_to_refuse_transforms_are_those_that_do(page: str) -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "fastrlhf").rglob("*.py")]
    refusing = {
        name
        for source in sources
        for name in re.findall(r'refuse_transforms\(\s*"(\w+(?:\(entropy=True\))?)"', source)
    }
    listed = between(page, "builds the logits.", "refuse, and say what to call.")
    assert set(re.findall(r"`([^`]*)`", listed)) - {"sft_loss"} == refusing
