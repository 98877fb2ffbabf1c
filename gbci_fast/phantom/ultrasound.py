"""A B-mode ultrasound slice through the lesion that the mammogram shows: speckle, shadowing and enhancement.

The slice is the plane of the chest-nipple axis (down the image, from the transducer on the skin to the chest wall) and
the lateral axis, through the center of the lesion. The breast is not compressed, and its thickness follows from its
density class; the lesion keeps its shape.

Model, per beam and to first order (refraction only as a loss at steep borders; no multiple scattering or compounding):

1. Tissue: skin, subcutaneous fat with Cooper's ligaments, fibroglandular tissue in fat, pectoral fascia and muscle.
   Each has an echogenicity in dB (fat is the reference, as in the BI-RADS ultrasound lexicon) and an attenuation in
   dB/cm/MHz.
2. Scatterers: circular complex Gaussian noise times the echogenicity, which is fully developed speckle: the envelope
   is Rayleigh distributed with a mean of 1.91 standard deviations (Wagner et al., IEEE Trans. Sonics Ultrason. 30,
   1983). Borders that face the beam add a coherent echo.
3. Round-trip loss ``2 f sum(alpha dz)`` at the center frequency, and a time gain that compensates the loss of the
   average healthy tissue. So tissue that attenuates more than its surroundings casts a shadow; tissue that attenuates
   less causes an enhancement.
4. Convolution with a separable pulse-echo response (Bamber and Dickinson, Phys. Med. Biol. 25, 1980): a Gaussian pulse
   along the beam, a Gaussian beam across. The scatterers are circular, so the carrier need not be sampled.
5. Electronic noise (amplified by the time gain), envelope, logarithm, 60 dB to 8 bits with a fixed gain.

Attenuation: fat 0.73 and parenchyma 0.75 dB/cm/MHz (Nam et al., Ultrasonics 53, 2013; Li et al. as tabulated in
PMC5087608). Masses: carcinomas attenuate more per MHz than fibroadenomas (Nam et al., Ultrason. Imaging 35, 2013); the
values here are wider apart, because they include the scattering by spicules. The values of skin, muscle and
calcification, and all echogenicities, are chosen for their appearance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from gbci_fast.data.boxes import bounding_box
from gbci_fast.errors import GBCIError
from gbci_fast.phantom.bodies import Body, Cluster, Ellipsoid, SpiculatedBody
from gbci_fast.phantom.study import BreastPlan, StudyPlan, stream

PIXELS = 512
SPACING = 0.075  # mm per pixel: a field of 38.4 mm, as wide as a common linear array
FREQUENCY = 10.0  # MHz
BANDWIDTH = 0.4  # -6 dB width of the pulse-echo spectrum relative to FREQUENCY
SOUND_SPEED = 1.54  # mm/us
F_NUMBER = 3.0  # the beam's width at half maximum is F_NUMBER wavelengths
ELEVATION = 1.5  # mm: thickness of the beam across the slice; used for specks only
DYNAMIC_RANGE = 60.0  # dB from black to white
FAT_LEVEL = -36.0  # dB relative to white at which the mean echo power of fat is shown
NOISE_LEVEL = -88.0  # dB relative to fat, before the time gain

SKIN_DEPTH = 1.5  # mm
REACH = 1.0  # mm: largest distance to a lesion's outline that is computed
# Rows: the picture's right, the picture's down, and across the slice, as directions in the frame of a body.
SLICE_AXES = {
    "L": np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "R": np.array([[0.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
}
# Per density class: mean depth in mm of the border between subcutaneous fat and parenchyma, mean depth in mm of the
# fascia, and glandular share between the two.
LAYERS = {"A": (9.0, 30.0, 0.12), "B": (7.5, 29.0, 0.30), "C": (5.5, 27.0, 0.60), "D": (4.0, 25.0, 0.85)}


@dataclass(frozen=True, kw_only=True)
class Acoustics:
    """Acoustic properties of a tissue.

    Attributes:
        echo: mean backscatter in dB relative to fat.
        attenuation: dB/cm/MHz.
        mottle: standard deviation in dB of a mass's echogenicity, over millimeters.
        capsule: echo in dB relative to fat of a border that faces the beam.
        rim: additional attenuation in dB/cm/MHz of a border along the beam.
    """

    echo: float
    attenuation: float
    mottle: float = 0.0
    capsule: float = -np.inf
    rim: float = 0.0


FAT = Acoustics(echo=0.0, attenuation=0.73)
GLAND = Acoustics(echo=9.0, attenuation=0.75)
SKIN_ACOUSTICS = Acoustics(echo=10.0, attenuation=0.9)
MUSCLE = Acoustics(echo=-4.0, attenuation=0.9)
LIGAMENT = 13.0  # dB
FASCIA, SKIN_ECHO = 22.0, 21.0  # dB
APERTURE = 0.5  # mm: lateral standard deviation over which a beam averages the attenuation
LESIONS = {
    "round": Acoustics(echo=-11.0, attenuation=0.30, mottle=0.5, capsule=11.0, rim=3.0),
    "oval": Acoustics(echo=-10.0, attenuation=0.35, mottle=0.5, capsule=11.0, rim=3.0),
    "lobular": Acoustics(echo=-9.0, attenuation=0.40, mottle=1.0, capsule=9.0, rim=2.0),
    "lymph node": Acoustics(echo=-11.0, attenuation=0.60, mottle=0.5, capsule=8.0, rim=1.0),
    "irregular": Acoustics(echo=-12.0, attenuation=1.10, mottle=2.0),
    "spiculated": Acoustics(echo=-13.0, attenuation=1.30, mottle=2.0),
    "star": Acoustics(echo=-9.0, attenuation=1.30, mottle=1.0),
    "calcifications": Acoustics(echo=26.0, attenuation=9.0, capsule=26.0),
}


@dataclass(frozen=True, kw_only=True)
class UltrasoundSlice:
    """``image`` uint8 [H, W] with the skin at the top; ``mask`` bool [H, W], the exact section of the body."""

    image: np.ndarray
    mask: np.ndarray
    spacing_mm: float

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """xmin, ymin, xmax, ymax of the mask in pixels, the last two exclusive; None without a lesion."""
        return bounding_box(self.mask) if self.mask.any() else None


@dataclass(frozen=True, kw_only=True)
class EchoMaps:
    """Maps [H, W]: backscatter amplitude (fat is 1), attenuation in dB/cm/MHz, and coherent echo amplitude."""

    amplitude: np.ndarray
    attenuation: np.ndarray
    coherent: np.ndarray


Streams = Callable[[str], np.random.Generator]


def render_slice(streams: Streams, density: str, laterality: str, body: Body | None) -> UltrasoundSlice:
    """Renders one slice.

    Args:
        streams: returns a random stream for each purpose; streams and body decide the slice.
        density: class A to D.
        laterality: "L" or "R"; the patient's left is on the right of the picture.
        body: the lesion; None for the healthy twin, which differs only in, behind and within 3 mm of the lesion.

    Raises:
        GBCIError: a body of a kind that has no acoustics.
    """
    if body is not None and body.kind not in LESIONS:
        raise GBCIError(f"a lesion of kind {body.kind!r} has no acoustics; expected one of {', '.join(LESIONS)}")
    tissue = healthy_tissue(streams, density)
    gain = 2 * FREQUENCY * tissue.attenuation.mean() / 10 * _depth()  # dB
    mask = np.zeros((PIXELS, PIXELS), bool)
    if body is not None:
        z, x = place(streams("place"), density, body)
        distance = slice_distance(body, laterality, _lateral()[0] - x, _depth()[:, 0] - z)
        mask = distance > 0
        tissue = insert(streams("lesion"), tissue, LESIONS[body.kind], distance)
    return UltrasoundSlice(image=b_mode(streams("speckle"), tissue, gain), mask=mask, spacing_mm=SPACING)


def render_ultrasound(plan: StudyPlan, breast: BreastPlan, finding: int, *, healthy: bool = False) -> UltrasoundSlice:
    """Renders the slice through a finding; it depends only on seed, index, laterality, finding, density and the body.

    Args:
        finding: number among the breast's findings, from 0.
        healthy: render the twin, the same breast without the finding.

    Raises:
        GBCIError: a finding without a body.
    """
    found = breast.findings[finding]
    if found.body is None:
        raise GBCIError(
            f"a finding of kind {found.kind!r} has no body; expected a mass, a node, specks or a distortion"
        )

    def streams(purpose: str) -> np.random.Generator:
        return stream(plan.seed, plan.index, breast.laterality, "ultrasound", finding, purpose)

    density = "A" if found.kind == "lymph node" else plan.breast_density  # the axilla is fat
    return render_slice(streams, density, breast.laterality, None if healthy else found.body)


def place(rng: np.random.Generator, density: str, body: Body) -> tuple[float, float]:
    """Draws (depth, lateral) in mm of the lesion's center: in the parenchyma, or as near to it as its size allows.

    The place is drawn independently of the size and then clipped, so that a growing lesion stays in place while it
    fits.
    """
    top, bottom, _ = LAYERS[density]
    depth, lateral = top + rng.uniform(0.2, 0.6) * (bottom - top), rng.uniform(-3, 3)
    core = (isinstance(body, SpiculatedBody) and body.core) or body  # strands may reach into the fat
    low, high = SKIN_DEPTH + 0.5 + core.radius, bottom - 1 - core.radius
    return (float(np.clip(depth, low, high)) if low < high else (low + high) / 2), lateral


def slice_distance(body: Body, laterality: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """First-order signed distance in mm to the outline of the body's section, [H, W], positive inside, within ±`REACH`.

    A cluster of calcifications is cut where most specks are; all specks within the beam count as if in its middle.

    Args:
        u: [W], evenly spaced pixel centers in mm to the right of the lesion's center.
        v: [H], the same downward.
    """
    axes = SLICE_AXES[laterality]
    spacing = v[1] - v[0]
    nearest = np.full((len(v), len(u)), -REACH, np.float32)
    for part in _parts(body):
        window = _window(part, axes, u, v)
        if min(nearest[window].shape) < 2:
            continue  # beyond the edge of the picture or of the beam
        x, y, z = (axes[0][i] * u[None, window[1]] + axes[1][i] * v[window[0], None] for i in range(3))
        level = np.asarray(part.level(x, y, z), np.float32)
        if level.max() <= 0:
            continue  # the plane just misses it
        slope = np.hypot(*np.gradient(level, spacing))
        distance = np.clip(level / np.maximum(slope, 1e-6), -REACH, REACH)
        nearest[window] = np.maximum(nearest[window], distance)
    return nearest


def _parts(body: Body) -> tuple[Body, ...]:
    """Bodies whose union is the body, so that each can be drawn in its own part of the picture."""
    if isinstance(body, SpiculatedBody):
        return tuple(part for part in (body.core, *body.strands) if part is not None)
    if isinstance(body, Cluster):
        height = body.specks[:, 2]
        met = np.abs(height[:, None] - height) < ELEVATION / 2
        seen = body.specks[met[np.argmax(met.sum(axis=1))]]
        return tuple(Ellipsoid(to_unit=np.eye(3) / r, center=np.array([x, y, 0.0])) for x, y, _, r in seen)
    return (body,)


def _window(part: Body, axes: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the pixels within `REACH` of the part; empty if the plane misses the part."""
    middle, reach = np.zeros(3), np.full(3, part.radius)
    if isinstance(part, Ellipsoid):
        middle, reach = axes @ part.center, np.linalg.norm(axes @ part.from_unit, axis=1)
    if abs(middle[2]) > reach[2]:
        return slice(0), slice(0)
    near = reach + REACH
    return (
        slice(*np.searchsorted(v, (middle[1] - near[1], middle[1] + near[1]))),
        slice(*np.searchsorted(u, (middle[0] - near[0], middle[0] + near[0]))),
    )


