"""A recipe in two processes: the script that each of them runs, and how they are started."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

TWO_PROCESSES = """
import json, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from fastrlhf.recipes import dpo
from fastrlhf.recipes.run import Run, run_command
from fastrlhf.recipes.settings import AdapterOptions

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
device = "cpu" if torch.cuda.is_available() else "auto"
linear_options = AdapterOptions(
    output=str(folder / "linear"), device=device, save_every=1, max_grad_norm=100.0
)
run = Run("linear", linear_options)
assert run.processes == 2
assert run.share([0, 1, 2, 3]) == [[0, 1], [2, 3]][run.rank]
assert run.mean(run.rank) == 0.5
layer = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.ones_(layer.weight)
(wrapped,) = run.train(layer, learning_rate=0.1, total=2)
drawn = []
for step in run.steps(2):
    drawn.append(torch.rand(1).item())
    loss = (wrapped(torch.full((1, 2), 1.0 + 2 * run.rank)) * (1 + step)).sum()
    run.update(loss)
    run.log({"loss": loss, "gradient": layer.weight.grad[0, 0]})
linear = {"drawn": drawn, "weight": layer.weight.tolist(), "history": run.history}

options = dpo.DPOOptions(
    model=str(model), output=str(folder / "dpo"), device=device, steps=2, save_every=1,
    eval_prompts=3, eval_completions=1, draw_pairs=8, new_tokens=6, batch_size=4,
)
trained = {}
train = Run.train
def remember(run, *models, **rest):
    trained["policy"] = models[0]
    return train(run, *models, **rest)
Run.train = remember
metrics = dpo.train(options)
assert torch.distributed.is_initialized()  # a run of several runs goes on with it
assert run.mean(run.rank) == 0.5
weights = {
    name: value.tolist()
    for name, value in trained["policy"].state_dict().items() if "lora" in name
}
found = {"linear": linear, "weights": weights, "metrics": metrics}
(folder / f"rank{run.rank}.json").write_text(json.dumps(found, default=str))
run_command(lambda: None)
assert not torch.distributed.is_initialized()
"""


def run_in_two_processes(script: Path, *arguments: str) -> list[str]:
    """Run a script as torchrun would, and return what each process showed.

    Not by torchrun, whose processes look each other up by the name of the machine, which need not
    be one that is found; and nothing here waits for longer than it says.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_WAIT_POLICY": "passive",  # with which the script is not executed once more
    }  # fmt: skip
    with ExitStack() as stack:
        shown, processes = [], []
        for rank in ("0", "1"):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, str(script), *arguments], stdout=output, stderr=subprocess.STDOUT,
                env=environment | {"RANK": rank, "LOCAL_RANK": rank}, cwd=script.parent,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)  # which comes first
            shown.append(output)
            processes.append(process)
        end = time.monotonic() + 600
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
        texts = []
        for output in shown:
            output.seek(0)
            texts.append(output.read())
        codes = [process.poll() for process in processes]
    assert codes == [0, 0], "\n".join(text[-4000:] for text in texts)
    return texts
