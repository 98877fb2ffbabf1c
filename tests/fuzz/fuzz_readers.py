"""A fuzzer for what opens files from elsewhere: DICOM in every transfer syntax, PNG, masks, tables, plans, priors.

    python tests/fuzz/fuzz_readers.py --seconds 120 --seed 0 --output out/fuzz

Every case must end in a result, or in a `GBCIError` of one sentence that names the file. Another exception, a result
out of bounds, a crash, a hang, or memory beyond the limit is a finding: its bytes go to `--output` and the exit status
is 1. So is it where a library printed something. Decoders can end or stall a process, so a worker reads, under a memory
limit, and is replaced where it dies.
"""

import argparse
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutate import mutate
from seeds import make_root, remake

CASE_SECONDS = 5.0
CASE_MEBIBYTES = 64  # more than a damaged file of a few kilobytes may take
WORKER_MEBIBYTES = 1024  # above what the worker starts with: a hard stop


@dataclass(frozen=True, kw_only=True)
class Case:
    """One damaged file."""

    kind: str
    name: str
    content: bytes


class Cases:
    """Case `index` of `seed`, for ever the same."""

    def __init__(self, folder: Path, seed: int, kinds: tuple[str, ...]):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name in kinds)
        self._files = [(path.parent.name, path.name, path.read_bytes()) for path in files]
        self._seed = seed

    def __getitem__(self, index: int) -> Case:
        rng = random.Random(f"{self._seed}/{index}")
        kind, name, content = rng.choice(self._files)
        donor = rng.choice(self._files)[2]
        return Case(kind=kind, name=name, content=mutate(content, donor, rng, is_text=kind in TEXT_KINDS))


def read_image(path: Path) -> None:
    """Reads, and checks what a caller may rely on."""
    import numpy as np

    from gbci_fast.dicom.reading import read_mammogram

    mammogram = read_mammogram(path)
    unit = mammogram.unit()
    assert unit.shape == mammogram.stored.shape, f"unit {unit.shape}, stored {mammogram.stored.shape}"
    assert unit.dtype == np.float32, f"unit is {unit.dtype}"
    assert np.isfinite(unit).all(), "unit is not finite"
    assert 0 <= unit.min() < unit.max() <= 1, f"unit from {unit.min()} to {unit.max()}"
    assert mammogram.view_position in (None, "CC", "MLO"), f"view is {mammogram.view_position!r}"
    assert mammogram.laterality in (None, "L", "R"), f"side is {mammogram.laterality!r}"


def read_drawing(path: Path) -> None:
    """A drawn mask, as `generate --mask FILE` and a root's ``masks/`` have it."""
    from gbci_fast.data.mask_files import read_mask

    mask = read_mask(path)
    assert mask.ndim == 2, f"mask has {mask.ndim} axes"
    assert mask.dtype == bool, f"mask is {mask.dtype}"


def read_table(path: Path) -> None:
    """The table in the place of the valid one in a VinDr root."""
    from gbci_fast.data.vindr import VinDr

    root = make_root(path.parent / "root")
    (root / path.name).write_bytes(path.read_bytes())
    for image in VinDr(root).images:
        assert root.resolve() in image.path.resolve().parents, f"{image.path} leaves the root"


def read_plan(path: Path) -> None:
    """A plan file over the records of a VinDr root."""
    from gbci_fast.data.vindr import find_inputs
    from gbci_fast.generate import plan_csv

    root = make_root(path.parent / "root")
    records = find_inputs(root)
    for item in plan_csv.read_plan(path, records, root, seed=0):
        assert item.template in records, f"{item.template.path} is no input"
        assert 0 <= item.seed < 2**63, f"seed is {item.seed}"


def read_priors(path: Path) -> None:
    """Lesion priors."""
    from gbci_fast.generate.priors import load_priors

    load_priors(path)


READERS: dict[str, Callable[[Path], None]] = {
    "dicom": read_image,
    "png": read_image,
    "mask": read_drawing,
    "table": read_table,
    "plan": read_plan,
    "priors": read_priors,
}
TEXT_KINDS = ("table", "plan", "priors")


# The worker ---------------------------------------------------------------------------------------------------------


def work(cases: Cases, start: int, folder: Path, reports: int) -> None:
    """Reads case after case and writes a line before and after each to the file descriptor `reports`."""
    for kind in sorted({kind for kind, _, _ in cases._files}):  # imports and first uses take memory once
        kind, name, content = next(file for file in cases._files if file[0] == kind)
        (folder / name).write_bytes(content)
        READERS[kind](folder / name)
    limit = _status("VmSize") + WORKER_MEBIBYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    index = start
    while True:
        case = cases[index]
        os.write(reports, f'{{"begin": {index}}}\n'.encode())
        outcome, detail = attempt(case, folder)
        os.write(reports, (json.dumps({"end": index, "outcome": outcome, "detail": detail[:600]}) + "\n").encode())
        index += 1


