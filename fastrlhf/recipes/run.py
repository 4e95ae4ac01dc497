"""What surrounds the steps of every recipe: devices, checkpoints, logs and what is left at the end.

A recipe makes a `Run`, lets it prepare what is trained, and loops over `run.steps(total)`:

    run = Run("ppo", options)
    policy, critic = run.train(policy, critic, learning_rate=1e-3, total=20)
    for step in run.steps(20):
        run.update(loss)                    # backward, clip, optimizer
        run.log({"loss": loss, "kl": kl})   # a point of each curve
    run.finish(...)                         # metrics.json

By `accelerate launch` the same runs in several processes (data parallel), each on its own samples;
on a CPU, where `accelerate launch` starts one process only, by `torchrun`.
"""

import dataclasses
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

import fastrlhf

from .devices import device_for_accelerate, kind_of_device
from .metrics import write_metrics
from .report import Report
from .settings import AdapterOptions, OptionError, RunOptions

# What may differ between a run and the one that resumes it: none of it changes a figure, as long as
# the device is of the same kind.
_FREE_TO_CHANGE = ("output", "device", "save_every", "resume")
_FACTS = "run.json"  # in a checkpoint: which run it is of


def run_command(main: Callable[[], object]) -> None:
    """Run a recipe as the command that it is: interrupted, or told what cannot be, it leaves
    without a traceback.
    """
    wait_asleep()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OptionError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def wait_asleep() -> None:
    """Start this process again with threads that wait for each other asleep, not spinning.

    PyTorch's many short parallel regions take several times as long where another process wants a
    core and the threads spin. The library of threads reads its setting when it is loaded, which
    `import torch` has done by now; so the same command line is executed once more.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Judgement(Protocol):
    """What an evaluation says in numbers."""

    def figures(self) -> dict[str, float]:
        """Name them."""


class Run:
    """One run of a recipe, from its options to `metrics.json`."""

    def __init__(self, name: str, options: RunOptions):
        """Choose the device, seed all generators, and open the logs in the output folder."""
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name, self.options = name, options
        self.output = Path(options.output or f"{name}-output")
        self.output.mkdir(parents=True, exist_ok=True)
        on_cpu = kind_of_device(options.device) == "cpu"
        if options.resume:
            self._check_checkpoint()
        with device_for_accelerate(options.device):
            self.accelerator = Accelerator(
                cpu=on_cpu, log_with="tensorboard", project_dir=self.output
            )
        self.accelerator.init_trackers(name, init_kwargs={"tensorboard": {"max_queue": 1}})
        self.accelerator.register_for_checkpointing(self)
        self.accelerator.register_save_state_pre_hook(self._save_trained)
        self.accelerator.register_load_state_pre_hook(self._load_trained)
        self.report = Report(quiet=not self.accelerator.is_main_process)
        self.history: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.done = 0
        self.peak_memory = 0
        self.schedule: Any = None  # a recipe may take its steps without an optimizer
        set_seed(options.seed)  # the same in all processes, for adapters and heads

    @property
    def model_name(self) -> str:
        """Name the model."""
        return named(self.options.model)

    @property
    def device(self) -> torch.device:
        """Where models and batches go."""
        return self.accelerator.device

    @property
    def processes(self) -> int:
        """Count the processes that train together."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Number this process among them."""
        return self.accelerator.process_index

    def share(self, items: list[Any]) -> list[Any]:
        """Take this process's part of what all have, of equal length in each."""
        each = len(items) // self.processes
        return items[self.rank * each : (self.rank + 1) * each]

    def mean(self, value: Tensor | float) -> float:
        """Average a number over the processes."""
        number = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return self.accelerator.reduce(number, "mean").item()

    def keep(self, model: nn.Module) -> None:
        """Put what is trained of a model into checkpoints, where no optimizer of ours trains it."""
        self.accelerator.prepare_model(model, evaluation_mode=True)

    def prepare(self, *models: nn.Module) -> list[Any]:
        """Put models on the device, wrapped for data parallelism where there are more processes."""
        return [self.accelerator.prepare(model) for model in models]

    def train(self, *models: nn.Module, learning_rate: float, total: int) -> list[Any]:
        """Prepare models, with AdamW on what of them requires a gradient.

        Its rate rises linearly over `warmup_steps` of the options, and then falls to 0: the first
        step of Adam moves every parameter by the whole rate, be its gradient only noise.
        """
        assert isinstance(self.options, AdapterOptions)
        prepared = self.prepare(*models)
        self.trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
        optimizer = torch.optim.AdamW(chain(*self.trained), lr=learning_rate, weight_decay=0.0)
        warmup = min(self.options.warmup_steps, total - 1)
        # Prepared by accelerate, the schedule would step once for every process.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / (warmup + 1), (total - step) / (total - warmup)),
        )
        self.accelerator.register_for_checkpointing(self.schedule)
        self.optimizer = self.accelerator.prepare(optimizer)
        return prepared

    def steps(self, total: int, judge: Callable[[str], Judgement] | None = None) -> Iterator[int]:
        """Count the steps that are left, from a checkpoint on if one is resumed.

        After each step of the caller the learning rate becomes that of the next, `judge` is asked
        if `eval_every` says so, and a checkpoint is written if one is due.
        """
        if self.options.resume:
            self.accelerator.load_state(str(last_checkpoint(self.output)))
            self.report.line(f"Resumed after step {self.done}")
        else:
            self._forget_checkpoints()
            # From here on each process has samples of its own.
            set_seed(self.options.seed, device_specific=True)
        every = self.options.save_every
        judge_every = getattr(self.options, "eval_every", 0)
        with self.report.phase("Train", total, done=self.done) as advance:
            while self.done < total:
                yield self.done
                if self.schedule is not None:
                    self.schedule.step()
                self.done += 1
                figures = self.history[-1]
                advance(1, describe(figures))
                self.report.step(self.done, total, describe(figures))
                if judge and judge_every and self.done % judge_every == 0 and self.done < total:
                    figures = judge(f"step {self.done}").figures()
                    self.evaluations.append({"step": self.done, **figures})
                if every and (self.done % every == 0 or self.done == total):
                    self._save()

    def update(self, loss: Tensor) -> None:
        """Take one step of the optimizer down the gradient of the loss, cut for each model by
        itself: a critic that is far off does not shorten the policy's.
        """
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        assert isinstance(self.options, AdapterOptions)
        for parameters in self.trained:
            self.accelerator.clip_grad_norm_(parameters, self.options.max_grad_norm)
        self.optimizer.step()

    def log(self, figures: Mapping[str, Tensor | float]) -> None:
        """Add a point to the curves, averaged over the processes."""
        numbers = [torch.as_tensor(value).detach().float().cpu() for value in figures.values()]
        values = self.accelerator.reduce(torch.stack(numbers).to(self.device), "mean")
        point = dict(zip(figures, values.tolist(), strict=True))
        self.history.append(point)
        self.accelerator.log(point, step=self.done + 1)

    def note_peak_memory(self) -> int:
        """Read the peak so far, before a measurement sets the device's count back."""
        self.peak_memory = max(self.peak_memory, peak_memory_of_process(self.device))
        return self.peak_memory

    def finish(self, **metrics: Any) -> dict[str, Any]:
        """Write `metrics.json`, and return what it holds, once all processes are here.

        "seconds" are those of this process: of a resumed run, since it was resumed.
        """
        everything = {
            "recipe": self.name,
            "options": dataclasses.asdict(self.options),
            "versions": versions(),
            "device": self.device.type,
            "seconds": self.report.seconds,
            "peak_memory_bytes": self.note_peak_memory(),
            "training": self.history,
            "evaluations": self.evaluations,
            **metrics,
        }
        if self.accelerator.is_main_process:
            write_metrics(self.output, everything)
            self.report.line(f"Curves and figures in {self.output}/")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()  # another recipe may start from what this one left
        return everything

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds beside models, optimizer, schedule and random numbers."""
        return {"done": self.done, "history": self.history, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.done, self.history = state["done"], state["history"]
        self.evaluations = state["evaluations"]

    def _save(self) -> None:
        """Write a checkpoint, give it its name once it is complete, and then remove the others."""
        unfinished = self.output / "checkpoint.unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            facts = {
                "processes": self.processes,
                "device": self.device.type,
                "options": dataclasses.asdict(self.options),
            }
            (unfinished / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            finished = self.output / f"checkpoint-{self.done}"
            shutil.rmtree(finished, ignore_errors=True)
            unfinished.rename(finished)
            for other in set(checkpoints(self.output)) - {finished}:
                shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _forget_checkpoints(self) -> None:
        """Remove those of a former run, which this one begins anew."""
        if self.accelerator.is_main_process:
            for folder in checkpoints(self.output):
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def _check_checkpoint(self) -> None:
        """See that there is a checkpoint, and that it is of a run like this one."""
        folder = last_checkpoint(self.output)
        if folder is None:
            raise SystemExit(f"--resume: there is no checkpoint in {self.output}")
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        check_same_options(facts["options"], self.options, self.output)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if facts["processes"] != processes:
            raise OptionError(
                f"--resume: the run in {self.output} has {facts['processes']} processes, this one "
                f"{processes}"
            )
        check_same_device(facts["device"], self.options, self.output)

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """Save what is trained, and not the frozen model below it, which accelerate would save."""
        weights.clear()
        if self.accelerator.is_main_process:
            for index, model in enumerate(models):
                torch.save(dict(self._trained(model)), Path(folder, f"trained_{index}.pt"))

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        with torch.no_grad():
            for index, model in enumerate(models):
                file = Path(folder, f"trained_{index}.pt")
                saved = torch.load(file, map_location="cpu", weights_only=True)
                for name, parameter in self._trained(model):
                    parameter.copy_(saved[name])
        models.clear()  # or accelerate would load them

    def _trained(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()


def named(model: str | None) -> str:
    """Name the model of an option, with no more of its folders than say which one it is."""
    return str(Path(*Path(model or "SmolLM2-135M-Instruct").parts[-2:]))


def is_first_process() -> bool:
    """Tell, before any run has begun, whether this process is the one that writes and shows."""
    return os.environ.get("RANK", "0") == "0"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of runs in an output folder, those of other programs left out, in the
    order of their steps.
    """
    found = [path for path in folder.glob("checkpoint-*") if (path / _FACTS).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint of the latest step in the output folder of a run."""
    return next(reversed(checkpoints(folder)), None)


def check_same_options(stored: Mapping[str, Any], options: RunOptions, folder: Path) -> None:
    """Raise ValueError where a run in a folder had options by which its figures would differ."""
    own = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    for name in [*stored, *own]:
        value, other = stored.get(name), own.get(name)
        if name not in _FREE_TO_CHANGE and value != other:
            raise OptionError(
                f"--resume: the run in {folder} has {name}={value}, this one {name}={other}; its "
                "curve could not go on as it was"
            )


def check_same_device(stored: str, options: RunOptions, folder: Path) -> None:
    """Raise ValueError where a run in a folder was on another kind of device: it has other random
    numbers, and models in another dtype.
    """
    own = kind_of_device(options.device)
    if stored != own:
        raise OptionError(f"--resume: the run in {folder} was on {stored}, this one is on {own}")


def describe(figures: Mapping[str, float]) -> str:
    """Write the figures of a step as one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def versions() -> dict[str, str]:
    """Name the versions that figures depend on."""
    packages = ("torch", "transformers", "peft", "accelerate", "vaderSentiment")
    found = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "fastrlhf": fastrlhf.__version__, **found}


def peak_memory_of_process(device: torch.device) -> int:
    """Count the bytes that this process held at its peak: on the GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
