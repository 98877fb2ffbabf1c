"""Draws the findings of a breast: category, shape, place, BI-RADS, report sentence, and growth."""

from dataclasses import dataclass, replace

import numpy as np

from gbci_fast.attributes import VIEW_POSITIONS
from gbci_fast.phantom import bodies
from gbci_fast.phantom.bodies import Body
from gbci_fast.phantom.placement import Place, Room
from gbci_fast.phantom.population import ASSOCIATED

# Categories that a breast has at most once.
SINGLE = ("Skin Thickening", "Suspicious Lymph Node", "Nipple Retraction", "Global Asymmetry", "Skin Retraction")
MALIGNANT_MASSES = {"spiculated": 0.65, "irregular": 0.35}
BENIGN_MASSES = {"round": 0.3, "oval": 0.4, "lobular": 0.3}
# In the words of `Attributes`, where they differ from the kind.
SHAPES = {"spiculated": "irregular", "lobular": "lobulated"}
MARGINS = {"spiculated": "spiculated", "irregular": "indistinct"}
MASS_RADII = (5.0, 7.0, 9.0)  # mm, of the ball with the core's volume
DOUBLING_DAYS = 180.0  # median of cancers; log-normal, 0.5 (Fournier et al., Cancer 45, 1980: 44 to 1869 days)


@dataclass(frozen=True, kw_only=True)
class PhantomFinding:
    """One finding of one breast, the same in both views.

    Args:
        kind: kind of drawing, for example "spiculated".
        categories: VinDr categories of its row; several if findings share a place.
        place: see `placement`.
        radius: mm; of a mass, that of the ball with the core's volume; otherwise the reach of the change.
        strength: bodies and distortions: attenuation relative to gland; asymmetries: target of the glandular share;
            skin thickening: mm of skin; retractions: depth of the dent in mm.
        body: shape of a finding with a volume, else None.
        distortion: radius in mm of the distorted tissue, or 0.
        views: the views that show it.
        doubling_days: doubling time of its volume; None if it does not grow.
        shape, margin: of a mass, as in `Attributes`.
    """

    kind: str
    categories: tuple[str, ...]
    place: Place
    radius: float
    strength: float
    malignant: bool
    birads: int
    report: str
    body: Body | None = None
    distortion: float = 0.0
    views: tuple[str, ...] = VIEW_POSITIONS
    doubling_days: float | None = None
    shape: str | None = None
    margin: str | None = None

    @property
    def pathology(self) -> str:
        return "malignant" if self.malignant else "benign"

    @property
    def volume_mm3(self) -> float | None:
        """Volume of a mass, lymph node or cluster of calcifications; None for other findings."""
        return None if self.body is None or self.kind == "distortion" else self.body.volume_mm3

    def earlier(self, days: float) -> "PhantomFinding":
        """The same finding ``days`` earlier: the volume grows exponentially, the shape stays."""
        if self.doubling_days is None or days == 0:
            return self
        factor = 2 ** (-days / self.doubling_days / 3)
        body = None if self.body is None else self.body.scaled(factor)
        return replace(self, body=body, radius=self.radius * factor, distortion=self.distortion * factor)


def draw_findings(
    rng: np.random.Generator, categories: list[tuple[str, bool]], room: Room
) -> tuple[PhantomFinding, ...]:
    """Draws the primary findings of a breast and those associated with malignant masses.

    Args:
        categories: (category, whether malignant) of each primary finding.
        room: the free tissue of the breast.
    """
    findings: list[PhantomFinding] = []
    for category, malignant in categories:
        if category in SINGLE and any(category in finding.categories for finding in findings):
            continue
        finding = _DRAW[category](rng, malignant, room)
        if category != "Mass" or not malignant:
            findings.append(finding)
            continue
        brought = [name for name, chance in ASSOCIATED.items() if rng.uniform() < chance]
        if "Architectural Distortion" in brought:
            finding = _distort(rng, finding)
        findings.append(finding)
        for name in brought:
            if name in _BRING and not any(name in other.categories for other in findings if name in SINGLE):
                findings.append(_BRING[name](rng, finding, room))
    return tuple(findings)


