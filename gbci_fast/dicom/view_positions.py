"""View (CC, MLO) and side (L, R) of a mammogram, from DICOM attributes or from free text such as a file name."""

import re
from collections.abc import Callable, Iterable

from pydicom import Dataset

from gbci_fast.attributes import VIEW_POSITIONS, is_unknown
from gbci_fast.dicom.file import code_string

# PS3.16 CID 4014 "View for Mammography": ViewPosition, SNOMED CT, the retired SNOMED-RT code of older files, meanings.
MAMMOGRAPHY_VIEWS = (
    ("CC", "399162004", "R-10242", "cranio-caudal"),
    ("MLO", "399368009", "R-10226", "medio-lateral oblique", "medial-lateral oblique"),
    ("ML", "399260004", "R-10224", "medio-lateral", "medial-lateral"),
    ("LM", "399352003", "R-10228", "latero-medial", "lateral-medial"),
    ("LMO", "399099002", "R-10230", "latero-medial oblique", "lateral-medial oblique"),
    ("FB", "399196006", "R-10244", "caudo-cranial", "from below"),
    ("SIO", "399188001", "R-102D0", "superolateral to inferomedial oblique"),
    ("ISO", "441555000", "R-40AAA", "inferomedial to superolateral oblique"),
    ("XCC", "", "", "cranio-caudal exaggerated", "exaggerated cranio-caudal"),
    ("XCCL", "399192008", "R-1024A", "cranio-caudal exaggerated laterally", "exaggerated cranio-caudal laterally"),
    ("XCCM", "399101009", "R-1024B", "cranio-caudal exaggerated medially", "exaggerated cranio-caudal medially"),
    ("SPECIMEN", "127457009", "G-8310", "tissue specimen from breast"),
)
# PS3.16 CID 4010 "DX View": views of other parts of the body.
BODY_VIEWS = (
    ("AP", "399348003", "R-10206", "antero-posterior"),
    ("PA", "272479007", "R-10214", "postero-anterior"),
    ("LL", "399173006", "R-10236"),
    ("RL", "399198007", "R-10232"),
    ("LAO", "399135007", "R-10220", "left anterior oblique"),
    ("RAO", "399356000", "R-40985", "right anterior oblique"),
    ("LPO", "399006002", "R-10212", "left posterior oblique"),
    ("RPO", "399038007", "R-10210", "right posterior oblique"),
    *(("LLD",), ("RLD",), ("LLO",), ("RLO",)),
)
# Views of either context: a breast may be imaged from the side, too.
_OTHER_VIEWS = (("LAT", "399067008", "R-102CD", "lateral"), ("OBL", "399182000", "R-102C1", "oblique"))
_NAMED_VIEWS = (*MAMMOGRAPHY_VIEWS, *BODY_VIEWS, *_OTHER_VIEWS)
VIEW_CODES = {code: name for name, *rest in _NAMED_VIEWS for code in rest[:2] if code}
UNKNOWN_TERM = "(not a known term)"
# Values of ViewPosition that mean unknown, besides `attributes.UNKNOWN_TEXT`.
_NO_VIEW = ("U", "UNK", "N/A", "NA", "OTHER", "UNDEFINED", "UNSPECIFIED", "NOT SPECIFIED", "NOT AVAILABLE", "-", "?")
# PS3.16 CID 4015 "View Modifier for Mammography": SNOMED CT, retired SNOMED-RT, meaning.
VIEW_MODIFIERS = (
    ("399163009", "R-102D6", "Magnification"),
    ("399055006", "R-102D7", "Spot Compression"),
    ("399209000", "R-102D5", "Implant Displaced"),
    ("399161006", "R-102D2", "Cleavage"),
    ("399011000", "R-102D1", "Axillary Tail"),
    ("442580003", "R-40AB2", "Axillary tissue"),
    ("399197002", "R-102D3", "Rolled Lateral"),
    ("399226006", "R-102D4", "Rolled Medial"),
    ("415670009", "R-102C9", "Rolled Superior"),
    ("414493004", "R-102CA", "Rolled Inferior"),
    ("399110001", "R-102C2", "tangential"),
    ("441752004", "P2-00161", "Anterior compression"),
    ("442581004", "R-40AB3", "Nipple in profile"),
    ("442593008", "R-40ABE", "Infra-mammary fold"),
)
MAGNIFICATION = VIEW_MODIFIERS[0][::2]
# Second value of PatientOrientation (PS3.3 C.7.6.1.1.1), the direction of the columns, by view and side.
DOWN_COLUMNS = {("CC", "L"): "R", ("CC", "R"): "L", ("MLO", "L"): "FR", ("MLO", "R"): "FL"}

