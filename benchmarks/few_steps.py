"""Quality against steps: samplers of a checkpoint and its few-step student, compared with DDIM at 50 steps.

    python benchmarks/few_steps.py VINDR_ROOT... --painted out/painted --output benchmarks/results/few_steps.json

Every lesion of --split is erased and painted again in tier "approximate", with the same noise in every row. Kernel
distances to the real lesions are those of `gbci-fast evaluate distribution` (all crops, without pairs of one patient).
For each row, the 95 % interval (over resamples of patients) of its distance minus that of 50 steps is computed. The row
holds up if the upper end is at most a tenth of the ring mean's distance. The output has figures only, no pixels or
identifiers.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from gbci_fast.choices import GUIDANCE_SCALE, JUDGED
from gbci_fast.cli.evaluate.options import stage_progress
from gbci_fast.evaluate.distribution.appearance import spectrum_slopes
from gbci_fast.evaluate.distribution.distances import KernelPairs, frechet_distance
from gbci_fast.evaluate.distribution.evaluation import REAL, DistributionSettings, Halvings, extract
from gbci_fast.evaluate.extractors import open_extractors
from gbci_fast.evaluate.features import Extractor
from gbci_fast.evaluate.lesions import Crops, LesionCase, crop_lesions, read_split
from gbci_fast.evaluate.metrics import LEVEL, ROI_GROWTH, fidelity, grow, within_sets_auc
from gbci_fast.evaluate.painting import PaintSettings, paint, ring_mean_fill
from gbci_fast.evaluate.readers import load_readers, truths
from gbci_fast.evaluate.report import versions
from gbci_fast.fast.accelerate import accelerate
from gbci_fast.jobs.files import atomically, hash_weights
from gbci_fast.model.checkpoint import checkpoint_folder, load_pipeline
from gbci_fast.model.pipeline import GBCIPipeline

REFERENCE, FILLING = "DDIM 50", "ring mean"
KEPT = 0.1  # how far a row may lie above the reference, as a share of the filling's distance


@dataclass(frozen=True)
class Row:
    """A scheduler of the teacher, or None for the student, and the number of steps."""

    scheduler: type[SchedulerMixin] | None
    steps: int

    @property
    def name(self) -> str:
        names = {None: "student", DDIMScheduler: "DDIM", DPMSolverMultistepScheduler: "DPM-Solver++ 2M"}
        return f"{names.get(self.scheduler, 'UniPC')} {self.steps}"


ROWS = (
    *(Row(None, steps) for steps in (1, 2, 4)),
    *(Row(DDIMScheduler, steps) for steps in (1, 2, 4, 8, 12, 20, 50)),
    *(Row(DPMSolverMultistepScheduler, steps) for steps in (4, 8, 12)),
    *(Row(UniPCMultistepScheduler, steps) for steps in (4, 8, 12)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders in the VinDr-Mammo layout")
    parser.add_argument("--split", default=JUDGED[0], choices=JUDGED, help="fold C or the test split (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the figures, JSON")
    parser.add_argument("--painted", type=Path, metavar="DIR", help="painted batches (default: painted/ beside FILE)")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="(default: the packaged checkpoint)")
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=names,
        default=names,
        metavar="ROW",
        help=f"beside {REFERENCE!r}: {', '.join(names)}",
    )
    parser.add_argument("--features", default="radiomics,bands", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="images (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: 8)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    args = parser.parse_args()
    weights = checkpoint_folder(args.weights)
    pipe, digest, teacher = load_pipeline(weights, device=args.device), hash_weights(weights), teacher_digest(weights)
    rows = [row for row in ROWS if row.name in (*args.rows, REFERENCE)]
    if pipe.few_step is None:
        rows = [row for row in rows if row.scheduler is not None]
    guidance = GUIDANCE_SCALE if pipe.few_step is None else pipe.few_step.config.guidance_scale
    extractors, folder = open_extractors(args.features), args.painted or args.output.parent / "painted"
    with stage_progress(("reading",)) as on_progress:
        cases = read_split(args.roots, args.split, limit=args.limit, on_progress=on_progress)
        images = {FILLING: ring_mean_fill(cases)}
        for row in rows:
            students = row.scheduler is None
            key = digest if students else teacher  # the teacher's rows do not depend on the student
            settings = PaintSettings(
                steps=row.steps,
                guidance=1.0 if students else guidance,
                batch_size=args.batch_size,
                tier="approximate",
            )
            told = {"weights": f"{key} {row.name}", "folder": folder, "stage": row.name, "on_progress": on_progress}
            images[row.name] = paint(sampler(pipe, row), cases, settings, **told)
    found = compare(cases, images, extractors)
    print(table(found, [extractor.name for extractor in extractors]))
    about = {"weights_sha256": digest, "guidance": guidance, "versions": versions()}
    text = json.dumps(about | found, indent=1, allow_nan=False) + "\n"
    atomically(args.output, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def teacher_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint without its student."""
    parts = "".join(hash_weights(folder / name) for name in ("vae", "unet", "scheduler", "conditioner"))
    return hashlib.sha256(parts.encode()).hexdigest()