def healthy_tissue(streams: Streams, density: str) -> EchoMaps:
    """Echo maps of the layers of a breast without a lesion."""
    z = _depth()
    top, bottom, share = LAYERS[density]
    rng = streams("layers")
    parenchyma = top + _undulation(rng, 1.2)
    fascia = bottom + _undulation(rng, 0.7)
    lobes = _field(streams("lobes"), 2.6, 1.3)
    strands = _field(streams("strands"), 1.6, 0.35)
    fibers = _field(streams("fibers"), 6.0, 0.2)

    # Gland is where the field exceeds a quantile, so that its share of the parenchyma is that of the density class.
    zone = _above(z - parenchyma, 0.4) * _above(fascia - 1.2 - z, 0.4)
    inside = zone > 0.5
    threshold = np.quantile(lobes[inside], 1 - share)
    gland = zone * _above(lobes - threshold, 0.15)
    walls = np.exp(-((_field(streams("walls"), 2.8, 1.4) / 0.09) ** 2))
    ligament = LIGAMENT * np.clip(0.7 + 0.3 * strands, 0, 1.2) * walls
    decibel = FAT.echo + 0.7 * strands + ligament
    decibel = _mix(decibel, GLAND.echo + 1.8 * strands - 4 * np.maximum(strands - 1.2, 0) + 0.3 * ligament, gland)
    muscle = _above(z - fascia, 0.15)
    decibel = _mix(decibel, MUSCLE.echo + 9 * np.maximum(fibers - 0.6, 0), muscle)
    skin = _above(SKIN_DEPTH - z, 0.1)
    decibel = _mix(decibel, SKIN_ACOUSTICS.echo, skin)

    attenuation = _mix(np.float32(FAT.attenuation), GLAND.attenuation, gland)
    attenuation = _mix(_mix(attenuation, MUSCLE.attenuation, muscle), SKIN_ACOUSTICS.attenuation, skin)
    glint = np.clip(0.6 + 0.35 * strands, 0.1, 1.2)
    coherent = (
        _amplitude(FASCIA) * glint * (_line(z - fascia) + 0.4 * _line(z - fascia - 0.7 - 0.3 * _undulation(rng, 1)))
    )
    coherent += _amplitude(SKIN_ECHO) * (1.2 * _line(z - 0.3) + glint * _line(z - SKIN_DEPTH))
    return EchoMaps(
        amplitude=_amplitude(decibel).astype(np.float32), attenuation=attenuation, coherent=coherent.astype(np.float32)
    )


