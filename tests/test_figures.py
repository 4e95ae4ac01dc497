"""Every figure of the documentation is the one that was measured, in benchmarks/results/."""

import csv
import json
import re

import overview
import pytest
from support.pages import PAGES, ROOT

README, BENCHMARKS = PAGES["README.md"], PAGES["docs/benchmarks.md"]
RECIPES = PAGES["docs/recipes.md"]


def test_the_benchmarks_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "cpu" / "tables.md").read_text()
    summary = results.split("## Summary\n")[1].split("\n## ")[0].strip()
    assert len(summary.splitlines()) > 10 and summary in BENCHMARKS


def test_the_benchmarks_are_counted_right() -> None:
    contests: dict[tuple, dict[str, float]] = {}
    with (ROOT / "benchmarks" / "results" / "cpu" / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = (row[k] for k in ("operation", "head", "dtype", "vocab", "rows"))
            if row["status"] == "ok":
                times = contests.setdefault((*sizes, row["kind"], row["prompt"]), {})
                times[row["provider"]] = float(row["median_ms"])

    def fastest(kind: str, prompt: str) -> tuple[int, int]:
        """Contests in which no peer takes less time than our default, and all."""
        held = [times for key, times in contests.items() if key[-1] == prompt and kind in key[-2]]
        best = [min((n for n in t if not n.startswith("fastrlhf,")), key=t.get) for t in held]
        return best.count("fastrlhf"), len(held)

    won, of = fastest("backward", "0.5")
    won_in_all, of_all = fastest("forward", "0.5")  # "forward + backward" too
    won_forward, of_forward = won_in_all - won, of_all - of
    won_without, of_without = fastest("forward", "0.0")
    text = " ".join(BENCHMARKS.split())
    assert (
        f"Of {of} batches with half a prompt, forward + backward, fastrlhf is the fastest in "
        f"{won}; of {of_forward} in forward alone, in {won_forward}; of {of_without} without a "
        f"prompt, in {won_without}."
    ) in text

    ahead = [
        min(time for name, time in times.items() if name != "fastrlhf") / times["fastrlhf"]
        for key, times in contests.items()
        if key[-1] == "0.0"
    ]
    near = sum(0.91 <= round(ratio, 2) < 1 for ratio in ahead)
    assert f"in {near} more of those {of_without}, ours is within 9% of the fastest" in text


def test_the_table_of_fewer_words_and_tokens_is_the_record() -> None:
    columns = (
        "every token, every word", "no gradient, no matmul", "and shared rows",
        "kept ids and shared rows", "kept ids, gathered by hand",
    )  # fmt: skip

    def cell(found: dict | None) -> str:
        if found is None:
            return ""
        time, memory = found["milliseconds"], found["peak_bytes"] / 2**20
        return (
            f"{time:.0f} ms, {memory:.3g} MiB"
            if time >= 1000
            else f"{time:.3g} ms, {memory:.3g} MiB"
        )

    for case in figures("fewer-rows")["cases"]:
        row = (
            case["head"], f"{case['live_share']:g}", f"{case['states_per_token']:g}",
            *(cell(case["figures"].get(name)) for name in columns),
        )  # fmt: skip
        assert f"| {' | '.join(row)} |" in BENCHMARKS


def test_the_table_of_lazy_logits_is_the_record() -> None:
    records = figures("lazy-logits")["records"]
    for plain, lazy in zip(records[::2], records[1::2], strict=True):
        assert (plain["provider"], lazy["provider"]) == ("plain", "lazy_logits")
        assert [plain[x] for x in ("loss", "trained", "dtype")] == [
            lazy[x] for x in ("loss", "trained", "dtype")
        ]
        row = (
            lazy["loss"], f"{lazy['trained'].split()[0]}, {lazy['dtype']}",
            f"{lazy['processor_ms'] / plain['processor_ms']:.2f}",
            f"{plain['peak_mib']:.0f} → {lazy['peak_mib']:.0f}",
            ", ".join(f"{what} {plan}" for what, plan, _ in lazy["fused"]) or "none",
        )  # fmt: skip
        assert f"| {' | '.join(row)} |" in BENCHMARKS
    calls = figures("lazy-overhead")["microseconds"]
    for name, taken in calls.items():
        assert f"| {name} | {taken['plain']:g} | {taken['lazy']:g} |" in BENCHMARKS


def figures(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results/cpu" / f"{name}.json").read_text("utf-8"))


def row_of(command: str) -> str:
    """The row of the table of recipes that begins so."""
    table = RECIPES[RECIPES.index("| recipe | learns from") : RECIPES.index("## The demo")]
    (found,) = (line for line in table.splitlines() if line.startswith(f"| `{command}"))
    return found


def size(seconds: float, memory: int) -> str:
    return f"| {seconds:.0f} s, {memory / 2**30:.1f} GiB |"


def reward(mean: float, standard_error: float) -> str:
    return f"{mean:+.3f} ± {standard_error:.3f}"


def nats(mean: float, standard_error: float) -> str:
    return f"{mean:.2f} ± {standard_error:.2f}"


def test_the_figures_of_the_pipeline_are_those_of_the_file() -> None:
    runs = figures("recipes")
    for command, name in (
        ("sft", "sft"), ("reward", "reward"), ("ppo --reward", "ppo"), ("distill", "distill"),
    ):  # fmt: skip
        run = runs[name]
        shown = size(sum(run["seconds"].values()), run["peak_memory_bytes"])
        assert row_of(command).endswith(shown), shown
    loss, ended = runs["sft"]["held_out_loss"], runs["sft"]["ended"]
    assert f"loss {loss['before']:.2f} → {loss['after']:.2f}" in row_of("sft")
    assert f"{ended['before']:.0%} → {ended['after']:.0%}" in row_of("sft")
    before, after = (runs["reward"]["held_out"][when] for when in ("before", "after"))
    right = [f"{one['accuracy']:.3f} ± {one['error']:.3f}" for one in (before, after)]
    assert " → ".join(right) in row_of("reward")
    assert f"VADER {after['correlation']:+.2f}" in row_of("reward")
    assert f"on {runs['reward']['rankings']['training']} pairs" in row_of("reward")
    vader = [reward(**runs["ppo"]["sentiment"][when]) for when in ("before", "after")]
    shown = f"VADER {' → '.join(vader)}, at KL {nats(**runs['ppo']['kl'])}"
    assert shown in row_of("ppo --reward")
    kl = [nats(**runs["distill"]["kl"][when]) for when in ("before", "after")]
    assert " → ".join(kl) in row_of("distill")


@pytest.mark.parametrize(
    ("command", "method", "setting"),
    [
        ("ppo --kl-coef 0 ", "PPO", "KL coef. = 0"),
        ("dpo --beta 0.2", "DPO", "β = 0.2"),
        ("grpo --kl-coef 0.1", "GRPO", "KL coef. = 0.1"),
        ("trpo --max-kl 0.1", "TRPO", "δ = 0.1"),
    ],
)
def test_the_figures_of_the_frontier_are_those_of_the_file(command, method, setting) -> None:
    wanted = (method, setting)
    lines = figures("frontier")["lines"]
    (line,) = (one for one in lines if (one["method"], one["setting"]) == wanted)
    last = line["points"][-1]
    after, kl = (last["reward"], last["reward_error"]), nats(last["kl"], last["kl_error"])
    row = row_of(command)
    assert f"VADER {reward(**line['before'])} → {reward(*after)}, at KL {kl}" in row
    assert row.endswith(size(line["seconds"], line["peak_memory_bytes"]))


def test_the_figures_of_the_demo_are_those_of_the_file() -> None:
    found = figures("recipes")["demo"]
    demo = RECIPES[RECIPES.index("## The demo") :]
    shown = [reward(**found["sentiment"][when]) for when in ("before", "after", "difference")]
    assert f"| {' | '.join(shown)} |" in demo
    assert f"| 0 | {nats(**found['kl'])} |" in demo


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_tables_of_a_training_step_are_the_record(page) -> None:
    """Of each table, the columns that the page has."""
    providers = {
        "fastrlhf": "fastrlhf",
        "fastrlhf, packed": "fastrlhf, packed",
        "eager": "eager",
        "plain PyTorch": "eager",
        "eager, packed": "eager, packed",
        "TRL fused head": "TRL fused head",
        "TRL's fused head": "TRL fused head",
        "TRL, packed": "TRL fused head, packed",
        "F.linear_cross_entropy": "F.linear_cross_entropy",
    }
    measured = {
        (r["loss"], r["trained"].split(" ")[0], r["provider"]): r
        for r in figures("model-step")["records"]
    }
    begin = PAGES[page].index("| step | fastrlhf")
    header, _, *rows = PAGES[page][begin:].split("\n\n")[0].splitlines()
    _, *columns = cells(header)
    assert len(rows) == 4 and len(columns) >= 4
    for row in rows:
        step, *shown = cells(row)
        loss, trained = step.split(", ")
        for column, found in zip(columns, shown, strict=True):
            key = loss, trained.split(" ")[0], providers[column]
            record = measured.get(key, {"status": "not measured"})
            if record["status"] == "ok":
                seconds = record["median_ms"] / 1000
                assert found == f"{seconds:.2f} s, {record['peak_mib']:.0f} MiB", key
            else:
                assert found == "", key


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_picture_is_that_of_the_results() -> None:
    picture = (ROOT / "benchmarks/results/cpu/overview.svg").read_text()
    found = overview.chosen(overview.report.load(ROOT / "benchmarks/results/cpu/results.json")[1])
    assert len(found) == 7 and all("fastrlhf" in peers for peers in found.values())
    for operation, peers in found.items():
        ours = peers["fastrlhf"]
        shown = f"{ours['median_ms']:.3g} ms, {ours['peak_mib']:.3g} MiB"
        (row,) = (
            line for line in BENCHMARKS.splitlines()
            if re.match(rf"\| {operation}(, head trained)? +\|", line)
        )  # fmt: skip
        assert cells(row)[1] == shown
        for record in peers.values():
            for measure in overview.MEASURES.values():
                assert f'id="{overview.dot(record, measure)}"' in picture


@pytest.mark.parametrize(
    "name", ["usual", "linear_token_logprobs", "linear_cross_entropy"]
)  # fmt: skip
def test_the_figures_of_a_shared_vocabulary_are_those_of_the_file(name) -> None:
    page = (ROOT / "benchmarks/results/ranks.md").read_text("utf-8")
    label = "the usual formula" if name == "usual" else f"`{name}(group=)`"
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {label} |"))
    found = figures("ranks")
    frozen, trained = (found[head][name] for head in ("frozen head", "trained head"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    for cell, measured in zip(cells[1:3], (frozen, trained), strict=True):
        assert cell.split(" ms")[0] == f"{measured['milliseconds']:.0f}"
    for cell, kind in zip(cells[3:5], ("all_gather", "all_reduce"), strict=True):
        parts = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", cell)]
        assert sum(parts) == frozen["bytes"].get(kind, 0) == trained["bytes"].get(kind, 0)
