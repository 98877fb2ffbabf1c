"""Times alternatives to the tile sizes in the Triton operators' tables, at the sizes of the packaged UNet.

    python benchmarks/tune.py --output out/tune.json [--only attention geglu] [--batch 64]

Every candidate's result is first compared with the reference. Candidates that do not compile (registers, shared memory)
or are wrong are listed with the reason. Times are those of recorded loops (`device_seconds` in conftest.py). The script
changes no table: enter a better candidate in the operator's file by hand, with its figures in the commit message.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import device_seconds
from roofline import machine
from torch import Tensor

from gbci_fast.jobs.files import atomically
from gbci_fast.ops import attention, cross_attention, geglu, group_norm_film_silu, layer_norm_film
from gbci_fast.ops._triton import INTERPRETED, architecture

LEVELS = {28: (128, 4), 14: (192, 6)}  # levels with attention: side of the latents to channels and heads (of width 32)
# (side, channels, groups, FiLM) in the UNet, also after a concatenation, and in the autoencoder.
NORMS = (
    (56, 64, 32, True),
    (56, 192, 32, True),
    (28, 128, 32, True),
    (28, 320, 32, True),
    (14, 192, 32, True),
    (14, 384, 32, True),
    (224, 32, 16, False),
    (112, 64, 16, False),
    (56, 112, 16, False),
)
CONTEXT = 207  # tokens
DTYPE = torch.bfloat16
ERROR = 2**-6  # largest error in bfloat16, relative to the largest value


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one size.

    Attributes:
        name: of the operator and the size.
        run, reference: call the operator, and its reference.
        table: where the operator's choice is stored: a mapping and a key, or a module and a name.
        candidates: alternatives to the present entry.
    """

    name: str
    run: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    table: tuple[Any, Any]
    candidates: list[Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="report, JSON")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="operators (default: all)")
    parser.add_argument("--batch", type=int, default=64, help="samples, both halves of a guided batch (default: 64)")
    args = parser.parse_args()
    if not INTERPRETED and not torch.cuda.is_available():
        parser.error("there is no CUDA device; TRITON_INTERPRET=1 tries the script on a CPU")
    device = torch.device("cpu" if INTERPRETED else "cuda")
    report: dict[str, Any] = {"machine": machine(device), "batch": args.batch, "cases": []}
    for case in itertools.chain.from_iterable(CASES[name](args.batch, device) for name in args.only):
        found = tune(case, device)
        report["cases"].append(found)
        print(sentence(found), flush=True)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        atomically(args.output, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    return 0


@torch.no_grad()
def tune(case: Case, device: torch.device) -> dict[str, Any]:
    """Microseconds of the present entry and of every candidate, the fastest first, and the failures."""
    reference, present = case.reference().float(), entry(case.table)
    times, failures = {}, {}
    for candidate in dict.fromkeys([present, *case.candidates]):
        with changed(case.table, candidate):
            try:
                error = (case.run().float() - reference).abs().max() / reference.abs().max()
                if not error <= ERROR:
                    failures[str(candidate)] = f"is {error:.2g} off"
                    continue
                times[str(candidate)] = 1e6 * seconds(case.run, device)
            except Exception as error:  # Triton's own, of many types
                failures[str(candidate)] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    ordered = dict(sorted(times.items(), key=lambda item: item[1]))
    return {"case": case.name, "present": str(present), "microseconds": ordered, "failures": failures}


def sentence(found: dict[str, Any]) -> str:
    """One line that compares the present entry with the best."""
    times, present = found["microseconds"], found["present"]
    failed = f"; {len(found['failures'])} failed" if found["failures"] else ""
    if present not in times:
        return f"{found['case']}: {present} FAILS: {found['failures'][present]}"
    best, took = next(iter(times.items()))
    return f"{found['case']}: {present} {times[present]:.1f} us; best {best} {took:.1f} us{failed}"


def seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cpu":  # interpreted: the time means nothing
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    took = device_seconds(function)
    if took is None:
        raise RuntimeError("cannot be recorded as a graph")
    return took


def entry(table: tuple[Any, Any]) -> Any:
    holder, key = table
    return holder.get(key) if isinstance(holder, dict) else getattr(holder, key)


@contextmanager
def changed(table: tuple[Any, Any], value: Any) -> Iterator[None]:
    """Context with another entry in the table; None removes it, so that the default holds."""
    holder, key = table
    before = entry(table)

    def put(entry: Any) -> None:
        if not isinstance(holder, dict):
            setattr(holder, key, entry)
        elif entry is None:
            holder.pop(key, None)
        else:
            holder[key] = entry

    put(value)
    try:
        yield
    finally:
        put(before)


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape).to(device, DTYPE)


