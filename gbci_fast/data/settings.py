"""Settings of a cache. Torch is not imported, so that the command line can take its options from here."""

from dataclasses import dataclass

from gbci_fast.choices import FIELDS, MODEL_SIZE, SPLITS
from gbci_fast.errors import GBCIError
from gbci_fast.options import option

MIN_SIZE, MAX_SIZE = 16, 4096


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The settings that decide a cache's bytes, besides the inputs.

    Attributes:
        size: side of the fields of view in pixels, 16 to 4096.
        views: "whole", "lesion" or both.
        split: the split of images whose tables name no split; None = unknown.

    Raises:
        GBCIError: a size, view or split that is not as above.
    """

    size: int = option(MODEL_SIZE, "side of the fields of view in pixels (default %(default)s)")
    views: tuple[str, ...] = option(
        FIELDS, "whole (the breast), lesion (around each lesion, magnified twice) or both (default both)"
    )
    split: str | None = option(None, "split of images whose tables name none (default: unknown)", choices=SPLITS)

    def __post_init__(self):
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise GBCIError(f"size is {self.size}; expected {MIN_SIZE} to {MAX_SIZE} pixels")
        if not self.views or set(self.views) - set(FIELDS) or len(set(self.views)) < len(self.views):
            raise GBCIError(f"views is {','.join(self.views)!r}; expected one or more of {', '.join(FIELDS)}")
        if self.split not in (None, *SPLITS):
            raise GBCIError(f"split is {self.split!r}; expected one of {', '.join(SPLITS)}")
