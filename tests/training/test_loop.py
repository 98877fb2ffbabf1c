"""The training loop on toy problems: exact resume, signals, averages, rates, refusals, what it prints."""

import os
import re
import resource
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import replace_folder
from gbci_fast.training.loop import (
    STATE_FILE,
    LoopConfig,
    _DeferredInterrupt,
    check_output,
    learning_rate_at,
    train,
)
from gbci_fast.training.progress import TrainingProgress

CPU = torch.device("cpu")
CONFIG = LoopConfig(steps=6, batch_size=4, warmup=2, learning_rate=0.05, precision="fp32", ema_decay=0.5)


class Line:
    """Fits a line to noisy points; calls `hooks[n]()` during the n-th loss, counted from 1."""

    def __init__(self, hooks=None):
        torch.manual_seed(3)
        self.module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.hooks, self.calls, self.sheets, self.exports = hooks or {}, 0, [], []

    def loss(self, batch_size, generator):
        self.calls += 1
        if self.calls in self.hooks:
            self.hooks[self.calls]()
        x = torch.randn(batch_size, 2, generator=generator)
        target = x.sum(1, keepdim=True) + 0.1 * torch.randn(batch_size, 1, generator=generator)
        return (self.module(x) - target).square().mean()

    def sample_sheet(self, path):
        assert not self.module.training
        self.sheets.append(path.name)

    def export(self, folder):
        assert not self.module.training
        self.exports.append({name: value.clone() for name, value in self.module.state_dict().items()})


def stored(folder):
    return torch.load(folder / STATE_FILE, weights_only=True)


def tensors(state, prefix=""):
    """{path: tensor} of everything in a nested state."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for name, part in items for key, value in tensors(part, f"{prefix}/{name}").items()}


def assert_same_state(first, second):
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    assert len(a) > 15  # weights, average, two moments and a step count each
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert first["step"] == second["step"]


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


def kill_at(step, number=signal.SIGINT):
    return {step: interrupt(number)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(tmp_path, accumulate, precision):
    config = replace(CONFIG, accumulate=accumulate, precision=precision)
    assert train(Line(), config, tmp_path / "straight", resume=False, device=CPU) == 6
    task = Line(kill_at(3 * accumulate))
    with pytest.raises(KeyboardInterrupt):
        train(task, config, tmp_path / "cut", resume=False, device=CPU)
    assert stored(tmp_path / "cut")["step"] == 3
    torch.manual_seed(99)  # torch's own generator plays no part
    assert train(Line(), config, tmp_path / "cut", resume=True, device=CPU) == 6
    assert_same_state(stored(tmp_path / "straight"), stored(tmp_path / "cut"))


@pytest.mark.parametrize("names", [False, True])
def test_a_power_cut_loses_no_state_that_was_saved(tmp_path, recorded_disk, names):
    config = replace(CONFIG, save_every=2)
    train(Line(), config, recorded_disk.root / "run", resume=False, device=CPU)
    steps = []
    for count in range(1, len(recorded_disk.states) + (not names)):
        cut = tmp_path / f"cut{count}"
        recorded_disk.cut(count, cut, names=names)
        steps.append(stored(cut / "run")["step"] if (cut / "run" / STATE_FILE).exists() else 0)
        assert train(Line(), config, cut / "run", resume=True, device=CPU) == 6
        assert_same_state(stored(recorded_disk.root / "run"), stored(cut / "run"))
    assert steps == sorted(steps)
    assert set(steps) == {0, 2, 4, 6}


def test_a_full_disk_is_one_sentence_and_resumable(tmp_path):
    train(Line(), CONFIG, tmp_path / "straight", resume=False, device=CPU)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises((GBCIError, OSError), match=r"cut: the weights cannot be written|too large: '.*state.pt"):
            train(Line(), CONFIG, tmp_path / "cut", resume=False, device=CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "cut" / STATE_FILE).exists()
    train(Line(), CONFIG, tmp_path / "cut", resume=True, device=CPU)
    assert_same_state(stored(tmp_path / "straight"), stored(tmp_path / "cut"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_after_its_step(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    task = Line(kill_at(4, number))
    with pytest.raises(KeyboardInterrupt):
        train(task, CONFIG, tmp_path, resume=False, device=CPU)
    assert task.calls == 4
    assert stored(tmp_path)["step"] == 4
    assert len(task.exports) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_late_signal_saves_too(tmp_path, monkeypatch):
    """A signal may come at any moment: also between a step's save and the next look at it."""
    task, asked = Line(), []

    class Late(_DeferredInterrupt):
        @property
        def received(self):
            asked.append(task.calls)
            return task.calls == 4

    monkeypatch.setattr("gbci_fast.training.loop._DeferredInterrupt", Late)
    with pytest.raises(KeyboardInterrupt):
        train(task, replace(CONFIG, save_every=3), tmp_path, resume=False, device=CPU)
    assert asked == [0, 1, 2, 3, 4]  # once per step: no second look that could miss it
    assert stored(tmp_path)["step"] == 4