def attention_cases(batch: int, device: torch.device) -> Iterator[Case]:
    """Self-attention at the two levels that have it."""
    tiles = [
        (m, n, warps, stages)
        for m, n in itertools.product((64, 128), (32, 64, 128))
        for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3))
    ]
    for side, (_, heads) in LEVELS.items():
        q, k, v = (normal(device, batch, heads, side * side, 32) for _ in range(3))
        yield Case(
            name=f"attention, {side * side} tokens, {heads} heads",
            run=functools.partial(attention.attention, q, k, v, backend="triton"),
            reference=functools.partial(attention.attention_ref, q, k, v),
            table=(attention.TILES[2], 32),
            candidates=tiles,
        )


def cross_attention_cases(batch: int, device: torch.device) -> Iterator[Case]:
    """Cross-attention at the two levels that have it."""
    configs = [
        (m, n, c, warps, stages)
        for m, n, c in itertools.product((32, 64, 128), (32, 64), (32, 64))
        for warps, stages in ((4, 2), (8, 2))
    ]
    for side, (channels, heads) in LEVELS.items():
        x = normal(device, batch, side * side, channels)
        key, value = (normal(device, batch, heads, CONTEXT, 32) for _ in range(2))
        wq, wo = (normal(device, channels, channels) / math.sqrt(channels) for _ in range(2))
        norm_weight, norm_bias, bo = (normal(device, channels) for _ in range(3))
        arguments = (x, norm_weight, norm_bias, wq, key, value, wo, bo)
        options = {"eps": 1e-5, "softmax_scale": 32**-0.5}
        yield Case(
            name=f"cross_attention, {side * side} rows of {channels}, {CONTEXT} tokens",
            run=functools.partial(cross_attention.cross_attention, *arguments, **options),
            reference=functools.partial(cross_attention.cross_attention_ref, *arguments, **options),
            table=(cross_attention.CONFIGS[2], (192, 32)),
            candidates=configs,
        )


def geglu_cases(batch: int, device: torch.device) -> Iterator[Case]:
    tiles = [
        (m, n, k, warps, stages)
        for m, n, k in itertools.product((64, 128), (64, 128), (32, 64))
        for warps, stages in ((4, 3), (4, 4), (8, 3))
    ]
    for side, (channels, _) in LEVELS.items():
        x = normal(device, batch, side * side, channels)
        weight, bias = normal(device, 8 * channels, channels) / math.sqrt(channels), normal(device, 8 * channels)
        yield Case(
            name=f"geglu, {batch * side * side} rows of {channels}",
            run=functools.partial(geglu.geglu, x, weight, bias),
            reference=functools.partial(geglu.geglu_ref, x, weight, bias),
            table=(geglu.TILES, (architecture(), 2)),
            candidates=tiles,
        )


def layer_norm_film_cases(batch: int, device: torch.device) -> Iterator[Case]:
    for side, (channels, _) in LEVELS.items():
        x, weight, bias = (
            normal(device, batch, side * side, channels),
            normal(device, channels),
            normal(device, channels),
        )
        yield Case(
            name=f"layer_norm_film, {batch * side * side} rows of {channels}",
            run=functools.partial(layer_norm_film.layer_norm_film, x, weight, bias),
            reference=functools.partial(layer_norm_film.layer_norm_film_ref, x, weight, bias),
            table=(layer_norm_film, "ELEMENTS"),
            candidates=[512, 1024, 2048, 4096, 8192],
        )


def group_norm_cases(batch: int, device: torch.device) -> Iterator[Case]:
    """Every constant that matters at a size, one at a time: for images in one program, or split over several."""
    kept = {"IN_REGISTERS": [0, 4096, 8192, 16384, 32768], "RUNS": [(32, 16), (64, 32), (64, 32, 16), (128, 64, 32)]}
    split = {
        "SPLIT_RUN": [32, 64, 128, 256],
        "SPLIT_ELEMENTS": [2048, 4096, 8192, 16384],
        "MAX_SPLITS": [8, 16, 32, 64],
        "CACHED_BYTES": [12 << 20, 24 << 20, 36 << 20, 1 << 40],
    }
    for side, channels, groups, film in NORMS:
        x = normal(device, batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        arguments = (x, groups, normal(device, channels), normal(device, channels), 1e-5)
        given = {name: normal(device, batch, channels) for name in ("scale", "shift")} if film else {}
        for name, candidates in (kept if side < 56 else split).items():
            yield Case(
                name=f"group_norm_film_silu, {channels} x {side} x {side}, {name}",
                run=functools.partial(group_norm_film_silu.group_norm_film_silu, *arguments, **given),
                reference=functools.partial(group_norm_film_silu.group_norm_film_silu_ref, *arguments, **given),
                table=(group_norm_film_silu, name),
                candidates=candidates,
            )


CASES = {
    "attention": attention_cases,
    "cross_attention": cross_attention_cases,
    "geglu": geglu_cases,
    "layer_norm_film": layer_norm_film_cases,
    "group_norm_film_silu": group_norm_cases,
}

if __name__ == "__main__":
    sys.exit(main())