def sampler(pipe: GBCIPipeline, row: Row) -> GBCIPipeline:
    """The accelerated pipeline that paints a row."""
    if row.scheduler is None:
        return accelerate(pipe.few_step_pipeline(), tier="approximate")
    fast = accelerate(pipe, tier="approximate", few_step=False)
    fast.scheduler = row.scheduler.from_config(pipe.scheduler.config)
    return fast


def compare(
    cases: Sequence[LesionCase], images: Mapping[str, Sequence[np.ndarray]], extractors: Sequence[Extractor]
) -> dict[str, Any]:
    """Figures of every set of `images`, which must include `FILLING` and `REFERENCE`, as JSON values."""
    settings = DistributionSettings()
    sets = {REAL: crop_lesions(cases)} | {name: crop_lesions(cases, painted) for name, painted in images.items()}
    halvings, slopes = (
        Halvings.of(sets, settings),
        {name: spectrum_slopes(crops) for name, crops in sets.items()},
    )
    rows: dict[str, dict[str, Any]] = {name: {"distances": {}} for name in images}
    for extractor in extractors:
        found = distances(extract(extractor, sets), sets, halvings)
        for name, row in found.items():
            rows[name]["distances"][extractor.name] = row
    for name, painted in images.items():
        rows[name] |= {
            "slope_difference": float(slopes[name].mean() - slopes[REAL].mean()),
            "size_auc": size_auc(cases, painted),
            "roi": roi_fidelity(cases, painted),
        }
    patients = len({case.patient for case in cases})
    return {"settings": asdict(settings), "lesions": len(cases), "patients": patients, "rows": rows}


def distances(
    features: Mapping[str, np.ndarray], sets: Mapping[str, Crops], halvings: Halvings
) -> dict[str, dict[str, Any]]:
    """Kernel and Frechet distances of every set to the real one; the kernel distance also relative to the reference."""
    values, draws = {}, {}
    for name, x in features.items():
        if name != REAL:
            pairs = KernelPairs.of(x, features[REAL], sets[name].patients, sets[REAL].patients)
            values[name] = float(pairs.distances(np.ones((1, len(x))), np.ones((1, len(features[REAL]))))[0])
            draws[name] = pairs.distances(halvings.draws[name], halvings.draws[REAL])
    rows = {}
    for name, value in values.items():
        above = draws[name] - draws[REFERENCE]
        low, high = np.nanquantile(above, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        bound = KEPT * values[FILLING]
        rows[name] = {
            "kernel": value,
            "frechet": frechet_distance(features[name], features[REAL]),
            "above_reference": {"value": value - values[REFERENCE], "low": float(low), "high": float(high)},
            "bound": bound,
            "holds_up": bool(high <= bound),
        }
    return rows


def size_auc(cases: Sequence[LesionCase], images: Sequence[np.ndarray]) -> float | None:
    """The AUC with which the packaged reader tells large lesions from small ones, within data sets, if defined."""
    readers = load_readers()
    answers = truths(cases, "size", readers.median_diameter)
    known, logits = ~np.isnan(answers), readers.read(cases, images)["size"]
    sets = np.array([case.root for case in cases])[known]
    auc = within_sets_auc(logits[known], answers[known] == 1, sets, np.ones((1, known.sum()), int))[0]
    return None if np.isnan(auc) else float(auc)


def roi_fidelity(cases: Sequence[LesionCase], images: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean SSIM and PSNR (dB) to the erased lesions, in the RoI."""
    found = [
        fidelity(case.pixels, image, {"roi": grow(case.mask, ROI_GROWTH)})["roi"]
        for case, image in zip(cases, images, strict=True)
    ]
    return {name: float(np.mean([row[name] for row in found])) for name in ("ssim", "psnr")}


def table(found: Mapping[str, Any], extractors: Sequence[str]) -> str:
    """A Markdown table with a line per row."""
    heads = [f"{name}: kernel | above 50 steps (95 %) | bound | Fréchet" for name in extractors]
    lines = [f"| row | {' | '.join(heads)} | slope | size | RoI PSNR |", "|---" * (4 * len(extractors) + 4) + "|"]
    for name, row in found["rows"].items():
        cells = []
        for extractor in extractors:
            x = row["distances"][extractor]
            above, verdict = x["above_reference"], "holds" if x["holds_up"] else "misses"
            interval = f"{above['value']:.3g} ({above['low']:.3g} to {above['high']:.3g})"
            cells.append(f"{x['kernel']:.3g} | {interval} | {x['bound']:.3g}, {verdict} | {x['frechet']:.3g}")
        size = "-" if row["size_auc"] is None else f"{row['size_auc']:.2f}"
        last = f"{row['slope_difference']:+.2f} | {size} | {row['roi']['psnr']:.1f} dB"
        lines.append(f"| {name} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