def insert(rng: np.random.Generator, tissue: EchoMaps, lesion: Acoustics, distance: np.ndarray) -> EchoMaps:
    """The tissue with a lesion in the place where ``distance`` (from `slice_distance`) is positive."""
    inside = np.clip(distance / SPACING + 0.5, 0, 1)
    slope_z, slope_x = np.gradient(distance, SPACING)
    steepness = np.hypot(slope_z, slope_x) + 1e-6
    shell = np.exp(-(((distance - 0.15) / 0.12) ** 2)) * (distance > 0)
    facing, along = (np.abs(slope) / steepness for slope in (slope_z, slope_x))
    echo = lesion.echo + lesion.mottle * _field(rng, 1.0, 0.8)
    return EchoMaps(
        amplitude=tissue.amplitude * (1 - inside) + _amplitude(echo) * inside,
        attenuation=_mix(tissue.attenuation, lesion.attenuation, inside) + lesion.rim * shell * along**12,
        coherent=tissue.coherent * (1 - inside) + _amplitude(lesion.capsule) * shell * facing**6,
    )


def b_mode(rng: np.random.Generator, tissue: EchoMaps, gain: np.ndarray) -> np.ndarray:
    """The B-mode picture of the tissue, uint8 [H, W]; ``gain`` is the time gain in dB, [H, 1]."""
    decibel = FAT_LEVEL + 20 * np.log10(np.maximum(envelope(rng, tissue, gain), 1e-6))
    return np.rint(np.clip(1 + decibel / DYNAMIC_RANGE, 0, 1) * 255).astype(np.uint8)