_SIDE = r"(?:LEFT|RIGHT|LT|RT|L|R)"
_VIEW = r"(?:CC|MLO)"
# LCC, L_CC, LEFT-MLO, LeftMLO; CC_L, MLO-RIGHT; or the view by itself.
_VIEW_TOKEN = re.compile(rf"(?<![A-Z0-9]){_SIDE}?({_VIEW})(?![A-Z0-9])")
# A single letter is a side only next to a view: "Dr_R_Smith" names none. LEFT and RIGHT count anywhere.
_SIDE_TOKENS = (
    re.compile(rf"(?<![A-Z0-9])({_SIDE})[^A-Z0-9]*{_VIEW}(?![A-Z0-9])"),
    re.compile(rf"(?<![A-Z0-9]){_VIEW}[^A-Z0-9]*({_SIDE})(?![A-Z0-9])"),
    re.compile(r"(?<![A-Z0-9])(LEFT|RIGHT)(?![A-Z0-9])"),
)
# Names and meanings that have to be the whole text. Only its letters are compared.
_WHOLE_NAMES = {re.sub(r"[^A-Z]", "", text.upper()): name for name, *rest in _NAMED_VIEWS for text in (name, *rest[2:])}
_WHOLE_NAME = re.compile(rf"{_SIDE}?({'|'.join(sorted(_WHOLE_NAMES, key=len, reverse=True))}){_SIDE}?")
_VIEW_OR_SIDE = re.compile(
    rf"(?<![A-Z0-9])(?:{_SIDE}?[^A-Z0-9]*{_VIEW}|{_VIEW}[^A-Z0-9]*{_SIDE}|LEFT|RIGHT)(?![A-Z0-9])"
)


def view_in_text(text: str) -> str | None:
    """``"CC"`` or ``"MLO"`` if the text names exactly one of them, as in ``P_1_LEFT_MLO`` or ``RCC``; else ``None``."""
    return _only(_VIEW_TOKEN.findall(text.upper()))


def laterality_in_text(text: str) -> str | None:
    """``"L"`` or ``"R"`` if the text names exactly one side, as in ``P_1_LEFT_MLO`` or ``RCC``; else ``None``."""
    return _only(match[0] for pattern in _SIDE_TOKENS for match in pattern.findall(text.upper()))


def without_view(text: str) -> str:
    """The text in capitals without views and sides, which a PatientID such as CBIS-DDSM's ``P_1_LEFT_MLO`` contains."""
    return _VIEW_OR_SIDE.sub("", text.upper()).strip(" _-")


def view_position(dataset: Dataset, file_stem: str) -> str | None:
    """``"CC"`` or ``"MLO"``, from the first source that states a view; ``None`` if unknown or another view.

    The sources are ViewPosition, ViewCodeSequence, PatientOrientation, then free text: SeriesDescription, PatientID and
    ``file_stem``. If the header states another view (ML, XCCL, …; see `other_view`), free text does not replace it.
    """
    if stated := stated_view(dataset):
        return stated if stated in VIEW_POSITIONS else None
    return _orientation(dataset)[0] or _from_text(view_in_text, dataset, file_stem)


def other_view(dataset: Dataset) -> str | None:
    """The view that a header states if it is neither CC nor MLO, such as "ML" or `UNKNOWN_TERM`; else ``None``.

    It takes precedence over any view that a file name or a table states.
    """
    stated = stated_view(dataset)
    return None if stated in VIEW_POSITIONS else stated


