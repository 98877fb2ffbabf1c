"""The settings that decide a job's bytes."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gbci_fast.choices import GUIDANCE_SCALE, SHARD_SIZE, STEPS
from gbci_fast.errors import GBCIError
from gbci_fast.options import check_least, check_seed, option

FORMATS = ("dicom", "png", "webdataset")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Settings of the sampler, the same for every batch."""

    num_inference_steps: int = option(STEPS, "denoising steps (default %(default)s)", flag="--steps")
    guidance_scale: float = option(
        GUIDANCE_SCALE, "classifier-free guidance scale (default %(default)s)", flag="--guidance"
    )


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The settings that decide a job's bytes; written to ``job.json`` and compared when a job is resumed.

    Attributes:
        batch_size: images sampled together. Bytes are equal only for equal batch sizes.
        shard_size: images per WebDataset shard, rounded up to whole batches.
        sampler: steps and guidance.
        runtime, tier, dtype, device: how the model is run (see `gbci_fast.accelerate`).
        weights_hash: of the model's weights.
        priors_hash: of the priors for automatic masks and natural frequencies (`Priors.digest`).
        copies_hash: of the gate that rejects copies (`CopyGate.digest`); empty = no gate.

    Raises:
        GBCIError: an unknown format, a size below 1, or a seed out of range.
    """

    seed: int = option(help="of the whole job (default %(default)s)")
    formats: tuple[str, ...] = option(
        ("dicom", "png"),
        "dicom, png and webdataset (tar files of many images), one or more, comma-separated (default %(default)s)",
        flag="--format",
    )
    batch_size: int = option(
        8, "images sampled together (default %(default)s); the templates of three batches are in memory", least=1
    )
    shard_size: int = option(
        SHARD_SIZE, f"images per tar file of webdataset, in whole batches (default {SHARD_SIZE})", least=1
    )
    compression: str = option("rle", "of DICOM, lossless", choices=("none", "rle", "jpeg2000"))
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    runtime: str = "eager"
    tier: str = "exact"
    dtype: str = "fp32"
    device: str = "cpu"
    weights_hash: str = ""
    priors_hash: str = ""
    copies_hash: str = ""

    def __post_init__(self):
        if not self.formats or set(self.formats) - set(FORMATS):
            raise GBCIError(f"format is {','.join(self.formats)!r}; expected one or more of {', '.join(FORMATS)}")
        check_least(self)
        check_seed(self.seed)

    def columns(self) -> dict[str, Any]:
        """{column of the manifest: value} of every setting; all values are JSON scalars."""
        flat = asdict(self)
        return {"job_seed": flat.pop("seed"), "formats": ",".join(flat.pop("formats")), **flat.pop("sampler"), **flat}