def envelope(rng: np.random.Generator, tissue: EchoMaps, gain: np.ndarray) -> np.ndarray:
    """The echo's magnitude, float32 [H, W], scaled so that the mean square of unattenuated fat is 1."""
    shape = tissue.amplitude.shape
    met = ndimage.gaussian_filter1d(tissue.attenuation, APERTURE / SPACING, axis=1)
    loss = 2 * FREQUENCY * np.cumsum(met, axis=0, dtype=np.float32) * (SPACING / 10)  # dB
    transfer = _amplitude(gain - loss)
    scatterers = rng.standard_normal((2, *shape), dtype=np.float32) * (tissue.amplitude * transfer * np.sqrt(0.5))
    scatterers[0] += tissue.coherent * transfer
    noise = rng.standard_normal((2, *shape), dtype=np.float32) * np.float32(np.sqrt(0.5) * _amplitude(NOISE_LEVEL))
    along, across = axial_sigma() / SPACING, lateral_sigma() / SPACING
    echo = _unit_energy(_unit_energy(scatterers, across, axis=2), along, axis=1)
    echo += _unit_energy(noise, along, axis=1) * _amplitude(gain)  # every beam has its own noise
    return np.hypot(echo[0], echo[1])


def axial_sigma() -> float:
    """Standard deviation of the pulse in mm: from the -6 dB width of a Gaussian spectrum, halved by the round trip."""
    spectral = BANDWIDTH * FREQUENCY / (2 * np.sqrt(2 * np.log(2)))
    return SOUND_SPEED / 2 / (2 * np.pi * spectral)