def stated_view(dataset: Dataset) -> str | None:
    """The view in ViewPosition, or else in ViewCodeSequence, as the standard's term; ``None`` where none is stated.

    A code outside `VIEW_CODES` counts if its meaning names a view. Any other text in ViewPosition becomes
    `UNKNOWN_TERM` and is not quoted, because it may identify a patient.
    """
    position = code_string(dataset, "ViewPosition")
    stated = not is_unknown(position) and position not in _NO_VIEW
    if stated and (name := named_view(position)):
        return name
    if codes := dataset.get("ViewCodeSequence"):
        code, meaning = (str(codes[0].get(keyword) or "").strip() for keyword in ("CodeValue", "CodeMeaning"))
        if name := VIEW_CODES.get(code) or named_view(meaning):
            return name
    return UNKNOWN_TERM if stated else None


def named_view(text: str) -> str | None:
    """The standard's term of the view that a text names, with or without a side, such as "XCCL" for RXCCL; or ``None``.

    The standard's names, such as "cranio-caudal", count only as the whole text. Within a longer text only CC and MLO
    count.
    """
    whole = _WHOLE_NAME.fullmatch(re.sub(r"[^A-Z]", "", text.upper()))
    return _WHOLE_NAMES[whole[1]] if whole else view_in_text(text)


def laterality(dataset: Dataset, file_stem: str) -> str | None:
    """``"L"`` or ``"R"``, from the first source that states a side; ``None`` if unknown.

    The sources are ImageLaterality, FrameLaterality (enhanced images), Laterality, PatientOrientation, then free text
    as in `view_position`.
    """
    for keyword in ("ImageLaterality", "FrameLaterality", "Laterality"):
        if (stated := code_string(dataset, keyword)) in ("L", "R"):
            return stated
    return _orientation(dataset)[1] or _from_text(laterality_in_text, dataset, file_stem)


def view_modifiers(dataset: Dataset) -> list[tuple[str, str]]:
    """(SNOMED CT code, meaning) of each known item of ViewModifierCodeSequence, in the order of the file."""
    known = {code: (sct, meaning) for sct, srt, meaning in VIEW_MODIFIERS for code in (sct, srt)}
    views = dataset.get("ViewCodeSequence")
    # The sequence belongs inside the item of ViewCodeSequence (PS3.3 C.8.11.7); some files have it at the top level.
    items = (*((views[0].get("ViewModifierCodeSequence") or ()) if views else ()),
             *(dataset.get("ViewModifierCodeSequence") or ()))  # fmt: skip
    codes = (str(item.get("CodeValue", "")).strip() for item in items)
    return list(dict.fromkeys(known[code] for code in codes if code in known))


def _orientation(dataset: Dataset) -> tuple[str | None, str | None]:
    """View and side from PatientOrientation (PS3.3 C.7.6.1.1.1), whose second value is the direction of the columns.

    The columns of a left CC view lead to the patient's right (``A\\R``), those of a left MLO view to foot and right
    (``A\\FR``). Some files hold the name of the view there instead.
    """
    value = dataset.get("PatientOrientation") or ""
    values = [value] if isinstance(value, str) else [str(part) for part in value]
    values = [part.strip().upper() for part in values]
    if len(values) == 1:
        return view_in_text(values[0]), laterality_in_text(values[0])
    if len(values) != 2 or values[0] not in ("A", "P"):
        return None, None
    return next((stated for stated, down in DOWN_COLUMNS.items() if down == values[1]), (None, None))


def _from_text(parse: Callable[[str], str | None], dataset: Dataset, file_stem: str) -> str | None:
    texts = [str(dataset.get(keyword) or "") for keyword in ("SeriesDescription", "PatientID")]
    return next((found for text in (*texts, file_stem) if (found := parse(text))), None)


def _only(found: Iterable[str]) -> str | None:
    values = set(found)
    return values.pop() if len(values) == 1 else None
