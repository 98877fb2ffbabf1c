"""Kinds of image and how they were taken: For Processing, enhanced, color, magnified, implants, sides."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from pydicom import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    BreastProjectionXRayImageStorageForPresentation,
    BreastTomosynthesisImageStorage,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)

from .case import Case
from .files import RAMP, code, make, make_breast

P = RAMP.astype(np.float64)
WINDOW = ("dcmj2pnm", "+Wi", "1")
FULL_12 = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
RAW = {"BitsStored": 12, "SOPClassUID": DigitalMammographyXRayImageStorageForProcessing}
BY_HISTOGRAM = ("For Processing, not for reading: displayed by its own histogram",)
BY_VOI = ("For Processing, not for reading: displayed by the VOI that it states",)
BREAST = make_breast()


def raw_images() -> Iterator[Case]:
    """Images For Processing: X-ray intensity, shown bright = dense whatever PhotometricInterpretation says."""
    case = partial(Case, group="For Processing", notes=BY_HISTOGRAM, tolerance=1e-5)
    # Intensity: 4088 is the darkest and is left out; the 0.5th percentile of the other 510 is 4064, the third value.
    # 8 is the densest. 0 was not exposed.
    logarithm = np.clip(np.log(4064 / np.maximum(P, 8)) / np.log(4064 / 8), 0, 1)
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        tags = {"PhotometricInterpretation": photometric, "PixelIntensityRelationshipSign": 1}
        build = partial(make, RAMP, PixelIntensityRelationship="LIN", **tags, **RAW)
        yield case(name=f"linear, more is less dense, {photometric}", build=build, display=logarithm)
        # 4064 is the third value above the darkest, 4088; 0 is the brightest (0.1 % of 511 is less than one pixel).
        build = partial(make, RAMP, PixelIntensityRelationship="LOG", **tags, **RAW)
        yield case(
            name=f"logarithmic, more is less dense, {photometric}", build=build, display=np.clip(1 - P / 4064, 0, 1)
        )
        tags["PixelIntensityRelationshipSign"] = -1
        build = partial(make, RAMP, PixelIntensityRelationship="LOG", **tags, **RAW)
        display = np.clip((P - 24) / (4088 - 24), 0, 1)
        yield case(name=f"logarithmic, more is denser, {photometric}", build=build, display=display)
    build = partial(make, RAMP, BitsStored=12, PresentationIntentType="FOR PROCESSING")
    yield case(name="by PresentationIntentType alone", build=build, display=np.clip((P - 24) / (4088 - 24), 0, 1))
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    build = partial(make, RAMP, PixelIntensityRelationshipSign=-1, **window, **RAW)
    yield case(name="with a window", build=build, display=P / 4095, notes=BY_VOI, second=WINDOW)
    tags = {"PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": 1}
    build = partial(make, RAMP, **tags, **window, **RAW)
    yield case(name="with a window that shows dense dark", build=build, display=np.clip(1 - P / 4064, 0, 1))
    build = partial(make, RAMP, RescaleSlope=2, RescaleIntercept=0, **RAW)
    yield Case(
        group="For Processing",
        name="with a rescale",
        build=build,
        refused="an image For Processing with a modality transformation; expected none (PS3.3 C.8.11.3)",
    )


def kinds() -> Iterator[Case]:
    """SOP classes, and numbers of frames and of samples."""
    case = partial(Case, group="Kind of image")
    build = partial(make, RAMP, SOPClassUID=SecondaryCaptureImageStorage, NumberOfFrames=1, **FULL_12)
    yield case(name="Secondary Capture, one frame", build=build, display=P / 4095, second=WINDOW)
    build = partial(make, RAMP, SOPClassUID=BreastProjectionXRayImageStorageForPresentation, **_functional_groups())
    # The window (LINEAR, center 1000, width 501) acts on 2p - 1024: black at p = 886.75, white at p = 1136.75.
    yield case(
        name="Breast Projection X-Ray (enhanced), one frame",
        build=build,
        display=np.clip((P - 886.75) / 250, 0, 1),
        spacing=(0.07, 0.07),
        second=("dcmj2pnm", "+Ww", "1000", "501"),
    )
    for name, sop_class, tags, notes in (
        ("CR of the breast", ComputedRadiographyImageStorage, {"Modality": "CR", "BodyPartExamined": "BREAST"}, ()),
        (
            "Secondary Capture that states neither modality nor body part",
            SecondaryCaptureImageStorage,
            {"Modality": None},
            ("neither Modality MG nor a body part is stated: taken as a mammogram",),
        ),
        (
            "2D computed from a tomosynthesis",
            DigitalMammographyXRayImageStorageForPresentation,
            {"ImageType": ["DERIVED", "PRIMARY", "TOMO", "GENERATED_2D"]},
            ("computed from a tomosynthesis",),
        ),
    ):
        build = partial(make, RAMP, SOPClassUID=sop_class, **FULL_12 | tags)
        yield case(name=name, build=build, display=P / 4095, notes=notes)
    for name, tags, refused in (
        ("several frames", {"NumberOfFrames": 3}, "3 frames; expected a single image"),
        (
            "tomosynthesis, one frame",
            {"SOPClassUID": BreastTomosynthesisImageStorage, "NumberOfFrames": 1},
            "a breast tomosynthesis object; expected a mammogram (2D)",
        ),
        (
            "tomosynthesis, several frames",
            {"SOPClassUID": BreastTomosynthesisImageStorage, "NumberOfFrames": 40},
            "a breast tomosynthesis object; expected a mammogram (2D)",
        ),
        (
            "tomosynthesis projection",
            {"ImageType": ["ORIGINAL", "PRIMARY", "TOMO_PROJ"]},
            "a part of a tomosynthesis (ImageType TOMO_PROJ); expected a mammogram (2D)",
        ),
        (
            "CT, MR, ultrasound and others",
            {"SOPClassUID": CTImageStorage, "Modality": "CT"},
            "an object of another kind (CT Image Storage); expected a mammogram (2D)",
        ),
        (
            "CR of the chest",
            {"SOPClassUID": ComputedRadiographyImageStorage, "Modality": "CR", "BodyPartExamined": "CHEST"},
            "Modality is CR and BodyPartExamined CHEST; expected a breast",
        ),
        (
            "report (SR), PDF, presentation state",
            {"SOPClassUID": BasicTextSRStorage, "Modality": "SR", "PixelData": None, "Rows": None},
            "no pixels (Basic Text SR Storage); expected an image",
        ),
        (
            "color",
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
            "a color image (RGB, 3 samples per pixel); expected MONOCHROME1 or MONOCHROME2",
        ),
        (
            "floating point",
            {"PixelData": None, "FloatPixelData": bytes(2048)},
            "floating-point pixels; expected integers in PixelData",
        ),
        (
            "no pixels",
            {"PixelData": None},
            "no PixelData, or cut short before its end; expected an image",
        ),
    ):
        yield case(name=name, build=partial(make, RAMP, **FULL_12 | tags), refused=refused)


def geometries() -> Iterator[Case]:
    """Spacing, magnification, modified views, implants, annotations and sides."""
    case = partial(Case, group="Acquisition", display=BREAST / 4095, second=WINDOW)
    breast = partial(make, BREAST, **FULL_12)
    detector = {"ImagerPixelSpacing": [0.09, 0.09]}
    magnified = code("399162004", ViewModifierCodeSequence=code("399163009"))
    for name, build, spacing, notes in (
        (
            "in contact, factor 1.05",
            partial(breast, EstimatedRadiographicMagnificationFactor="1.05", **detector),
            (0.09 / 1.05, 0.09 / 1.05),
            (),
        ),
        (
            "magnification view, factor 1.8",
            partial(breast, EstimatedRadiographicMagnificationFactor="1.8", ViewCodeSequence=magnified, **detector),
            (0.05, 0.05),
            ("view modified: Magnification", "magnified 1.8 times: the spacing is that in the breast"),
        ),
        (
            "magnification view, no factor",
            partial(breast, ViewCodeSequence=magnified, **detector),
            (0.09, 0.09),
            (
                "view modified: Magnification",
                "magnified by an unknown factor: the spacing is that of the detector",
            ),
        ),
        (
            "spot compression (SNOMED-RT)",
            partial(breast, ViewCodeSequence=code("R-10242", ViewModifierCodeSequence=code("R-102D7", "SRT"))),
            None,
            ("view modified: Spot Compression",),
        ),
        (
            "implant",
            partial(breast, BreastImplantPresent="YES"),
            None,
            ("breast implant",),
        ),
        (
            "implant displaced",
            partial(
                breast,
                BreastImplantPresent="YES",
                ViewCodeSequence=code("399162004", ViewModifierCodeSequence=code("399209000")),
            ),
            None,
            ("view modified: Implant Displaced", "breast implant"),
        ),
        (
            "calibrated spacing",
            partial(breast, PixelSpacing=[0.06, 0.06], EstimatedRadiographicMagnificationFactor="1.8"),
            (0.06, 0.06),
            ("magnified 1.8 times: the spacing is that in the breast",),
        ),
        (
            "pixels that are not square",
            partial(breast, ImagerPixelSpacing=[0.1, 0.05]),
            (0.1, 0.05),
            ("pixels are 2 times as high as wide",),
        ),
        (
            "PixelAspectRatio without a spacing",
            partial(breast, PixelAspectRatio=[2, 1]),
            None,
            ("pixels are 2 times as high as wide",),
        ),
        ("partial view", partial(breast, PartialView="YES"), None, ("partial view",)),
        ("burned-in annotation", partial(breast, BurnedInAnnotation="YES"), None, ("burned-in annotation",)),
    ):
        yield case(name=name, build=build, spacing=spacing, notes=notes)
    yield case(name="a side that the pixels contradict", build=partial(breast, ImageLaterality="R"), laterality="R")
    labeled = with_label()
    build = partial(make, labeled, **FULL_12)
    yield case(name="a bright label beside the breast", build=build, display=labeled / 4095)
    for name, tags, refused in (
        (
            "a spacing of 700 mm",
            {"ImagerPixelSpacing": [700, 700]},
            "ImagerPixelSpacing is [700.0, 700.0]; expected two numbers from 0.01 to 10.0 mm",
        ),
        (
            "a magnification of 0.2",
            {"EstimatedRadiographicMagnificationFactor": "0.2", **detector},
            "EstimatedRadiographicMagnificationFactor is 0.2; expected a number from 1 to 10",
        ),
    ):
        yield Case(group="Acquisition", name=name, build=partial(breast, **tags), refused=refused)


def with_label() -> np.ndarray:
    """The breast image with a white label, such as lead letters, in the corner away from the breast."""
    labeled = BREAST.copy()
    labeled[6:16, 74:90] = 4000
    labeled[8:14, 78:80] = labeled[8:14, 84:86] = 120
    return labeled


def _functional_groups() -> dict[str, object]:
    """Rescale, window, spacing and side in functional groups, as in enhanced images (PS3.3 C.7.6.16.2)."""

    def macro(**tags: object) -> list[Dataset]:
        item = Dataset()
        for keyword, value in tags.items():
            setattr(item, keyword, value)
        return [item]

    shared = macro(
        PixelMeasuresSequence=macro(PixelSpacing=[0.07, 0.07]),
        PixelValueTransformationSequence=macro(RescaleSlope=2, RescaleIntercept=-1024, RescaleType="US"),
        FrameAnatomySequence=macro(FrameLaterality="L"),
    )
    frame = macro(FrameVOILUTSequence=macro(WindowCenter=1000, WindowWidth=501))
    return {
        "BitsStored": 12,
        "NumberOfFrames": 1,
        "ImageLaterality": None,
        "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": frame,
    }
