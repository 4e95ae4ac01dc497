"""The parts of a run that all recipes share: devices, checkpoints, logs and the final figures.

A recipe makes a `Run`, lets it prepare the models, and loops over `run.steps(total)`:

    run = Run("ppo", options)
    policy, critic = run.train(policy, critic, learning_rate=1e-3, total=20)
    for step in run.steps(20):
        run.update(loss)                    # backward, clip, optimizer
        run.log({"loss": loss, "kl": kl})   # a point of each curve
    run.finish(...)                         # metrics.json

With `accelerate launch` the same code runs in several processes (data parallel), each with its own
samples. On a CPU `accelerate launch` starts only one process; there `torchrun` starts several.
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

# The options that may differ between a run and the run that resumes it. None of them changes a
# figure, as long as the device is of the same kind.
_FREE_TO_CHANGE = ("output", "device", "save_every", "resume")
_FACTS = "run.json"  # a checkpoint's file that describes its run


def run_command(main: Callable[[], object]) -> None:
    """Run a recipe as a command: interrupted, or given an option that cannot be, it exits without a
    traceback.
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
    """Restart this process so that its OpenMP threads sleep, not spin, while they wait.

    PyTorch runs many short parallel regions. If threads spin while another process needs a core,
    these regions take several times as long. The OpenMP library reads its setting when it is
    loaded, and `import torch` has loaded it by now, so the same command line is executed once more.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Judgement(Protocol):
    """The result of an evaluation."""

    def figures(self) -> dict[str, float]:
        """Return its numbers by name."""


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
        self.schedule: Any = None  # stays None in a recipe without an optimizer
        set_seed(options.seed)  # same in all processes: new adapters and heads must agree

    @property
    def model_name(self) -> str:
        """Return the name of the model, for logs and titles."""
        return named(self.options.model)

    @property
    def device(self) -> torch.device:
        """The device of models and batches."""
        return self.accelerator.device

    @property
    def processes(self) -> int:
        """Count the processes that train together."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Return the number of this process among all that train together."""
        return self.accelerator.process_index

    def share(self, items: list[Any]) -> list[Any]:
        """Return this process's part of the items. All parts have the same length."""
        each = len(items) // self.processes
        return items[self.rank * each : (self.rank + 1) * each]

    def mean(self, value: Tensor | float) -> float:
        """Average a number over the processes."""
        number = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return self.accelerator.reduce(number, "mean").item()

    def keep(self, model: nn.Module) -> None:
        """Store the trained parameters of a model in checkpoints.

        This is for a model that `train` does not prepare, since no optimizer updates it.
        """
        self.accelerator.prepare_model(model, evaluation_mode=True)

    def prepare(self, *models: nn.Module) -> list[Any]:
        """Put models on the device, and wrap them if several processes train (data parallelism)."""
        return [self.accelerator.prepare(model) for model in models]

    def train(self, *models: nn.Module, learning_rate: float, total: int) -> list[Any]:
        """Prepare models, and an AdamW on those of their parameters that require a gradient.

        The learning rate rises linearly over the option `warmup_steps`, and then falls to 0. It
        starts low because the first step of Adam moves every parameter by the whole rate, even if
        the gradient is only noise.
        """
        assert isinstance(self.options, AdapterOptions)
        prepared = self.prepare(*models)
        self.trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
        optimizer = torch.optim.AdamW(chain(*self.trained), lr=learning_rate, weight_decay=0.0)
        warmup = min(self.options.warmup_steps, total - 1)
        # The schedule is not prepared by accelerate, which would step it once for every process.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / (warmup + 1), (total - step) / (total - warmup)),
        )
        self.accelerator.register_for_checkpointing(self.schedule)
        self.optimizer = self.accelerator.prepare(optimizer)
        return prepared

    def steps(self, total: int, judge: Callable[[str], Judgement] | None = None) -> Iterator[int]:
        """Yield the numbers of the remaining steps. A resumed run starts after its checkpoint.

        After each step of the caller, the learning rate is set for the next step. Every
        `eval_every` steps `judge` is called, and every `save_every` steps a checkpoint is written.
        """
        if self.options.resume:
            self.accelerator.load_state(str(last_checkpoint(self.output)))
            self.report.line(f"Resumed after step {self.done}")
        else:
            self._forget_checkpoints()
            # From here on each process has its own seed, so that their samples differ.
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
        """Take one step of the optimizer.

        The gradient norm is clipped for each model separately, so that a critic with a large error
        does not shorten the policy's step.
        """
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        assert isinstance(self.options, AdapterOptions)
        for parameters in self.trained:
            self.accelerator.clip_grad_norm_(parameters, self.options.max_grad_norm)
        self.optimizer.step()

    def log(self, figures: Mapping[str, Tensor | float]) -> None:
        """Add a point to each curve. Figures are averaged over the processes."""
        numbers = [torch.as_tensor(value).detach().float().cpu() for value in figures.values()]
        values = self.accelerator.reduce(torch.stack(numbers).to(self.device), "mean")
        point = dict(zip(figures, values.tolist(), strict=True))
        self.history.append(point)
        self.accelerator.log(point, step=self.done + 1)

    def note_peak_memory(self) -> int:
        """Record and return the peak memory so far.

        Call this before a measurement that resets the device's peak.
        """
        self.peak_memory = max(self.peak_memory, peak_memory_of_process(self.device))
        return self.peak_memory

    def finish(self, **metrics: Any) -> dict[str, Any]:
        """Write `metrics.json`, wait for all processes, and return the file's contents.

        "seconds" counts the time of this process; for a resumed run, the time since it was resumed.
        """
        of_this_run = {
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
            write_metrics(self.output, of_this_run)
            self.report.line(f"Curves and figures in {self.output}/")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()  # another recipe may read its files next
        return of_this_run

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores beside models, optimizer, schedule and random numbers."""
        return {"done": self.done, "history": self.history, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.done, self.history = state["done"], state["history"]
        self.evaluations = state["evaluations"]

    def _save(self) -> None:
        """Write a checkpoint under a temporary name, rename it, and then remove older checkpoints.

        The rename happens when the checkpoint is complete, so an interrupted one is never resumed.
        """
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
        """Remove the checkpoints of a former run, because this run starts from the beginning."""
        if self.accelerator.is_main_process:
            for folder in checkpoints(self.output):
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def _check_checkpoint(self) -> None:
        """Check that there is a checkpoint of a run like this one.

        Its options, number of processes and kind of device must be the same.
        """
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
        """Save only the trained parameters. Accelerate would save the frozen model too."""
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
        models.clear()  # so that accelerate does not load them itself

    def _trained(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()


def named(model: str | None) -> str:
    """Return a short name of the model that an option means: the last two parts of its path."""
    return str(Path(*Path(model or "SmolLM2-135M-Instruct").parts[-2:]))


def is_first_process() -> bool:
    """Tell whether this process is the one that writes files and prints.

    Unlike accelerate's own test, this works before a `Run` exists.
    """
    return os.environ.get("RANK", "0") == "0"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in an output folder in the order of their steps.

    Checkpoints that other programs wrote are left out.
    """
    folders = [path for path in folder.glob("checkpoint-*") if (path / _FACTS).exists()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint of the latest step in an output folder; None if there is none."""
    return next(reversed(checkpoints(folder)), None)


def check_same_options(stored: Mapping[str, Any], options: RunOptions, folder: Path) -> None:
    """Raise ValueError if the stored options of a run differ in one that affects its figures."""
    own = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    for name in [*stored, *own]:
        value, other = stored.get(name), own.get(name)
        if name not in _FREE_TO_CHANGE and value != other:
            raise OptionError(
                f"--resume: the run in {folder} has {name}={value}, this one {name}={other}; its "
                "curve could not go on as it was"
            )


def check_same_device(stored: str, options: RunOptions, folder: Path) -> None:
    """Raise ValueError if a stored run was on another kind of device.

    Other devices have other random numbers and models in another dtype.
    """
    own = kind_of_device(options.device)
    if stored != own:
        raise OptionError(f"--resume: the run in {folder} was on {stored}, this one is on {own}")


def describe(figures: Mapping[str, float]) -> str:
    """Write the figures of a step as one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def versions() -> dict[str, str]:
    """Return the versions of the packages on which figures depend."""
    packages = ("torch", "transformers", "peft", "accelerate", "vaderSentiment")
    installed = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "fastrlhf": fastrlhf.__version__, **installed}


def peak_memory_of_process(device: torch.device) -> int:
    """Return the peak bytes of this process: of GPU memory, or of main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
