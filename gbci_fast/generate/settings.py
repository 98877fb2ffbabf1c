"""The settings that decide a job's bytes."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gbci_fast.choices import GUIDANCE_SCALE, SHARD_SIZE
from gbci_fast.errors import GBCIError

FORMATS = ("dicom", "png", "webdataset")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Settings of the sampler, the same for every batch."""

    num_inference_steps: int = 20
    guidance_scale: float = GUIDANCE_SCALE


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The settings that decide a job's bytes; written to ``job.json`` and compared when a job is resumed.

    Attributes:
        seed: of the whole job, in [0, 2^63).
        formats: out of `FORMATS`.
        batch_size: images sampled together. Bytes are equal only for equal batch sizes.
        shard_size: images of a WebDataset shard, rounded up to whole batches.
        compression: of DICOM files, lossless: "none", "rle" or "jpeg2000".
        sampler: steps and guidance.
        runtime, tier, dtype, device: how the model is run (see `gbci_fast.accelerate`).
        weights_hash: of the model's weights.
        priors_hash: of the priors that automatic masks and natural frequencies come from (`Priors.digest`).
        copies_hash: of the gate that rejects copies (`CopyGate.digest`); empty = no gate.

    Raises:
        GBCIError: an unknown format, a size below 1, or a seed out of range.
    """

    seed: int
    formats: tuple[str, ...] = ("dicom", "png")
    batch_size: int = 8
    shard_size: int = SHARD_SIZE
    compression: str = "rle"
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
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise GBCIError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**63:  # the manifest's column has 64 bits
            raise GBCIError(f"seed is {self.seed}; expected a whole number from 0 to {2**63 - 1}")

    def columns(self) -> dict[str, Any]:
        """{column of the manifest: value} of every setting; all values are JSON scalars."""
        flat = asdict(self)
        return {"job_seed": flat.pop("seed"), "formats": ",".join(flat.pop("formats")), **flat.pop("sampler"), **flat}