def _mass(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    shares = MALIGNANT_MASSES if malignant else BENIGN_MASSES
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    radius = float(rng.choice(MASS_RADII))
    body = bodies.draw_mass(rng, kind, radius)
    margin = MARGINS.get(kind, "circumscribed")
    said = "irregular" if kind == "spiculated" else kind
    return PhantomFinding(
        kind=kind,
        categories=("Mass",),
        place=room.in_tissue(rng, body.radius),
        radius=radius,
        strength=rng.uniform(1.0, 1.1),
        body=body,
        report=f"{said} mass with {margin} margins",
        shape=SHAPES.get(kind, kind),
        margin=margin,
        **_assessment(rng, malignant, sure=0.65 if kind == "spiculated" else 0.4, grows=True),
    )


def _distort(rng: np.random.Generator, mass: PhantomFinding) -> PhantomFinding:
    return replace(
        mass,
        categories=(*mass.categories, "Architectural Distortion"),
        distortion=mass.radius * rng.uniform(2.0, 2.6),
        report=f"{mass.report} and associated architectural distortion",
    )


def _calcifications(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    return _cluster(rng, malignant, room.in_tissue(rng, 6.0))


def _cluster(rng: np.random.Generator, malignant: bool, place: Place) -> PhantomFinding:
    # From the cluster to the nipple; the body's x axis points to the nipple.
    duct = np.array([max(place[0], 10.0), -0.5 * place[1], -0.5 * place[2]])
    kinds = ("fine pleomorphic", "fine linear branching") if malignant else ("amorphous", "coarse heterogeneous")
    return PhantomFinding(
        kind="calcifications",
        categories=("Suspicious Calcification",),
        place=place,
        radius=6.0,
        strength=1.0,
        body=bodies.draw_cluster(rng, rng.uniform(4.0, 6.0), duct),
        report=f"{rng.choice(kinds)} calcifications with grouped distribution",
        **_assessment(rng, malignant, sure=0.4, unsure=0.8, grows=True),
    )


def _distortion(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    radius = rng.uniform(14, 20)
    return PhantomFinding(
        kind="distortion",
        categories=("Architectural Distortion",),
        place=room.in_tissue(rng, radius),
        radius=radius,
        strength=1.0,
        body=bodies.draw_star(rng, radius),
        distortion=radius,
        report="architectural distortion with radiating lines and no central mass",
        **_assessment(rng, malignant, sure=0.3, unsure=1.0),
    )


def _focal_asymmetry(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    radius = rng.uniform(11, 17)
    return PhantomFinding(
        kind="focal asymmetry",
        categories=("Focal Asymmetry",),
        place=room.in_tissue(rng, radius),
        radius=radius,
        strength=rng.uniform(0.4, 0.5),
        report="focal asymmetry with concave borders and interspersed fat, seen in both views",
        **_assessment(rng, malignant),
    )


def _asymmetry(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    radius = rng.uniform(11, 17)
    view = str(rng.choice(VIEW_POSITIONS))
    return PhantomFinding(
        kind="asymmetry",
        categories=("Asymmetry",),
        place=room.in_tissue(rng, radius),
        radius=radius,
        strength=rng.uniform(0.35, 0.45),
        views=(view,),
        report=f"asymmetry seen in the {view} view only",
        **_assessment(rng, malignant),
    )


def _global_asymmetry(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    depth = room.shapes["CC"].depth
    return PhantomFinding(
        kind="global asymmetry",
        categories=("Global Asymmetry",),
        place=(0.45 * depth, float(rng.normal(5, 5)), float(rng.normal(5, 5))),
        radius=depth * rng.uniform(0.4, 0.5),
        strength=rng.uniform(0.3, 0.4),
        report="global asymmetry: a large part of this breast is denser than the other breast",
        **_assessment(rng, malignant),
    )


def _skin_thickening(
    rng: np.random.Generator, malignant: bool, room: Room, toward: Place | None = None
) -> PhantomFinding:
    return PhantomFinding(
        kind="skin thickening",
        categories=("Skin Thickening",),
        place=room.on_skin(rng, toward),
        radius=rng.uniform(20, 35),
        strength=rng.uniform(3, 6),
        report="focal skin thickening",
        **_assessment(rng, malignant),
    )


def _skin_retraction(
    rng: np.random.Generator, malignant: bool, room: Room, toward: Place | None = None
) -> PhantomFinding:
    return PhantomFinding(
        kind="skin retraction",
        categories=("Skin Retraction",),
        place=room.on_skin(rng, toward),
        radius=rng.uniform(14, 20),
        strength=rng.uniform(4, 7),
        report="skin retraction with a tethering strand",
        **_assessment(rng, malignant, unsure=1.0),
    )


def _nipple_retraction(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    return PhantomFinding(
        kind="nipple retraction",
        categories=("Nipple Retraction",),
        place=(0.0, 0.0, 0.0),
        radius=14.0,
        strength=rng.uniform(3, 6),
        report="nipple retraction",
        **_assessment(rng, malignant),
    )


def _lymph_node(rng: np.random.Generator, malignant: bool, room: Room) -> PhantomFinding:
    radius = rng.uniform(6, 10)
    body = bodies.draw_node(rng, radius)
    return PhantomFinding(
        kind="lymph node",
        categories=("Suspicious Lymph Node",),
        place=room.in_axilla(rng, body.radius),
        radius=radius,
        strength=rng.uniform(0.9, 1.05),
        body=body,
        views=("MLO",),
        report="enlarged dense axillary lymph node with a small fatty hilum",
        **_assessment(rng, malignant, unsure=1.0, grows=True),
    )


def _assessment(
    rng: np.random.Generator, malignant: bool, *, sure: float = 0.25, unsure: float = 0.3, grows: bool = False
) -> dict:
    """Draws BI-RADS and doubling time: malignant findings are 5 (share ``sure``) or 4, benign 4 (``unsure``) or 3."""
    chance = rng.uniform()
    birads = (5 if chance < sure else 4) if malignant else (4 if chance < unsure else 3)
    doubling = DOUBLING_DAYS * np.exp(0.5 * rng.standard_normal())
    return {
        "malignant": malignant,
        "birads": birads,
        "doubling_days": float(np.clip(doubling, 45, 1000)) if malignant and grows else None,
    }


def _near(rng: np.random.Generator, mass: PhantomFinding) -> Place:
    """Draws a place within a mass."""
    offset = rng.standard_normal(3)
    offset *= mass.radius * rng.uniform(0, 0.8) / np.linalg.norm(offset)
    behind, lateral, above = (float(a + b) for a, b in zip(mass.place, offset, strict=True))
    return behind, lateral, above


_DRAW = {
    "Mass": _mass,
    "Suspicious Calcification": _calcifications,
    "Focal Asymmetry": _focal_asymmetry,
    "Architectural Distortion": _distortion,
    "Asymmetry": _asymmetry,
    "Skin Thickening": _skin_thickening,
    "Suspicious Lymph Node": _lymph_node,
    "Nipple Retraction": _nipple_retraction,
    "Global Asymmetry": _global_asymmetry,
    "Skin Retraction": _skin_retraction,
}
# Findings associated with a malignant mass are malignant. Calcifications lie in the mass, skin findings over it.
_BRING = {
    "Suspicious Calcification": lambda rng, mass, room: _cluster(rng, True, _near(rng, mass)),
    "Suspicious Lymph Node": lambda rng, mass, room: _lymph_node(rng, True, room),
    "Skin Thickening": lambda rng, mass, room: _skin_thickening(rng, True, room, mass.place),
    "Nipple Retraction": lambda rng, mass, room: _nipple_retraction(rng, True, room),
    "Skin Retraction": lambda rng, mass, room: _skin_retraction(rng, True, room, mass.place),
}