def test_signal_in_the_last_step_is_no_interruption(tmp_path):
    assert train(Line(kill_at(6)), CONFIG, tmp_path, resume=False, device=CPU) == 6


def test_finished_run_resumes_to_nothing(tmp_path):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU)
    before = (tmp_path / STATE_FILE).read_bytes()
    task = Line()
    assert train(task, CONFIG, tmp_path, resume=True, device=CPU) == 6
    assert task.calls == 0
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_more_steps_are_a_new_run_and_the_sentence_says_how(tmp_path):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU)
    (tmp_path / "pipeline").mkdir()  # what `train ldm` exports, and `--init` takes
    with pytest.raises(GBCIError, match=r"steps 6, not 9; .*to train on, start a new run with --init .*pipeline$"):
        train(Line(), replace(CONFIG, steps=9), tmp_path, resume=True, device=CPU)


def test_resume_without_a_run_starts_one(tmp_path):
    assert train(Line(), CONFIG, tmp_path / "new", resume=True, device=CPU) == 6


def test_saves_and_sheets(tmp_path):
    task = Line()
    train(task, replace(CONFIG, save_every=4, sample_every=3), tmp_path, resume=False, device=CPU)
    assert task.sheets == ["0000003.png", "0000006.png"]
    assert len(task.exports) == 2  # at step 4 and at the end
    assert [path.name for path in tmp_path.glob(".*")] == [".finished"]


def test_average_is_exported_and_follows_its_formula(tmp_path):
    task, path = Line(), []
    shadow = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    hook = task.module.register_forward_pre_hook(
        lambda module, _: path.append({name: p.detach().clone() for name, p in module.named_parameters()})
    )
    config = replace(CONFIG, ema_decay=0.25)
    train(task, config, tmp_path, resume=False, device=CPU)
    hook.remove()
    path.append(stored(tmp_path)["module"])
    for step, weights in enumerate(path[1:]):
        decay = min(0.25, (1 + step) / (10 + step))
        shadow = {name: decay * value + (1 - decay) * weights[name] for name, value in shadow.items()}
    average = stored(tmp_path)["ema"]
    for name, value in shadow.items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(task.exports[-1][name], average[name])
        assert not torch.equal(average[name], path[-1][name])
        # and the module itself is back at its own weights
        assert torch.equal(dict(task.module.named_parameters())[name], path[-1][name])


class Rows(Line):
    """Takes its rows in order from a fixed table, so that two micro-batches are one batch of their rows."""

    def loss(self, batch_size, generator):
        table = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        rows = table[self.calls * batch_size : (self.calls + 1) * batch_size]
        self.calls += 1
        return (self.module(rows[:, :2]) - rows[:, 2:]).square().mean()


