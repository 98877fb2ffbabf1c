"""The plan of a job: one `PlanItem` per synthetic image, a pure function of the inputs and the job's settings.

A `Plan` makes its items on access, so a plan of any length takes no memory.
"""

import datetime
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from gbci_fast.attributes import Attributes, check_consistent, consistent
from gbci_fast.data.vindr import Finding, ImageRecord, is_text
from gbci_fast.errors import GBCIError
from gbci_fast.generate.balance import Balance
from gbci_fast.generate.mask_sources import AutomaticMask, BoxMask, FileMask, Mask
from gbci_fast.generate.priors import Priors, load_priors
from gbci_fast.jobs.files import digest_of
from gbci_fast.lesion.lesion import Lesion, lesion_id

LARGEST_INDEX = 2**31 - 1  # DICOM's InstanceNumber, one more than the index, has 32 bits
FROM_FILE = ("laterality", "view_position", "age", "pixel_spacing")  # read from the opened file
REPORTED = ("finding_categories", "shape", "margin")  # what the text of a report tells
DEFAULT_FINDING = {"finding_categories": ("Mass",), "finding_birads": 4}
_ATTRIBUTES = {each.name for each in fields(Attributes)}


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanItem:
    """One synthetic image to make: one picture of one lesion.

    Attributes:
        index: position in the whole plan, also where the item is run in a piece of the plan; unique in a job. `seed`
            follows from it and the job's seed, unless a plan file states one.
        image_id, study_id: 32 hexadecimal digits, see `make_item`.
        template: the image to paint into.
        variant: 0, 1, ... within the template.
        seed: of the sampler's noise and of an automatic mask, in [0, 2^63).
        mask: where to paint.
        attributes, report: the description of the picture. View and side are set only where they were overridden:
            the opened file is a better source of them than its name or its table.
        lesion: what is painted. Its attributes are those of `attributes`, except the side, which it may state too.
        lesion_id: the same for all pictures of one lesion, see `make_item`.
        named: whether the plan file states `lesion_id`.
        view: the view that the picture must show; None = whatever view the template is.
        date: of the synthetic study, or its distance from the template's date; None = the template's date.
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
    lesion: Lesion
    lesion_id: str
    named: bool = False
    view: str | None = None
    date: datetime.date | datetime.timedelta | None = None
    withheld: frozenset[str] = frozenset()

    @property
    def mask_source(self) -> str:
        """ "annotations", "file", "plan" (a box or an ellipse in a plan file) or "auto"."""
        return self.mask.source


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Sequence[PlanItem]):
    """The items of a job, made on access. A slice is a part of the plan, and makes its items on access too.

    Attributes:
        make: makes the item at a place of the whole plan; a pure function, safe in threads.
        places: the places of this part's items in the whole plan, which count from 0.
        templates: what the whole plan paints into, each image once.
        identity: {"masks", "descriptions"}: digests of everything that decides the items.
        alike: places with equal values have items of the same template, and of masks, views and sides that suit the
            template equally well; None stands for a place that is not compared with others.
    """

    make: Callable[[int], PlanItem]
    places: range
    templates: Sequence[ImageRecord]
    identity: Mapping[str, str]
    alike: Callable[[int], Hashable | None]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, chosen: int) -> PlanItem: ...
    @overload
    def __getitem__(self, chosen: slice) -> "Plan": ...
    def __getitem__(self, chosen: int | slice) -> "PlanItem | Plan":
        if not isinstance(chosen, slice):
            return self.make(self.places[chosen])
        places = self.places[chosen]
        part = [places.start, places.stop, places.step]
        identity = {name: digest_of(digest, *part) for name, digest in self.identity.items()}
        return replace(self, places=places, identity=self.identity if places == self.places else identity)

    def mapped(self, change: Callable[[PlanItem], PlanItem]) -> "Plan":
        """The plan with every item changed on access."""
        return replace(self, make=lambda place: change(self.make(place)))


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
) -> Plan:
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
        GBCIError: `variants` below 1, more images than `LARGEST_INDEX`, an unknown attribute or value, a report that is
            not plain text, a bad mask file, or no annotated box in any record.
    """
    if variants < 1:
        raise GBCIError(f"variants is {variants}; expected at least 1")
    if mask == "annotations":
        records = [record for record in records if record.findings]
        if not records:
            raise GBCIError("no input has an annotated box; use --mask auto or a mask file")
    if (images := variants * len(records)) > LARGEST_INDEX:
        raise GBCIError(f"variants is {variants}, so there are {images} images; expected at most {LARGEST_INDEX}")
    check_text(report)
    priors = priors or load_priors()
    given = parse_overrides(overrides or {})
    source = _Variants(
        records=records,
        variants=variants,
        seed=seed,
        annotated=mask == "annotations",
        drawn=FileMask.of(Path(mask)) if mask not in ("auto", "annotations") else None,
        given=given,
        report=report,
        balance=None if balance is None else Balance.parse(balance, given, priors),
        priors=priors,
    )
    return Plan(
        make=source.item,
        places=range(images),
        templates=records,
        identity={"masks": source.masks(), "descriptions": digest_of(source.descriptions(), balance)},
        alike=source.alike,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Variants:
    """Makes the items of `make_plan`: the first record's variants, then the next record's.

    Attributes:
        records: the templates; with `annotated`, only those with a box.
        annotated: whether the annotated boxes are the masks.
        drawn: the mask of every item, if a file was given.
        given: overridden attributes.
    """

    records: Sequence[ImageRecord]
    variants: int
    seed: int
    annotated: bool
    drawn: FileMask | None
    given: Mapping[str, Any]
    report: str | None
    balance: Balance | None
    priors: Priors

    def item(self, index: int) -> PlanItem:
        record, finding = self.records[index // self.variants], self._finding(index)
        drawn = self.balance.of(self.seed, index) if self.balance else {}
        chosen = {name: value for name, value in drawn.items() if name in _ATTRIBUTES}
        attributes = describe(record, finding, {**self.given, **chosen})
        box = BoxMask(box=finding.box) if finding else None
        return make_item(
            self.seed,
            index=index,
            template=record,
            variant=index % self.variants,
            mask=self.drawn or box or automatic(self.priors, attributes.finding_categories),
            attributes=attributes,
            report=self.report or _report(record, finding, attributes),
            lesion=lesion_of(attributes, Lesion(growth=drawn.get("growth"))),
            withheld=withheld(self.given),
        )

    def alike(self, index: int) -> Hashable:
        """Only the boxes of a record differ in how they suit it."""
        number, variant = divmod(index, self.variants)
        return number, variant % len(self.records[number].findings) if self.annotated else None

    def masks(self) -> str:
        """The digest of what decides the masks, with the number of items."""
        if self.annotated:
            source = ["annotations", [[finding.box for finding in record.findings] for record in self.records]]
        else:
            source = self.drawn.identity() if self.drawn else ["auto", self.priors.digest]
        return digest_of(json.dumps([len(self.records), self.variants, source]))

    def descriptions(self) -> str:
        """The digest of what decides seeds and descriptions, except the balance."""
        tables = [of_tables(record) for record in self.records]
        told = [self.annotated, dict(self.given), self.report, self.priors.digest if self.balance else None]
        return digest_of(json.dumps([self.seed, self.variants, tables, told]))

    def _finding(self, index: int) -> Finding | None:
        if not self.annotated:
            return None
        findings = self.records[index // self.variants].findings
        return findings[index % self.variants % len(findings)]


def make_item(
    job_seed: int,
    *,
    index: int,
    template: ImageRecord,
    variant: int,
    mask: Mask,
    attributes: Attributes,
    report: str | None,
    lesion: Lesion,
    withheld: frozenset[str],
    seed: int | None = None,
    named: str | None = None,
    view: str | None = None,
    when: datetime.date | datetime.timedelta | None = None,
) -> PlanItem:
    """An item with its ids and, where `seed` is None, its seed.

    Ids and seed follow from the job's seed and the item alone, so that pieces of a plan make the same images as the
    whole. Items that differ in template, description, mask or seed have different image_ids, so that jobs can be
    merged. The images of one study with the same variant number and date share a synthetic study.

    A lesion is identified by its name, if it has one, or else by its patient, its description, its mask and its seed.

    Args:
        named: the lesion's name in the job.
        when: the item's date.
    """
    seed = int(digest_of("noise", job_seed, index)[:32], 16) >> 65 if seed is None else seed
    more = [unshared(lesion, attributes), date_text(when)]
    # Ids of items that state neither are those of before there were lesions and dates.
    painted = [attributes.to_mapping(), report or "", mask.identity()[1:], seed, *(more if any(more) else [])]
    dated = [] if when is None else [date_text(when)]
    return PlanItem(
        index=index,
        image_id=digest_of("image", job_seed, index, template.study_id, template.image_id, json.dumps(painted))[:32],
        study_id=digest_of("study", job_seed, variant, template.study_id, *dated)[:32],
        template=template,
        variant=variant,
        seed=seed,
        mask=mask,
        attributes=attributes,
        report=report,
        lesion=lesion,
        lesion_id=named or lesion_id(lesion, job_seed, template.patient, mask.identity()[1:], seed),
        named=named is not None,
        view=view,
        date=when,
        withheld=withheld,
    )


def lesion_of(attributes: Attributes, more: Lesion) -> Lesion:
    """The lesion of a description, with what only `more` tells of it.

    Raises:
        GBCIError: `more` tells what the description's categories cannot have.
    """
    shared = {each.name for each in fields(Lesion)} & _ATTRIBUTES
    told = {name: getattr(attributes, name) for name in shared}
    return replace(more, **told | {"laterality": more.laterality or attributes.laterality})


def unshared(lesion: Lesion, attributes: Attributes) -> dict[str, Any]:
    """What is known of a lesion beyond its picture's description, as JSON values."""
    return {name: value for name, value in lesion.to_json().items() if getattr(attributes, name, None) is None}


def date_text(when: datetime.date | datetime.timedelta | None) -> str:
    """An item's date as in a plan file: 2031-05-02, a number of days such as +180, or nothing."""
    if isinstance(when, datetime.timedelta):
        return f"{when.days:+d}"
    return "" if when is None else when.isoformat()


def check_text(report: str | None) -> None:
    """Raises GBCIError if a report is not plain text: no table could hold it."""
    if not is_text(report or ""):
        raise GBCIError(f"report is {report!r}; expected plain text (UTF-8)")


def of_tables(record: ImageRecord) -> list[Any]:
    """What the input's tables say of an image and a job copies into its own tables, as JSON values."""
    findings = [[*finding.box, finding.attributes.to_mapping(), finding.extra] for finding in record.findings]
    return [record.study_id, record.image_id, record.split, record.attributes.to_mapping(), record.extra, findings]


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
