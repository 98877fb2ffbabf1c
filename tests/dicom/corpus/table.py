"""The corpus as the table of docs/dicom.md."""

import tempfile
from itertools import pairwise
from pathlib import Path

from gbci_fast.data.segmentation import breast_mask, chest_wall_side
from gbci_fast.dicom.acquisition import side_contradiction
from gbci_fast.dicom.reading import Mammogram, read_mammogram
from gbci_fast.errors import GBCIError

from . import second
from .case import Case
from .cases import CASES

DOCUMENT = Path(__file__).parents[3] / "docs" / "dicom.md"
DCMTK = "3.6.7"  # another version may round otherwise
UNKNOWN = "?"  # where another or none is installed
INTRODUCTION = f"""\
# Which DICOM files are read

Made by `python tests/dicom/corpus`, from the files of `tests/dicom/corpus`, each of which is a test: its display
against values worked out by hand, and against dcmtk where that has a renderer of it. What is read can also be written:
with another lesion in it, every other pixel has the same stored value and the same display.

- Display values go from 0 (black) to 1 (white), bright = dense, and are computed at 16 bits. The last column is the
  largest difference to dcmtk {DCMTK} in levels of 65535: it scales VOI LUTs by 1 / 2^bits and rounds after a rescale.
- A phrase after "read" is a note of the image (`Mammogram.notes`); `generate` and `prepare` list them.
- An image **For Processing** holds X-ray intensities. Its PixelIntensityRelationship decides: the logarithm of linear
  ones is taken, and PixelIntensityRelationshipSign makes it bright = dense, whatever PhotometricInterpretation is.
  Without a VOI (or with one that shows dense tissue dark) its own histogram gives black and white. A written copy is
  For Presentation, with the same stored values and that display as a VOI LUT.
- The **side** comes from the header, the flip from the pixels; a contradiction is a note.
- **Spacing** is that in the breast: ImagerPixelSpacing / EstimatedRadiographicMagnificationFactor.
- **The frame decides** where an encoded frame and the header disagree: its precision becomes BitsStored where a pixel
  needs it, and a note says so. Signs that differ, several frames under NumberOfFrames 1, and cut frames are refused.
- **Cut frames** that somebody closed again are refused where the coding tells: tiles of JPEG 2000 that are absent, and
  restarts of lossy JPEG. Damage inside a closed lossy JPEG scan without restart intervals is not seen.
- **Lossy** images stay marked as lossy: by their transfer syntax, and by the coding of the frame (the 9-7 transform of
  JPEG 2000, NEAR of JPEG-LS, JPEG but the lossless process), whatever the header says. Several quality layers of the
  5-3 transform may have lost some: under a lossless syntax that is a note, and what the header says stays.
- **Kind of image**: X-ray projections of a breast, by SOP class (a mammography class, whatever Modality says), or by
  Modality (MG, or CR, DX, RG with BodyPartExamined or AnatomicRegionSequence breast, or a view of PS3.16 CID 4014), and
  by ImageType (no part of a tomosynthesis; GENERATED_2D and TOMO_2D are read). A Secondary Capture need not state body
  part or view, but must not state another one.
- **View**: a header that states another view than CC and MLO is not overruled by a file's name or a table. Such an
  image has no DICOM copy, unless `--set view_position` says what it is. A code that is not in CID 4014 counts by its
  meaning ("cranio-caudal"); without one, and with words such as UNK, N/A or OTHER, no view is stated.
- Modality, body part and view are repeated in notes and sentences only where they are terms of the standard.
- A LUT of fewer entries than its descriptor states is refused; its entries are bytes only where it says 8 bits
  and there is one byte for each. Words of 8 bits that are cut short are refused, too.
- Of a header only numbers and defined terms are written that say what stored values mean, how large they are, and
  whether the image is lossy, partial, of an implant or annotated; of the LUT in use, its descriptor and data. Patient,
  private elements and free text (LUTExplanation, WindowCenterWidthExplanation, PartialViewDescription, …) never are.
  [data.md](data.md#de-identification) says what becomes of names, UIDs, dates and ages.
- BurnedInAnnotation must be stated in a mammogram For Presentation: where the source does not state it, nobody has
  looked, and copies say YES.
- A PNG seldom states its bit depth: white is the largest value of the fewest bits (8 at least) that hold its largest
  pixel, or of the type where the file has the chunk sBIT, which goes with values scaled to the whole type.
- **Lossy JPEG of 12 bits** is refused: the freely licensed decoder at hand (GDCM) ends the whole process over some
  damaged frames. dcmtk's `dcmdjpeg` converts such files.
- Overlays, in unused bits or beside the pixels, are not part of the image and not written.

| | file | result | dcmtk |
|---|---|---|---|
"""


def make_document() -> str:
    """The whole document, with `UNKNOWN` in the last column where dcmtk is absent or of another version."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_row(case, Path(folder) / "image.dcm") for case in CASES]
    shown = [group if group != before else "" for before, group in pairwise(["", *(case.group for case in CASES)])]
    return INTRODUCTION + "".join(f"| {group} | {row} |\n" for group, row in zip(shown, rows, strict=True))


def _row(case: Case, path: Path) -> str:
    path.write_bytes(case.build())
    try:
        mammogram = read_mammogram(path)
    except GBCIError as error:
        return f"{case.name} | refused: {str(error).removeprefix(f'{path}: ')} | "
    return f"{case.name} | {'; '.join(['read', *_notes(mammogram)])} | {_difference(case, path, mammogram)}"


def _notes(mammogram: Mammogram) -> list[str]:
    notes = list(mammogram.notes)
    if mammogram.shape[0] >= 128:  # a picture of a breast
        contradiction = side_contradiction(mammogram.laterality, chest_wall_side(breast_mask(mammogram.unit())))
        notes += [contradiction] if contradiction else []
    return notes


def _difference(case: Case, path: Path, mammogram: Mammogram) -> str:
    if not case.second:
        return "-"
    if second.version() != DCMTK:
        return UNKNOWN
    return str(second.difference(mammogram.unit(), second.render(path, *case.second), case.padding))