def test_accumulation_is_a_larger_batch(tmp_path):
    large, small = Rows(), Rows()
    train(large, replace(CONFIG, batch_size=12), tmp_path / "large", resume=False, device=CPU)
    train(small, replace(CONFIG, batch_size=4, accumulate=3), tmp_path / "small", resume=False, device=CPU)
    for ours, reference in zip(small.module.parameters(), large.module.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_micro_batches_differ(tmp_path):
    seeds = []

    class Noting(Line):
        def loss(self, batch_size, generator):
            seeds.append(generator.initial_seed())
            return super().loss(batch_size, generator)

    train(Noting(), replace(CONFIG, accumulate=3), tmp_path / "a", resume=False, device=CPU)
    train(Noting(), replace(CONFIG, seed=1), tmp_path / "b", resume=False, device=CPU)
    assert len(set(seeds)) == len(seeds) == 24


def test_learning_rate():
    config = replace(CONFIG, steps=110, warmup=10, learning_rate=1.0)
    rates = [learning_rate_at(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half a cosine from 1 to 0.1
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_gradients_are_clipped_and_rates_applied(tmp_path, monkeypatch):
    norms, rates = [], []

    class Optimizer(torch.optim.AdamW):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    train(Line(), replace(CONFIG, grad_clip=0.01), tmp_path, resume=False, device=CPU)
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    assert rates == [learning_rate_at(CONFIG, step) for step in range(6)]


class Broken(Line):
    """At the third loss, NaN ("loss"), or a finite loss with an infinite gradient ("gradient")."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def loss(self, batch_size, generator):
        loss = super().loss(batch_size, generator)
        if self.calls == 3:
            loss = loss * torch.nan if self.kind == "loss" else loss + (self.module[0].bias * 0).sqrt().sum()
        return loss


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("loss", "the loss is nan at step 2; lower --learning-rate or use --precision fp32"),
        ("gradient", "the gradient's norm is nan at step 2; lower --learning-rate or use --precision fp32"),
    ],
)
def test_nothing_is_saved_once_numbers_break(tmp_path, kind, sentence):
    task = Broken(kind)
    with pytest.raises(GBCIError) as raised:
        train(task, replace(CONFIG, save_every=1), tmp_path, resume=False, device=CPU)
    assert str(raised.value) == sentence
    assert stored(tmp_path)["step"] == 2
    assert all(value.isfinite().all() for value in tensors(stored(tmp_path)).values())


def test_existing_run_needs_resume(tmp_path):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU)
    before = (tmp_path / STATE_FILE).read_bytes()
    for refuse in (
        lambda: train(Line(), CONFIG, tmp_path, resume=False, device=CPU),
        lambda: check_output(tmp_path, resume=False, config=CONFIG),
    ):
        with pytest.raises(GBCIError) as raised:
            refuse()
        assert str(raised.value) == (
            f"{tmp_path} is not empty; pass --resume to continue the job there, or choose another folder"
        )
    assert (tmp_path / STATE_FILE).read_bytes() == before


def truncated(path):
    path.write_bytes(path.read_bytes()[:1000])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, flipped, lambda path: torch.save({"step": 3}, path)])
def test_a_state_that_is_not_the_one_that_was_saved_is_one_sentence(tmp_path, damage):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU)
    path = tmp_path / STATE_FILE
    damage(path)
    before = path.read_bytes()
    with pytest.raises(GBCIError) as raised:
        train(Line(), CONFIG, tmp_path, resume=True, device=CPU)
    assert str(raised.value) == f"{path} cannot be resumed from: it is not the file that was saved"
    assert path.read_bytes() == before


def test_a_state_that_is_gone_is_not_begun_anew(tmp_path):
    train(Line(), replace(CONFIG, save_every=2), tmp_path, resume=False, device=CPU)
    (tmp_path / STATE_FILE).unlink()
    with pytest.raises(GBCIError, match=r"state.pt does not exist; expected the state of step 4 or 6$"):
        train(Line(), replace(CONFIG, save_every=2), tmp_path, resume=True, device=CPU)


def test_a_state_of_another_model_is_one_sentence(tmp_path):
    class Other(Line):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 1)

    with pytest.raises(KeyboardInterrupt):
        train(Line(kill_at(2)), CONFIG, tmp_path, resume=False, device=CPU)
    with pytest.raises(GBCIError, match=r"it is damaged, or of another model or version \(RuntimeError\)$"):
        train(Other(), CONFIG, tmp_path, resume=True, device=CPU)


def test_a_state_without_its_job_is_not_gone_on_with(tmp_path):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU)
    (tmp_path / "job.json").unlink()
    with pytest.raises(GBCIError, match=r"holds a state.pt without job.json; choose another folder$"):
        train(Line(), CONFIG, tmp_path, resume=True, device=CPU)


def test_weights_of_a_finished_run_are_written_again(tmp_path):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU)
    task = Line()
    train(task, CONFIG, tmp_path, resume=True, device=CPU)
    assert len(task.exports) == 1
    assert {name: value.tolist() for name, value in task.exports[0].items()} == {
        name: value.tolist() for name, value in stored(tmp_path)["ema"].items()
    }


@pytest.mark.parametrize(
    ("changes", "inputs", "told"),
    [
        ({"seed": 8}, {"data": "abc"}, "seed 0, not 8"),
        ({"steps": 9}, {"data": "abc"}, "steps 6, not 9"),
        ({"batch_size": 2, "learning_rate": 0.1}, {"data": "abc"}, "batch_size 4, not 2, learning_rate 0.05, not 0.1"),
        ({"precision": "bf16"}, {"data": "abc"}, "precision fp32, not bf16"),
        ({}, {"data": "abd"}, "data abc, not abd"),
        ({}, {"data": "abc", "init": "f00"}, "init None, not f00"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, changes, inputs, told):
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU, inputs={"data": "abc"})
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(GBCIError) as raised:
        train(Line(), replace(CONFIG, **changes), tmp_path, resume=True, device=CPU, inputs=inputs)
    assert str(raised.value) == (
        f"{tmp_path} holds another job: {told}; resume with the same arguments, or choose another folder"
    )
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_how_often_a_run_is_saved_may_change(tmp_path):
    inputs = {"widths": (1, 2)}  # a tuple comes back as a list
    train(Line(), CONFIG, tmp_path, resume=False, device=CPU, inputs=inputs)
    config = replace(CONFIG, save_every=1, sample_every=2)
    assert train(Line(), config, tmp_path, resume=True, device=CPU, inputs=inputs) == 6


def test_one_run_at_a_time(tmp_path):
    def second():
        with pytest.raises(GBCIError, match="is in use by another run; wait until it ends, or choose another folder"):
            train(Line(), CONFIG, tmp_path, resume=True, device=CPU)

    task = Line({3: second})
    assert train(task, CONFIG, tmp_path, resume=False, device=CPU) == 6
    assert task.calls == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [".finished", "job.json", "samples", STATE_FILE]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("steps", 0, "steps is 0; expected at least 1"),
        ("batch_size", -1, "batch_size is -1; expected at least 1"),
        ("save_every", 0, "save_every is 0; expected at least 1"),
        ("learning_rate", 0.0, "learning_rate is 0.0; expected a positive number"),
        ("learning_rate", float("nan"), "learning_rate is nan; expected a positive number"),
        ("precision", "fp16", "precision is 'fp16'; expected 'fp32' or 'bf16'"),
    ],
)
def test_configuration_is_checked(name, value, sentence):
    with pytest.raises(GBCIError) as raised:
        replace(CONFIG, **{name: value})
    assert str(raised.value) == sentence


def test_a_log_gets_a_line_per_save(tmp_path, capsys):
    config = replace(CONFIG, save_every=4)
    train(Line(), config, tmp_path / "toy", resume=False, device=CPU)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, step in zip(lines, (4, 6), strict=True):
        assert re.fullmatch(rf"toy {step}/6  loss \d+\.\d{{4}}  \d+\.\d images/s  ETA \d:\d\d:\d\d", line)
    assert lines[-1].endswith("ETA 0:00:00")


def test_a_log_line_sums_up_since_the_last(capsys, monkeypatch):
    clock = iter((100.0, *[104.0] * 2, 110.0, *[110.0] * 9))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with TrainingProgress("run", start=10, steps=50, batch=8) as progress:
        progress.advance(2.0)
        progress.advance(4.0)
        progress.log()
        progress.advance(1.0)
        progress.log()
    assert capsys.readouterr().out.splitlines() == [
        "run 12/50  loss 3.0000  1.6 images/s  ETA 0:03:10",
        "run 13/50  loss 1.0000  2.4 images/s  ETA 0:02:03",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with TrainingProgress("run", start=0, steps=2, batch=8) as progress:
        progress.advance(2.0)
        progress.advance(1.5)
        progress.log()
    out = capsys.readouterr().out
    assert "ETA" not in out
    assert "2/2" in out
    assert "loss 1.5000" in out


def test_folders_are_replaced_whole(tmp_path):
    target = tmp_path / "weights"

    def write(text):
        def into(folder):
            folder.mkdir()
            (folder / text).write_text(text)

        return into

    def fail(folder):
        write("half")(folder)
        raise OSError("disk full")

    replace_folder(target, write("first"))
    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["first"]
    replace_folder(target, write("second"))
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
