"""The training loop of all stages: accumulation, EMA, atomic checkpoints, bit-exact resume, Ctrl-C, progress.

A batch is a pure function of (seed, step, micro-batch). So a resumed run needs only the weights, their average, the
optimizer and the step number. It continues bit for bit on the same machine (on CUDA as far as torch's own kernels are
deterministic).
"""

import io
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import atomically
from gbci_fast.jobs.folder import JobFolder, Kept
from gbci_fast.training.curves import Curves
from gbci_fast.training.ema import EMA
from gbci_fast.training.progress import TrainingProgress
from gbci_fast.training.ranks import Ranks, joined
from gbci_fast.training.settings import LoopConfig

STATE_FILE = "state.pt"
FREE = ("save_every", "sample_every", "tensorboard")  # may differ in a resumed run: they do not affect the weights


class Task(Protocol):
    """What a stage provides: a module, its loss on a seeded batch, a sample sheet, and the final export."""

    @property
    def module(self) -> nn.Module: ...

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
    """Trains `task` for ``config.steps`` steps and returns that number.

    Writes ``samples/<step>.png`` and, at every save, ``state.pt`` (to resume from) and the averaged weights through
    ``task.export(output)``. On Ctrl-C or SIGTERM, the current step is finished and saved before the run stops.

    Args:
        task: the stage.
        config: of the loop.
        output: folder of the run.
        resume: continue the run in `output`.
        device: to train on.
        inputs: what else decides the result (digests of data and starting weights, the model's settings), as JSON
            values; kept beside the state and compared, with `config`, when the run is resumed.

    Raises:
        KeyboardInterrupt: stopped before the last step; all finished steps are saved.
        GBCIError: `output` already holds a run and `resume` is not set, or another run, or one that is running; the
            micro-batches cannot be shared evenly; the loss or its gradient is not finite.
    """
    check_output(output, resume, config, inputs)
    job = _job(output, config, inputs)
    with joined(device) as ranks:
        if config.accumulate % ranks.size:
            raise GBCIError(
                f"accumulate is {config.accumulate}; expected a multiple of the {ranks.size} processes, which share a "
                "step's micro-batches"
            )
        with job.claimed(resume=resume) if ranks.first else nullcontext():
            return _train(task, config, job, device, ranks)


def _train(task: Task, config: LoopConfig, job: JobFolder, device: torch.device, ranks: Ranks) -> int:
    output = job.path
    module = task.module.to(device)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    ema = EMA(module, config.ema_decay)
    start = _load_state(job, module, ema, optimizer, device)

    def save(step: int) -> None:
        if not ranks.first:
            return
        with _one_sentence(output):
            with _Averaged(module, ema):
                task.export(output)
            # After the export, so that the state of a finished run always has its weights.
            _save_state(job, module, ema, optimizer, step)

    step = saved = start
    if step == config.steps and ranks.first:
        with _one_sentence(output), _Averaged(module, ema):
            task.export(output)  # the weights may have been lost or changed
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
        if step > saved:  # the last step, or the step at which a signal came
            save(step)
            progress.log()
    if step < config.steps:
        raise KeyboardInterrupt
    if ranks.first:
        job.finish()
    return step


def check_output(output: Path, resume: bool, config: LoopConfig, inputs: Mapping[str, Any] | None = None) -> None:
    """Checks the content of `output` before any slow work.

    Raises:
        GBCIError: `output` holds a run and `resume` is not set, a damaged run, or one of other settings or inputs.
    """
    job = _job(output, config, inputs)

    def hint(changed: Sequence[str]) -> str:
        if "steps" not in changed or not (output / "pipeline").is_dir():
            return ""
        # More steps cannot be added to a run: the learning rate's schedule depends on their number.
        return f"; to train on, start a new run with --init {output / 'pipeline'}"

    if job.begun(resume=resume, hint=hint):
        _check_state(job)
    elif (output / STATE_FILE).exists():
        raise GBCIError(f"{output} holds a {STATE_FILE} without {job.file.name}; choose another folder")


def _job(output: Path, config: LoopConfig, inputs: Mapping[str, Any] | None) -> JobFolder:
    decides = {name: value for name, value in asdict(config).items() if name not in FREE}
    return JobFolder(output, {**decides, **(inputs or {})}, shared=True)


def _check_state(job: JobFolder) -> None:
    """Raises GBCIError if the state file is missing or not as it was saved.

    A save is noted before its file is renamed, so the last note may be of a save that was not completed.
    """
    path, saves = job.path / STATE_FILE, list(job)
    if not path.exists():
        if len(saves) > 1:
            raise GBCIError(f"{path} does not exist; expected the state of step {saves[-2]} or {saves[-1]}")
    elif not any(job.kept(step)[0].is_in(job.path, "digests") for step in reversed(saves)):
        raise GBCIError(f"{path} cannot be resumed from: it is not the file that was saved")


def learning_rate_at(config: LoopConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to a tenth of the peak at the last step."""
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
    """Context that records SIGINT and SIGTERM in `received` instead of raising, so that steps are not interrupted."""

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
    """Context in which the module has the averaged weights and is in evaluation mode."""

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


def _save_state(job: JobFolder, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "ema": ema.shadow,
        "optimizer": optimizer.state_dict(),
    }

    def write(temporary: Path) -> None:
        content = io.BytesIO()  # torch hides the reason when writing to a file fails
        torch.save(state, content)
        temporary.write_bytes(content.getbuffer())
        job.note(step, None, [replace(Kept.of(job.path, temporary), path=STATE_FILE)])

    atomically(job.path / STATE_FILE, write)


def _load_state(
    job: JobFolder, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Loads the saved state; returns the step to continue from, or 0 where nothing was saved."""
    path = job.path / STATE_FILE
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow = state["ema"]
        return state["step"]
    except Exception as error:  # torch raises half a dozen types for a damaged or foreign file
        kind = type(error).__name__
        raise GBCIError(
            f"{path} cannot be resumed from: it is damaged, or of another model or version ({kind})"
        ) from error


@contextmanager
def _one_sentence(output: Path) -> Iterator[None]:
    """Turns errors of the libraries that write weights into a `GBCIError`: on a full disk each raises its own type."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise GBCIError(f"{output}: the weights cannot be written: {' '.join(str(error).split())}") from error
