"""A step of TRPO with a group of processes is that of one process which has all the tokens."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from support.trpo_problems import Batch, flat, stepped

from fastrlhf import fisher_vector_product


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_group_of_one_process_takes_the_same_step(tmp_path, device) -> None:
    expected = stepped("cpu")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert torch.equal(stepped("cpu"), expected)
    finally:
        torch.distributed.destroy_process_group()


def take_a_step_as(rank: int, folder: str) -> None:
    """As one of two processes, with the rows of the batch that are its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    # Unequal counts of tokens, so that a mean of means is not the mean.
    batch = Batch("cpu", rows=slice(0, 2) if rank == 0 else slice(2, 3))
    info = batch.step(damping=0.01)
    product = fisher_vector_product(
        batch.policy, batch.params, torch.ones(flat(batch.params).numel()).double(),
        mask=batch.mask, damping=0.1,
    )  # fmt: skip
    torch.save([tuple(info), flat(batch.params), product], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_with_a_part_each_take_the_step_of_the_whole(tmp_path) -> None:
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [p.wait(timeout=1800) for p in processes] == [0, 0]
    whole = Batch("cpu")
    info = whole.step(damping=0.01)
    ones = torch.ones(flat(whole.params).numel(), dtype=torch.float64)
    product = fisher_vector_product(whole.policy, whole.params, ones, mask=whole.mask, damping=0.1)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for own_info, params, own_product in found:
        for value, expected in zip(own_info, info, strict=True):
            torch.testing.assert_close(value, expected)
        torch.testing.assert_close(params, flat(whole.params))
        torch.testing.assert_close(own_product, product)
    assert torch.equal(found[0][1], found[1][1])


if __name__ == "__main__":
    take_a_step_as(int(sys.argv[1]), str(Path(sys.argv[2])))
