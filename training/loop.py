"""The training loop both stages share: accumulation, EMA, atomic checkpoints, bit-exact resume, Ctrl-C, progress.

A batch is a pure function of (seed, step, micro-batch), so a resumed run needs the weights, the average, the
optimizer and the step number, and then continues bit for bit on the same machine (on CUDA as far as torch's own
kernels repeat themselves).
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.files import atomically, locked
from gbci_fast.training.curves import Curves
from gbci_fast.training.ema import EMA
from gbci_fast.training.progress import TrainingProgress
from gbci_fast.training.ranks import Ranks, joined

STATE_FILE = "state.pt"
FREE = ("save_every", "sample_every", "tensorboard")  # may differ in a resumed run: they decide no weight


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Sizes and rates of a run; `batch_size` is per micro-batch, `accumulate` micro-batches make one step.

    Processes under ``torchrun`` share a step's micro-batches; `tensorboard` writes curves beside the weights.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    save_every: int = 200
    sample_every: int = 500
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "save_every", "sample_every"):
            if getattr(self, name) < 1:
                raise GBCIError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**63:  # what every generator takes
            raise GBCIError(f"seed is {self.seed}; expected a whole number from 0 to {2**63 - 1}")
        if not 0 < self.learning_rate < math.inf:
            raise GBCIError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if self.precision not in ("fp32", "bf16"):
            raise GBCIError(f"precision is {self.precision!r}; expected 'fp32' or 'bf16'")


class Task(Protocol):
    """What a stage brings: a module, its loss on a seeded batch, a sample sheet, and the final export."""

    module: nn.Module

    def loss(self, batch_size: int, generator: torch.Generator) -> Tensor: ...

    def sample_sheet(self, path: Path) -> None: ...

    def export(self, folder: Path) -> None: ...


def train(
    task: Task,
    config: LoopConfig,
    output: Path,
    *,
    resume: bool,
    device: torch.device,
    inputs: Mapping[str, Any] | None = None,
) -> int:
    """Runs `task` to ``config.steps`` and returns that number.

    Writes ``state.pt`` (resume point), ``samples/<step>.png`` and, after every save, the averaged weights through
    ``task.export(output)``. Ctrl-C or a polite kill finishes the step under way, saves, and then interrupts.

    Args:
        inputs: what else decides the result (digests of data and starting weights, the model's settings), as JSON
            values; kept in the state and compared, with `config`, when the run is resumed.

    Raises:
        KeyboardInterrupt: stopped before the last step; everything up to the last whole step is saved.
        GBCIError: `output` already holds a run and `resume` is not set, or another run, or one that is under way; the
            loss or its gradient is not finite.
    """
    inputs = _as_json(inputs)
    check_output(output, resume, config, inputs)
    output.mkdir(parents=True, exist_ok=True)
    with joined(device) as ranks:
        if config.accumulate % ranks.size:
            raise GBCIError(
                f"accumulate is {config.accumulate}; expected a multiple of the {ranks.size} processes, which share a "
                "step's micro-batches"
            )
        with locked(output) if ranks.first else nullcontext():
            return _train(task, config, output, device, inputs, ranks)


def _train(
    task: Task, config: LoopConfig, output: Path, device: torch.device, inputs: dict[str, Any], ranks: Ranks
) -> int:
    state_path = output / STATE_FILE
    module = task.module.to(device)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    ema = EMA(module, config.ema_decay)
    start = _load_state(state_path, module, ema, optimizer, device) if state_path.exists() else 0

    def save(step: int) -> None:
        if not ranks.first:
            return
        with _Averaged(module, ema):
            task.export(output)
        # Last: a state that says "finished" has its weights beside it.
        _save_state(state_path, module, ema, optimizer, config, inputs, step)

    step = saved = start
    batch = config.batch_size * config.accumulate
    curves = Curves(output, start) if config.tensorboard and ranks.first else None
    with (
        TrainingProgress(output.name, start, config.steps, batch, silent=not ranks.first) as progress,
        curves or nullcontext(),
        _DeferredInterrupt() as interrupt,
    ):
        while step < config.steps and not ranks.any(interrupt.received):
            loss, norm = _optimizer_step(task, module, optimizer, config, step, device, ranks)
            ema.update(module, step)
            step += 1
            progress.advance(loss)
            if curves is not None:
                curves.add(step, loss=loss, gradient_norm=norm, learning_rate=learning_rate_at(config, step - 1))
            if ranks.first and (step % config.sample_every == 0 or step == config.steps):
                (output / "samples").mkdir(exist_ok=True)
                with _Averaged(module, ema):
                    task.sample_sheet(output / "samples" / f"{step:07d}.png")
            if step % config.save_every == 0:
                save(step)
                saved = step
                progress.log()
        if step > saved:  # the last step, or a signal's; looked at once the loop is over, so that none slips through
            save(step)
            progress.log()
    if step < config.steps:
        raise KeyboardInterrupt
    return step


def check_output(
    output: Path, resume: bool, config: LoopConfig | None = None, inputs: Mapping[str, Any] | None = None
) -> None:
    """Looks at what `output` holds, before any slow work.

    Raises:
        GBCIError: a run that is not to be resumed, a damaged one, or (given `config`) one of other settings or inputs.
    """
    path = output / STATE_FILE
    if output.exists() and not output.is_dir():
        raise GBCIError(f"{output} is a file; expected a folder to write to")
    if not path.exists():
        return
    if not resume:
        raise GBCIError(f"{output} already holds a training run; pass --resume to continue it or choose another folder")
    if config is None:
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = {**state["config"], **state["inputs"]}
    except Exception as error:  # torch raises half a dozen types for a damaged or foreign file
        raise _no_state(path, error) from error
    wanted = {**asdict(config), **_as_json(inputs)}
    names = [name for name in dict.fromkeys((*found, *wanted)) if name not in FREE]
    changed = [name for name in names if found.get(name) != wanted.get(name)]
    if changed:
        told = ", ".join(f"{name} {found.get(name)}, not {wanted.get(name)}" for name in changed)
        longer = ""
        if "steps" in changed and (output / "pipeline").is_dir():  # the learning rate's course depends on all of them
            longer = f"; to train on, start a new run with --init {output / 'pipeline'}"
        raise GBCIError(
            f"{path} is of a run with {told}; resume with the same arguments, or choose another folder{longer}"
        )


def learning_rate_at(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    phase = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, phase))))


def _optimizer_step(
    task: Task,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    step: int,
    device: torch.device,
    ranks: Ranks,
) -> tuple[float, float]:
    """The step's mean loss and the norm of its gradient before clipping."""
    module.train()
    total = 0.0
    for micro in range(ranks.rank, config.accumulate, ranks.size):
        generator = torch.Generator().manual_seed(_mix(config.seed, step, micro))
        autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
        with autocast:
            loss = task.loss(config.batch_size, generator)
        _check_finite("loss", loss, step)
        (loss / config.accumulate).backward()
        total += loss.item() / config.accumulate
    ranks.sum_gradients(list(module.parameters()))
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip)
    _check_finite("gradient's norm", norm, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return ranks.sum(total), norm.item()


def _check_finite(name: str, value: Tensor, step: int) -> None:
    if not torch.isfinite(value):
        raise GBCIError(f"the {name} is {value.item()} at step {step}; lower --learning-rate or use --precision fp32")


def _mix(*parts: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


class _DeferredInterrupt:
    """Context that notes SIGINT and SIGTERM instead of raising, so that an optimizer step is never cut in two."""

    received = False

    def __enter__(self) -> "_DeferredInterrupt":
        self.kept = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.received = True


class _Averaged:
    """Context in which the module carries the averaged weights, in evaluation mode."""

    def __init__(self, module: nn.Module, ema: EMA):
        self.module, self.ema = module, ema

    def __enter__(self) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}
        self.ema.copy_to(self.module)
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(self.kept[name])


def _save_state(
    path: Path,
    module: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    inputs: Mapping[str, Any],
    step: int,
) -> None:
    state = {
        "step": step,
        "config": asdict(config),
        "inputs": inputs,
        "module": module.state_dict(),
        "ema": ema.shadow,
        "optimizer": optimizer.state_dict(),
    }
    atomically(path, lambda temporary: torch.save(state, temporary))


def _load_state(
    path: Path,
    module: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow = state["ema"]
        return state["step"]
    except Exception as error:
        raise _no_state(path, error) from error


def _no_state(path: Path, error: Exception) -> GBCIError:
    kind = type(error).__name__
    return GBCIError(f"{path} cannot be resumed from: it is damaged, or of another model or version ({kind})")


def _as_json(inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """As they come back from a file: tuples are lists."""
    return json.loads(json.dumps(dict(inputs or {})))


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary)`` on a sibling name and puts that folder where `path` is: never half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if path.exists():  # a folder cannot take another's place in one step
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
