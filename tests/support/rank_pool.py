"""Processes that hold a rank each, started once and given one function after the other.

`pool.run(function, *arguments, ranks=3)` calls `function(group, *arguments)` in the first three
processes, with the group of these, and returns what each returned. Functions are those of modules
that the processes can import: `support.something`, not a test file. Where such a function makes
groups or meshes of devices, it is called in all processes: PyTorch numbers groups by how many a
process has made, and processes with other counts would wait for each other in vain.
"""

import importlib.util
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVE_S = 300  # after which a rank gives up on the others, which may be slow to import
_START_S = 600  # of imports, where other processes have the cores
_CALL_S = 900


class FailedRanks(AssertionError):
    """What the ranks that failed have raised."""


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")  # of torch.distributed itself
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # ranks talk by gloo, and so have tensors on the CPU
    if importlib.util.find_spec("triton"):
        from .interpreter import look_up_the_language_once

        look_up_the_language_once()
    timeout = timedelta(seconds=_COLLECTIVE_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=_START_S),
    )  # fmt: skip
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, world + 1)}
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        function, arguments, ranks = task
        made = dist.distributed_c10d._world.group_count
        try:
            value = function(groups[ranks], *arguments)
            if ranks < world and dist.distributed_c10d._world.group_count != made:
                raise RuntimeError(
                    f"{function.__name__} makes groups: call it in all {world} ranks"
                )
            pipe.send((value, None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """So many processes, each of one thread; they end with the `with` statement."""

    def __init__(self, world: int = 4):
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: int) -> list[Any]:
        """What the function returned in each of the first processes.

        Raises:
            FailedRanks: with the traceback of each that raised.
        """
        found = self.outcomes(function, *arguments, ranks=ranks)
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        if failed:
            raise FailedRanks("\n".join(failed))
        return [value for value, _ in found]

    def outcomes(
        self, function: Callable[..., Any], *arguments: Any, ranks: int
    ) -> list[tuple[Any, str | None]]:
        """What the function returned in each process, or None and the traceback of what it raised.

        Where a rank has failed, its group may be out of step: the next call starts new processes.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes[:ranks]:
            pipe.send((function, arguments, ranks))
        end = time.monotonic() + _CALL_S
        found = [self._answer(rank, end) for rank in range(ranks)]
        if any(error for _, error in found):
            self._end()
        return found

    def _answer(self, rank: int, end: float) -> tuple[Any, str | None]:
        try:
            if self._pipes[rank].poll(max(0.0, end - time.monotonic())):
                return self._pipes[rank].recv()
        except EOFError:
            return None, "the process has ended"
        return None, f"no answer in {_CALL_S} s"

    def _start(self) -> None:
        # Spawned, not forked: nothing of this process's threads is there.
        context = torch.multiprocessing.get_context("spawn")
        folder = tempfile.TemporaryDirectory()
        self._folder = folder
        store = os.path.join(folder.name, "store")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        end = time.monotonic() + _START_S
        for rank in range(self.world):
            if self._answer(rank, end) != "ready":
                self._end()
                raise FailedRanks("the processes did not start")

    def _end(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:  # it has ended
                continue
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []
