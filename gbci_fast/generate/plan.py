"""The plan of a job: one `PlanItem` per synthetic image, a pure function of the inputs and the job's settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gbci_fast.attributes import Attributes, check_consistent, consistent
from gbci_fast.data.vindr import Finding, ImageRecord, is_text
from gbci_fast.errors import GBCIError
from gbci_fast.generate.balance import Balance
from gbci_fast.generate.mask_sources import AutomaticMask, BoxMask, FileMask, Mask
from gbci_fast.generate.priors import Priors, load_priors
from gbci_fast.jobs.files import digest_of

FROM_FILE = ("laterality", "view_position", "age", "pixel_spacing")  # read from the opened file
REPORTED = ("finding_categories", "shape", "margin")  # what the text of a report tells
DEFAULT_FINDING = {"finding_categories": ("Mass",), "finding_birads": 4}


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanItem:
    """One synthetic image to make.

    Attributes:
        index: position in the whole plan, also where the item is run in a piece of the plan; unique in a job. `seed`
            follows from it and the job's seed, unless a plan file states one.
        image_id, study_id: 32 hexadecimal digits, see `make_item`.
        template: the image to paint into.
        variant: 0, 1, ... within the template.
        seed: of the sampler's noise and of an automatic mask, in [0, 2^63).
        mask: where to paint.
        attributes, report: the description of the lesion. View and side are set only where they were overridden:
            the opened file is a better source of them than its name or its table.
        withheld: names out of `FROM_FILE` that were set to unknown and are not filled in from the opened file.
    """

    index: int
    image_id: str
    study_id: str
    template: ImageRecord
    variant: int
    seed: int
    mask: Mask
    attributes: Attributes
    report: str | None
    withheld: frozenset[str] = frozenset()

    @property
    def mask_source(self) -> str:
        """ "annotations", "file", "plan" (a box or an ellipse in a plan file) or "auto"."""
        return self.mask.source


def make_plan(
    records: Sequence[ImageRecord],
    *,
    variants: int,
    seed: int,
    mask: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    report: str | None = None,
    balance: str | None = None,
    priors: Priors | None = None,
) -> list[PlanItem]:
    """A plan with every record `variants` times.

    Args:
        records: the templates.
        variants: at least 1.
        seed: of the job.
        mask: "auto" (drawn from the priors), "annotations" (a record's boxes in turn; records without boxes are left
            out), or the path of a mask file for every record.
        overrides: attributes that replace those of the record or the annotation.
        report: free text that replaces the annotation's.
        balance: choice of the lesions, see `Balance.parse`; None = the annotation's, or else `DEFAULT_FINDING`.
        priors: for automatic masks and for ``balance="natural"``; None = the packaged priors.

    Raises:
        GBCIError: `variants` below 1, an unknown attribute or value, a bad mask file, or no annotated box in any
            record.
    """
    if variants < 1:
        raise GBCIError(f"variants is {variants}; expected at least 1")
    if mask == "annotations":
        records = [record for record in records if record.findings]
        if not records:
            raise GBCIError("no input has an annotated box; use --mask auto or a mask file")
    priors = priors or load_priors()
    drawn = FileMask.of(Path(mask)) if mask not in ("auto", "annotations") else None
    given = parse_overrides(overrides or {})
    balanced = None if balance is None else Balance.parse(balance, given, priors)
    items = []
    for record in records:
        for variant in range(variants):
            index = len(items)
            finding = record.findings[variant % len(record.findings)] if mask == "annotations" else None
            lesion = balanced.of(seed, index) if balanced else {}
            attributes = describe(record, finding, {**given, **lesion})
            told = report or _report(record, finding, attributes)
            items.append(
                make_item(
                    seed,
                    index=index,
                    template=record,
                    variant=variant,
                    mask=drawn
                    or (BoxMask(box=finding.box) if finding else automatic(priors, attributes.finding_categories)),
                    attributes=attributes,
                    report=told,
                    withheld=withheld(given),
                )
            )
    return items


def make_item(
    job_seed: int,
    *,
    index: int,
    template: ImageRecord,
    variant: int,
    mask: Mask,
    attributes: Attributes,
    report: str | None,
    withheld: frozenset[str],
    seed: int | None = None,
) -> PlanItem:
    """An item with its ids and, where `seed` is None, its seed.

    Ids and seed follow from the job's seed and the item alone, so that pieces of a plan make the same images as the
    whole. Items that differ in template, description, mask or seed have different image_ids, so that jobs can be
    merged. The images of one study with the same variant number share a synthetic study.

    Raises:
        GBCIError: the report is not plain text.
    """
    if not is_text(report or ""):
        raise GBCIError(f"report is {report!r}; expected plain text (UTF-8)")
    seed = int(digest_of("noise", job_seed, index)[:32], 16) >> 65 if seed is None else seed
    painted = json.dumps([attributes.to_mapping(), report or "", mask.identity()[1:], seed])
    return PlanItem(
        index=index,
        image_id=digest_of("image", job_seed, index, template.study_id, template.image_id, painted)[:32],
        study_id=digest_of("study", job_seed, variant, template.study_id)[:32],
        template=template,
        variant=variant,
        seed=seed,
        mask=mask,
        attributes=attributes,
        report=report,
        withheld=withheld,
    )


def withheld(given: Mapping[str, Any]) -> frozenset[str]:
    """The names out of `FROM_FILE` that were `given` as unknown, see `PlanItem.withheld`."""
    return frozenset(name for name in FROM_FILE if name in given and given[name] is None)


def automatic(priors: Priors, finding_categories: tuple[str, ...] | None) -> AutomaticMask:
    """The automatic mask for a lesion of these categories."""
    return AutomaticMask(prior=priors.of(finding_categories))


def parse_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overridden attributes, parsed and checked; a value may be None ("unknown").

    Raises:
        GBCIError: an unknown attribute or value, or one that the categories cannot have (`check_consistent`).
    """
    parsed = Attributes.from_mapping(overrides)
    check_consistent(parsed)
    return {name: getattr(parsed, name) for name in overrides}


def describe(record: ImageRecord, finding: Finding | None, given: Mapping[str, Any]) -> Attributes:
    """The description of a lesion: the annotation's, or `DEFAULT_FINDING`, with the `given` attributes replaced.

    What the categories cannot have is left out, even where it was given for all lesions of the job.
    """
    described = finding.attributes if finding else replace(record.attributes, **DEFAULT_FINDING)
    described = consistent(replace(described, **{"laterality": None, "view_position": None, **given}))
    if "breast_birads" not in given:
        # A breast has the highest grade of its findings; the annotated finding is painted over.
        grades = [described.finding_birads, _grade_without(record, finding)]
        described = replace(described, breast_birads=max((x for x in grades if x is not None), default=None))
    return described


def _report(record: ImageRecord, finding: Finding | None, described: Attributes) -> str | None:
    """The annotation's report; None where the lesion to paint has another category, shape or margin than it tells."""
    if finding is None or any(getattr(described, name) != getattr(finding.attributes, name) for name in REPORTED):
        return None
    return finding.report(record)


def _grade_without(record: ImageRecord, finding: Finding | None) -> int | None:
    """The breast's BI-RADS without one of its findings; None = unknown."""
    grade = record.attributes.breast_birads
    if finding is None or grade is None or finding.attributes.finding_birads != grade:
        return grade
    others = [other.attributes.finding_birads for other in record.findings if other is not finding]
    return max((other for other in others if other is not None), default=None)
