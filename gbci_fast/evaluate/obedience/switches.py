"""What is told of a lesion, and the switches between two tellings that differ in one attribute.

A description tells an attribute as a user would: in the attributes and, where reports state it, in the report's words.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gbci_fast.attributes import Attributes
from gbci_fast.evaluate.lesions import LesionCase
from gbci_fast.evaluate.painting import Description
from gbci_fast.evaluate.readers import truth

MASS = ("Mass",)
NONSENSE = "zorblax"
"""The control's word. No lexicon and no report of the training sets has it; the packaged model's word table gives it an
entry that no training report uses."""

OWN, CONTROL = "own", "control"
Telling = Callable[[LesionCase], Description]


def _told(report: str, **values: object) -> Telling:
    """The lesion's own attributes with `values` instead, and `report`; ``{own}`` in it stands for the own report."""

    def tell(case: LesionCase) -> Description:
        return Description(
            attributes=replace(case.attributes, **values),
            report=report.format(own=case.report or "").strip("; ") or None,
        )

    return tell


_NO_MASS = {"shape": None, "margin": None, "pathology": None, "subtlety": None}

TELLINGS: dict[str, Telling] = {
    OWN: Description.of,
    "circumscribed": _told("oval mass with circumscribed margins", shape="oval", margin="circumscribed"),
    "spiculated": _told("irregular mass with spiculated margins", shape="irregular", margin="spiculated"),
    "oval": _told("oval mass with indistinct margins", shape="oval", margin="indistinct"),
    "irregular": _told("irregular mass with indistinct margins", shape="irregular", margin="indistinct"),
    "BI-RADS 2": _told("{own}", finding_birads=2, breast_birads=2),
    "BI-RADS 5": _told("{own}", finding_birads=5, breast_birads=5),
    "density A": _told("{own}", breast_density="A"),
    "density D": _told("{own}", breast_density="D"),
    "calcification": _told(
        "cluster of microcalcifications", finding_categories=("Suspicious Calcification",), **_NO_MASS
    ),
    "no finding": _told("", finding_categories=(), finding_birads=None, **_NO_MASS),
    "benign": _told("{own}; benign", pathology="benign"),
    "malignant": _told("{own}; malignant", pathology="malignant"),
    CONTROL: _told("{own}; " + NONSENSE),
}
"""{name: description of a lesion}; everything that a telling does not state is the lesion's own."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Two tellings of one lesion that differ in one attribute.

    Attributes:
        name: of the switch, in reports.
        tellings: names of `TELLINGS`: told 0 and told 1.
        real: whether a real lesion is of class 1 (True) or class 0 (False); None = neither, or unknown.
        task: of the readers (`gbci_fast.evaluate.readers`) that reads the attribute; None = no reader knows it.
        keeps: whether place and size of the lesion should stay.
    """

    name: str
    tellings: tuple[str, str]
    real: Callable[[Attributes], bool | None] = lambda attributes: None
    task: str | None = None
    keeps: bool = True


def _among(name: str, ones: tuple, zeros: tuple) -> Callable[[Attributes], bool | None]:
    def real(attributes: Attributes) -> bool | None:
        value = getattr(attributes, name)
        return True if value in ones else False if value in zeros else None

    return real


def _reader(name: str, zero: str, one: str, task: str) -> Switch:
    """A switch between two answers of a reader's task."""
    return Switch(name=name, tellings=(zero, one), real=lambda told: truth(task, told, 0, 0), task=task)


SWITCHES = (
    _reader("margin", "circumscribed", "spiculated", "margin"),
    _reader("shape", "oval", "irregular", "shape"),
    _reader("BI-RADS", "BI-RADS 2", "BI-RADS 5", "birads"),
    _reader("pathology", "benign", "malignant", "pathology"),
    Switch(name="density", tellings=("density A", "density D"), real=_among("breast_density", ("D",), ("A",))),
    Switch(
        name="calcification",
        tellings=(OWN, "calcification"),
        real=_among("finding_categories", (("Suspicious Calcification",),), (MASS,)),
        keeps=False,
    ),
    Switch(
        name="no finding",
        tellings=(OWN, "no finding"),
        real=_among("finding_categories", ((),), (MASS,)),
        keeps=False,
    ),
    Switch(name=CONTROL, tellings=(OWN, CONTROL)),
)
