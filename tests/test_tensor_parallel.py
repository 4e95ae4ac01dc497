"""Models whose head is cut among ranks by tensor parallelism, of torch and of transformers."""

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")

import torch
from support.rank_pool import RankPool
from support.tensor_parallel import CUTS, adapters_of_peft, differences, read_head, refusal
from support.wrapped_losses import TOLERANCE

pytestmark = pytest.mark.xdist_group("tensor parallel")


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    """A pool of each size, for transformers cuts a model among all ranks that there are."""
    with RankPool(2) as two, RankPool(4) as four:
        yield {2: two, 3: four, 4: four}


@pytest.mark.parametrize("name", CUTS)
def test_losses_and_gradients_are_those_of_the_whole_model(name, pools, tmp_path) -> None:
    ranks = CUTS[name].ranks
    found = pools[ranks].run(differences, name, str(tmp_path), ranks=ranks)
    for of_rank in found:
        for loss, (value, gradient, where, made) in of_rank.items():
            assert value <= TOLERANCE, f"{loss}: off by {value:.1e}"
            assert gradient <= TOLERANCE, f"{loss}: gradient of {where} off by {gradient:.1e}"
            assert torch.equal(made, found[0][loss][-1]), f"{loss}: other bits on another rank"


HEADS = [
    "torch, gathered output", "torch, sequence parallel", "transformers", "transformers, bias",
]  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_cut_model(name, pools, tmp_path) -> None:
    for errors in pools[2].run(read_head, name, str(tmp_path), ranks=2):
        assert max(errors) <= TOLERANCE


def test_an_adapter_that_peft_cuts_as_the_head(pools, tmp_path) -> None:
    for errors in pools[2].run(adapters_of_peft, str(tmp_path), ranks=2):
        assert max(errors) <= TOLERANCE


def test_another_cut_is_refused_by_name(pools, tmp_path) -> None:
    for said in pools[2].run(refusal, str(tmp_path), ranks=2):
        assert said.startswith("model: the weight of its head is sharded")
        assert "Shard(dim=1)" in said