def lateral_sigma() -> float:
    """Standard deviation of the lateral beam profile in mm."""
    return F_NUMBER * SOUND_SPEED / FREQUENCY / (2 * np.sqrt(2 * np.log(2)))


def _unit_energy(values: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """Gaussian smoothing that keeps the variance of white noise."""
    reach = np.arange(-int(4 * sigma + 1), int(4 * sigma + 1) + 1)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    return ndimage.convolve1d(values, kernel / np.linalg.norm(kernel), axis=axis, mode="reflect")


def _field(rng: np.random.Generator, across: float, along: float) -> np.ndarray:
    """A Gaussian field [H, W] of unit variance; ``across`` and ``along`` are lateral and depth sigmas in mm."""
    # Drawn and smoothed on a coarse grid with four samples per sigma, then enlarged.
    steps = [max(1.0, length / SPACING / 4) for length in (along, across)]
    coarse = rng.standard_normal([int(PIXELS / step) + 1 for step in steps], dtype=np.float32)
    sigmas = [length / SPACING / step for length, step in zip((along, across), steps, strict=True)]
    coarse = ndimage.gaussian_filter(coarse, sigmas, mode="wrap")
    coarse /= coarse.std()
    return np.asarray(Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def _undulation(rng: np.random.Generator, amplitude: float) -> np.ndarray:
    """The depth variation of a wavy layer border in mm, [1, W]."""
    waves = ((rng.normal(0, amplitude / 2), rng.uniform(0.3, 1.6), rng.uniform(0, 2 * np.pi)) for _ in range(4))
    turns = _lateral() / (PIXELS * SPACING) * (2 * np.pi)
    return sum(height * np.cos(cycles * turns + phase) for height, cycles, phase in waves)


def _above(distance: np.ndarray, softness: float) -> np.ndarray:
    """A smooth step from 0 (``distance`` far below zero) to 1 (far above zero)."""
    return 0.5 + 0.5 * np.tanh(distance / softness)


def _line(distance: np.ndarray) -> np.ndarray:
    return np.exp(-((distance / 0.08) ** 2))


def _depth() -> np.ndarray:  # [H, 1] mm
    return ((np.arange(PIXELS, dtype=np.float32) + 0.5) * SPACING)[:, None]


def _lateral() -> np.ndarray:  # [1, W] mm
    return ((np.arange(PIXELS, dtype=np.float32) + 0.5 - PIXELS / 2) * SPACING)[None, :]


def _mix(a: np.ndarray, b: np.ndarray | float, share: np.ndarray) -> np.ndarray:
    return a + (b - a) * share


def _amplitude(decibel: np.ndarray | float) -> np.ndarray | float:
    return 10 ** (decibel / 20)