def attempt(case: Case, folder: Path) -> tuple[str, str]:
    """("ok" or "refused" or what is wrong, details)."""
    from gbci_fast.errors import GBCIError

    path = folder / case.name
    path.write_bytes(case.content)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    try:
        READERS[case.kind](path)
        outcome = "ok", ""
    except GBCIError as error:
        outcome = _judge(error)
    except Exception as error:
        outcome = "exception", f"{type(error).__name__}: {error}"
    taken = (_status("VmHWM") - before) // 2**20
    if taken > CASE_MEBIBYTES:
        return "memory", f"{taken} MiB, then {outcome}"
    return outcome


def _judge(error: Exception) -> tuple[str, str]:
    sentence, cause = str(error), error.__cause__
    if isinstance(cause, MemoryError | RecursionError):
        return "memory", f"{type(cause).__name__}: {sentence}"
    if len(sentence.splitlines()) != 1 or len(sentence) > 1000 or not sentence.isprintable():
        return "sentence", repr(sentence)
    return "refused", sentence


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


# The parent ---------------------------------------------------------------------------------------------------------


def outcomes(arguments: argparse.Namespace, folder: Path, deadline: float) -> Iterator[tuple[int, str, str]]:
    """(case, outcome, detail) until the deadline, over as many workers as it takes."""
    start = arguments.start
    while time.monotonic() < deadline:
        read_end, write_end = os.pipe()
        command = [sys.executable, __file__, "--worker", str(write_end), "--scratch", str(folder)]
        command += ["--seed", str(arguments.seed), "--start", str(start), "--kinds", arguments.kinds]
        with (folder / "stderr.txt").open("ab") as noise:
            process = subprocess.Popen(command, pass_fds=[write_end], stdout=noise, stderr=noise)
        os.close(write_end)
        begun = None
        try:
            for line in _lines(read_end, deadline):
                if line is None:
                    if time.monotonic() < deadline:
                        process.kill()
                        yield begun if begun is not None else start, "hang", f"more than {CASE_SECONDS} s"
                        start = (start if begun is None else begun) + 1
                    break
                report = json.loads(line)
                begun = report.get("begin", begun)
                if "end" in report:
                    yield report["end"], report["outcome"], report["detail"]
                    start = report["end"] + 1
            else:
                noise = (folder / "stderr.txt").read_text(errors="replace")[-500:]
                if begun is None:
                    raise RuntimeError(f"the worker does not start: {noise}")
                yield begun, "crash", f"exit status {process.wait()}: {noise}"
                start = begun + 1
        finally:
            process.kill()
            process.wait()
            os.close(read_end)


def _lines(descriptor: int, deadline: float) -> Iterator[bytes | None]:
    """Lines of a pipe as they come, ``None`` where the next takes too long; ends with the pipe."""
    pending = b""
    patience = 60.0  # imports
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(min(patience, max(0.0, deadline - time.monotonic()))):
                yield None
                return
            received = os.read(descriptor, 65536)
            if not received:
                return
            patience = CASE_SECONDS
            *whole, pending = (pending + received).split(b"\n")
            yield from whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="with a case's number it decides the case")
    parser.add_argument("--start", type=int, default=0, help="the first case's number")
    parser.add_argument("--kinds", default=",".join(READERS), help="of files, comma-separated")
    parser.add_argument("--output", type=Path, default=Path("out/fuzz"), help="where findings go")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds.split(","))
    if arguments.worker is not None:
        scratch = arguments.scratch / "worker"
        scratch.mkdir(exist_ok=True)
        work(Cases(arguments.scratch / "seeds", arguments.seed, kinds), arguments.start, scratch, arguments.worker)
    with tempfile.TemporaryDirectory(prefix="gbci-fuzz-") as name:
        folder = Path(name)
        cases = Cases(remake(folder / "seeds"), arguments.seed, kinds)
        began, counts, findings = time.monotonic(), Counter(), 0
        for index, outcome, detail in outcomes(arguments, folder, began + arguments.seconds):
            counts[outcome] += 1
            if outcome not in ("ok", "refused"):
                findings += 1
                case = cases[index]
                target = arguments.output / f"{outcome}-{arguments.seed}-{index}-{case.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(case.content)
                print(f"{target}: {detail}", flush=True)
        seconds = time.monotonic() - began
        noise = (folder / "stderr.txt").read_text(errors="replace").splitlines()
    total = sum(counts.values())
    spread = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{total} cases in {seconds:.0f} s ({total / seconds:.0f}/s), seed {arguments.seed}: {spread}")
    if noise:
        print(f"{len(noise)} lines on stderr that are not ours, such as: {noise[0][:200]}")
    return 1 if findings or noise or not total else 0


if __name__ == "__main__":
    sys.exit(main())
