"""What a job publishes of its inputs: pseudonyms unless it is told to keep identifiers; the key stays in job.json."""

import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from datetime import datetime, timedelta

import pandas as pd
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.uid import DigitalXRayImageStorageForPresentation, SecondaryCaptureImageStorage

from gbci_fast.data.deidentify import Deidentifier, KeptIdentifiers
from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError, InputWarning, without_values
from gbci_fast.generate.identities import Identities, derive_key, job_identities
from gbci_fast.generate.sinks.dicom import NOT_LOOKED_AT

KEPT = Identities(KeptIdentifiers())
DICOM = {"formats": ("dicom",)}


def patient_file(template, path, **elements):
    """A copy of a template with a header that identifies the patient."""
    dataset = dcmread(template)
    values = {
        "PatientName": "Roe^Richard",
        "PatientID": "MRN-4711",
        "PatientAge": "093Y",
        "StudyDate": "20150310",
        "StudyTime": "101500",
        "StudyInstanceUID": "1.2.826.0.4711.1",
        "SOPInstanceUID": "1.2.826.0.4711.2",
        "BurnedInAnnotation": "NO",
    }
    for keyword, value in (values | elements).items():
        setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
    return path


@pytest.fixture
def clinic(templates, tmp_path):
    """A plain folder whose names and headers identify a patient with two studies, and a PNG."""
    folder = tmp_path / "richard-roe"
    first = {"StudyInstanceUID": "1.2.826.0.4711.1", "SOPInstanceUID": "1.2.826.0.4711.2"}
    second = {"StudyInstanceUID": "1.2.826.0.4711.3", "SOPInstanceUID": "1.2.826.0.4711.4"}
    second |= {"StudyDate": "20160311", "StudyTime": "090000"}
    patient_file(templates / "full_LCC.dcm", folder / "Roe_Richard_2015" / "roe_LCC.dcm", **first)
    patient_file(templates / "full_LCC.dcm", folder / "Roe_Richard_2016" / "roe_LCC.dcm", **second)
    shutil.copy(templates / "eight_LCC.png", folder / "Richard.Roe_LCC.png")
    return folder


def headers_of(output):
    images = pd.read_parquet(output / "manifest.parquet").sort_values("index")
    return [dcmread(output / name, stop_before_pixels=True) for name in images.dicom_file]


def published(output):
    """Everything but job.json as text: names, file contents, shards' members, headers, the manifest."""
    texts = [pd.read_parquet(output / "manifest.parquet").to_csv()]
    for path in sorted(output.rglob("*")):
        texts.append(str(path.relative_to(output)))
        if path.is_file() and path.name != "job.json":
            texts.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".dicom":
            texts.append(str(dcmread(path)))
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                texts += [tar.extractfile(member).read().decode("latin-1") for member in tar.getmembers()]
    return "\n".join(texts).lower()


def test_nothing_that_is_published_names_a_patient(make_job, clinic, tmp_path):
    bad = clinic / "Roe_Richard_2017" / "roe_RCC.dcm"
    bad.parent.mkdir()
    bad.write_bytes((clinic / "Roe_Richard_2016" / "roe_LCC.dcm").read_bytes()[:3000])
    output = tmp_path / "data"
    plan = make_job(clinic, output, skip_bad=True, settings={"formats": ("dicom", "png", "webdataset")})
    text = published(output)
    secrets = ["richard", "roe_", "roe^", "mrn-4711", "1.2.826.0.4711", "20150310", "20160311", "093y", "93.0"]
    assert [secret for secret in secrets if secret in text] == []
    # Nor can a guess be tested: there is no plain digest of a name or an id, with or without the public seed.
    guesses = ["MRN-4711", "patient\x1fMRN-4711", "Roe_Richard_2015", "study\x1f0\x1f0\x1fRoe_Richard_2015", "roe_LCC"]
    for guess in guesses:
        assert hashlib.sha256(guess.encode()).hexdigest()[:12] not in text, guess
    manifest = pd.read_parquet(output / "manifest.parquet")
    assert manifest.study_id.tolist() == [item.study_id for item in plan if item.index in set(manifest["index"])]
    assert manifest.template_file.str.fullmatch(r"[0-9a-f]{16}\.(dcm|png)").all()
    assert manifest.template_image_id.tolist() == [name.split(".")[0] for name in manifest.template_file]
    # The studies of one patient stay together; the PNG, which names no patient, counts as another one.
    by_file = manifest.groupby(manifest.template_file.str[-3:]).template_patient_id.nunique()
    assert (by_file.dcm, by_file.png, manifest.template_patient_id.nunique()) == (1, 1, 2)
    skipped = pd.read_csv(output / "skipped.csv")
    job = json.loads((output / "job.json").read_text())
    assert job["templates"][skipped.file[0].removesuffix(".dcm")] == "Roe_Richard_2017/roe_RCC.dcm"
    assert stat.S_IMODE((output / "job.json").stat().st_mode) == 0o600


def test_dates_move_together_and_old_ages_are_one(make_job, clinic, tmp_path):
    (clinic / "Richard.Roe_LCC.png").unlink()
    make_job(clinic, tmp_path / "data", settings=DICOM)
    first, second = headers_of(tmp_path / "data")
    when = [datetime.strptime(each.StudyDate + each.StudyTime, "%Y%m%d%H%M%S") for each in (first, second)]
    assert when[1] - when[0] == datetime(2016, 3, 11, 9) - datetime(2015, 3, 10, 10, 15)
    assert timedelta(0) < datetime(2015, 3, 10, 10, 15) - when[0] <= timedelta(days=3650)
    assert first.PatientID == second.PatientID
    assert first.StudyInstanceUID != second.StudyInstanceUID
    for header in (first, second):
        assert (header.PatientAge, header.LongitudinalTemporalInformationModified) == ("090Y", "MODIFIED")
        assert header.PatientIdentityRemoved == "YES"
        codes = [item.CodeValue for item in header.DeidentificationMethodCodeSequence]
        assert codes == ["113100", "113107", "113108"]
    assert [image.attributes.age for image in VinDr(tmp_path / "data").images] == [90, 90]


@pytest.mark.parametrize(
    ("date", "time", "expected"),
    [
        ("20150310", "1015", datetime(2015, 3, 10, 10, 15)),
        ("2015.03.10", "10:15:07.5", datetime(2015, 3, 10, 10, 15, 7)),
        ("20150310", "at noon", datetime(2015, 3, 10)),
        ("20150231", "1015", None),
        ("", "1015", None),
    ],
)
def test_a_date_that_is_none_is_invented(make_job, templates, tmp_path, date, time, expected):
    path = tmp_path / "in" / "x_LCC.dcm"
    dataset = dcmread(patient_file(templates / "full_LCC.dcm", path))
    dataset.add_new("StudyDate", "LO", date)
    dataset.add_new("StudyTime", "LO", time)
    dataset.save_as(path)
    make_job(path, tmp_path / "data", settings=DICOM, identities=KEPT)
    (header,) = headers_of(tmp_path / "data")
    written = datetime.strptime(header.StudyDate + header.StudyTime, "%Y%m%d%H%M%S")
    assert header.LongitudinalTemporalInformationModified == ("REMOVED" if expected is None else "UNMODIFIED")
    assert (written == expected) == (expected is not None)


def test_text_in_the_pixels_that_nobody_ruled_out_is_noted(make_job, templates, tmp_path):
    patient_file(templates / "full_LCC.dcm", tmp_path / "in" / "open_LCC.dcm", BurnedInAnnotation="")
    patient_file(templates / "full_LCC.dcm", tmp_path / "in" / "clear_LCC.dcm", SOPInstanceUID="1.2.3")
    shutil.copy(templates / "eight_LCC.png", tmp_path / "in" / "png_LCC.png")
    make_job(tmp_path / "in", tmp_path / "data", settings={"batch_size": 3, **DICOM})
    notes = pd.read_parquet(tmp_path / "data" / "manifest.parquet").sort_values("index").template_notes
    assert [NOT_LOOKED_AT in note for note in notes] == [False, True, True]  # clear, open, png
    removed = [header.PatientIdentityRemoved for header in headers_of(tmp_path / "data")]
    assert removed == ["YES", "NO", "NO"]
    assert ["DeidentificationMethod" in header for header in headers_of(tmp_path / "data")] == [True, False, False]
    make_job(tmp_path / "in", tmp_path / "png", settings={"formats": ("png",)})
    assert not pd.read_parquet(tmp_path / "png" / "manifest.parquet").template_notes.str.contains("ruled").any()


def test_ids_of_tables_stay_and_join(make_job, phantom, finished):
    """Ids of tables are pseudonyms already; UIDs in the files are not."""
    originals = {record.image_id: record for record in VinDr(phantom).images}
    manifest = pd.read_parquet(finished / "manifest.parquet").sort_values("index")
    for row, header in zip(manifest.itertuples(), headers_of(finished), strict=True):
        original = originals[row.template_image_id]
        assert (row.template_study_id, row.template_patient_id) == (original.study_id, original.patient)
        assert row.template_file == original.path.name
        (source,) = header.SourceImageSequence
        assert source.ReferencedSOPInstanceUID != original.read().dataset.SOPInstanceUID
    # The reference is the same in every variant, so that copies of one source can be told.
    paths = {record.path for record in originals.values()}
    uid = job_identities(finished, 0, paths).names.uid(original.read().dataset.SOPInstanceUID)
    assert source.ReferencedSOPInstanceUID == uid


def test_old_ages_of_tables_and_of_their_findings(make_job, phantom, tmp_path):
    root = shutil.copytree(phantom, tmp_path / "root")
    table = pd.read_csv(root / "breast-level_annotations.csv", dtype=str).assign(age="97")
    table.to_csv(root / "breast-level_annotations.csv", index=False)
    make_job(root, tmp_path / "data", settings={"formats": ("png",)})
    manifest = pd.read_parquet(tmp_path / "data" / "manifest.parquet")
    ages = [json.loads(text)["age"] for text in manifest.attributes]
    ages += [finding["attributes"]["age"] for text in manifest.template_findings for finding in json.loads(text)]
    assert ages == [90.0] * 6


def test_kept_identifiers(make_job, clinic, tmp_path):
    make_job(clinic, tmp_path / "data", settings=DICOM, identities=KEPT)
    manifest = pd.read_parquet(tmp_path / "data" / "manifest.parquet").sort_values("index")
    # A folder of files of several patients: who they are of is a plain digest of PatientID, as for `prepare`.
    records = {record.image_id: record for record in find_inputs(clinic)}
    for row in manifest.itertuples():
        record = records[row.template_image_id]
        assert (row.template_study_id, row.template_file) == (record.study_id, record.path.name)
        assert row.template_patient_id == record.patient_in(record.read())
    assert "roe_LCC" in records
    header = headers_of(tmp_path / "data")[1]
    assert header.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.826.0.4711.2"
    assert (header.PatientAge, header.StudyDate, header.StudyTime) == ("093Y", "20150310", "101500")
    assert (header.PatientName, header.PatientIdentityRemoved) == ("Anonymous", "NO")
    assert json.loads((tmp_path / "data" / "job.json").read_text())["identity_key"] is None


def test_the_key_of_a_job_outlives_its_inputs(make_job, clinic, tmp_path, stop_after):
    make_job(clinic, tmp_path / "whole", settings={"batch_size": 1})
    with pytest.raises(KeyboardInterrupt):
        make_job(clinic, tmp_path / "cut", settings={"batch_size": 1}, on_batch=stop_after(1))
    (first, *_) = find_inputs(clinic)
    first.path.write_bytes(first.path.read_bytes() + b"\0\0")
    make_job(clinic, tmp_path / "cut", settings={"batch_size": 1}, resume=True)
    whole, cut = (pd.read_parquet(tmp_path / name / "manifest.parquet") for name in ("whole", "cut"))
    for column in ("image_id", "study_id", "template_image_id", "template_patient_id"):
        assert cut[column].tolist() == whole[column].tolist()
    assert (cut.template_sha256 != whole.template_sha256).tolist() == [True, False, False]
    other = Identities(Deidentifier(b"another key of 16"))
    for identities in (other, KEPT):
        with pytest.raises(GBCIError, match=r"holds another job: .*identity_key"):
            make_job(clinic, tmp_path / "cut", settings={"batch_size": 1}, resume=True, identities=identities)


def test_a_key_file_gives_one_patient_one_pseudonym(make_job, templates, tmp_path):
    (tmp_path / "key").write_bytes(bytes(range(16)))
    patients = {}
    for number, name in enumerate(("north", "south")):
        patient_file(templates / "full_LCC.dcm", tmp_path / name / "x_LCC.dcm", SOPInstanceUID=f"1.2.{number}")
        for kind, options in (("file", {"key_file": tmp_path / "key"}), ("content", {})):
            output = tmp_path / f"{name} {kind}"
            identities = job_identities(output, number, [tmp_path / name / "x_LCC.dcm"], **options)
            make_job(tmp_path / name, output, seed=number, settings=DICOM, identities=identities)
            (patients[name, kind],) = pd.read_parquet(output / "manifest.parquet").template_patient_id
    assert patients["north", "file"] == patients["south", "file"]
    assert len(set(patients.values())) == 3


def test_a_key_follows_from_seed_names_and_content_of_every_input(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path in paths[:2]:
        path.write_bytes(path.name.encode() * 50000)
    os.mkfifo(paths[2])  # a pipe, which would block a reader
    keys = [derive_key(0, paths), derive_key(1, paths), derive_key(0, paths[:2])]
    assert derive_key(0, reversed(paths)) == keys[0]
    whole = paths[0].read_bytes()
    for content in (whole[:-1], whole[:60000] + b"!" + whole[60001:], whole[::-1]):
        paths[0].write_bytes(content)
        keys.append(derive_key(0, paths))
    paths[0].write_bytes(whole)
    assert derive_key(0, paths) == keys[0]
    paths[0] = paths[0].rename(tmp_path / "d.png")
    keys.append(derive_key(0, paths))
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(bytes(15), "key has 15 bytes; expected at least 16 as the key"), (None, "key is not a file; expected one")],
)
def test_a_key_that_is_none_is_refused(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(GBCIError, match=sentence):
        job_identities(tmp_path / "data", 0, [], key_file=tmp_path / "key")


def test_a_mask_file_is_not_named_either(make_job, templates, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("eight", "sixteen"):
        shutil.copy(templates / f"{name}_LCC.png", tmp_path / "in")
    with Image.open(tmp_path / "in" / "sixteen_LCC.png") as image:
        size = image.size
    larger = Image.new("I;16", (size[0] + 1, size[1]))
    larger.paste(Image.open(tmp_path / "in" / "sixteen_LCC.png"), (0, 0))
    larger.save(tmp_path / "in" / "sixteen_LCC.png")
    mask, content = Image.new("L", size), io.BytesIO()
    mask.paste(255, (20, 60, 60, 100))
    mask.save(content, format="PNG")
    (tmp_path / "roe_mask.png").write_bytes(content.getvalue())
    make_job(tmp_path / "in", tmp_path / "data", mask=str(tmp_path / "roe_mask.png"), skip_bad=True)
    (row,) = pd.read_csv(tmp_path / "data" / "skipped.csv").itertuples()
    assert row.reason.startswith("the mask file is ")
    assert "roe" not in row.reason


STATED = {
    "a number": ("WindowCenter", "LO", "Jane Doe", "WindowCenter is ...; expected numbers with a decimal point"),
    "an apostrophe": ("WindowCenter", "LO", "O'Doe \"J", "WindowCenter is ...; expected numbers with a decimal point"),
    "a term": ("VOILUTFunction", "LO", "Jane Doe", "VOILUTFunction is ...; expected LINEAR, LINEAR_EXACT or SIGMOID"),
    "a number without quotation marks": (
        "BitsAllocated",
        "LO",
        "Jane Doe",
        "BitsAllocated, BitsStored and HighBit are ...",
    ),
    "a decoder's words": ("Rows", "LO", "Jane Doe", "damaged or not decodable ..."),
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize(("keyword", "representation", "value", "reason"), STATED.values(), ids=STATED)
def test_a_reason_tells_nothing_that_a_header_states(
    make_job, templates, tmp_path, keyword, representation, value, reason
):
    bad = patient_file(templates / "full_LCC.dcm", tmp_path / "in" / "bad_LCC.dcm", SOPInstanceUID="1.2.3")
    dataset = dcmread(bad)
    dataset.WindowCenter = dataset.WindowWidth = 30000
    dataset.add_new(keyword, representation, value)
    dataset.save_as(bad)
    patient_file(templates / "full_LCC.dcm", tmp_path / "in" / "good_LCC.dcm")
    with pytest.warns(InputWarning, match="bad_LCC.dcm: .*: skipped") as notes:
        make_job(tmp_path / "in", tmp_path / "data", settings=DICOM, skip_bad=True)
    assert len(notes) == 1
    (row,) = pd.read_csv(tmp_path / "data" / "skipped.csv").itertuples()
    assert row.reason.startswith(reason)
    assert "doe" not in published(tmp_path / "data")
    make_job(tmp_path / "in", tmp_path / "kept", settings=DICOM, skip_bad=True, identities=KEPT)
    (row,) = pd.read_csv(tmp_path / "kept" / "skipped.csv").itertuples()
    assert "..." not in row.reason


KEYWORDS = (
    "BitsAllocated", "BitsStored", "BodyPartExamined", "Columns", "EstimatedRadiographicMagnificationFactor", "HighBit",
    "ImageType", "ImagerPixelSpacing", "Modality", "ModalityLUTSequence", "NumberOfFrames", "PatientAge",
    "PhotometricInterpretation", "PixelAspectRatio", "PixelPaddingRangeLimit", "PixelPaddingValue",
    "PixelRepresentation", "PixelSpacing", "RescaleIntercept", "RescaleSlope", "Rows", "SOPClassUID",
    "SamplesPerPixel", "SharedFunctionalGroupsSequence", "SpecificCharacterSet", "VOILUTFunction", "VOILUTSequence",
    "ViewCodeSequence", "WindowCenter", "WindowWidth",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("modality", ["MG", "CR"])
def test_whatever_a_header_states_no_reason_tells_it(templates, tmp_path, modality):
    reasons = []
    for keyword in KEYWORDS:
        dataset = dcmread(templates / "windowed_LCC.dcm")
        dataset.Modality, dataset.ViewPosition = modality, ""
        dataset.add_new(keyword, "LO", "TOMO Jane Doe")
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=False)
        try:
            read_mammogram(tmp_path / "a.dcm")
        except GBCIError as error:
            reasons.append(without_values(str(error)))
    assert len(reasons) > len(KEYWORDS) / 2
    assert [reason for reason in reasons if "doe" in reason.lower()] == []


@pytest.mark.parametrize(
    ("stated", "written"),
    [
        ("1.2.826.0.1.3680043.4711", SecondaryCaptureImageStorage),  # a private class, which may identify its maker
        (DigitalXRayImageStorageForPresentation, DigitalXRayImageStorageForPresentation),
    ],
)
def test_a_class_that_the_standard_does_not_know_is_not_copied(make_job, templates, tmp_path, stated, written):
    path = patient_file(templates / "full_LCC.dcm", tmp_path / "in" / "x_LCC.dcm", SOPClassUID=stated)
    make_job(path, tmp_path / "data", settings=DICOM)
    (header,) = headers_of(tmp_path / "data")
    assert header.SourceImageSequence[0].ReferencedSOPClassUID == written
    assert "3680043.4711" not in published(tmp_path / "data")


@pytest.mark.parametrize("folder", ["masks", "finding_masks"])
@pytest.mark.parametrize("identities", [None, KEPT], ids=["removed", "kept"])
def test_a_reason_tells_no_path_of_the_machine(make_job, phantom, tmp_path, folder, identities):
    root = shutil.copytree(phantom, tmp_path / "roe" / "root")
    record = next(record for record in VinDr(root).images if record.findings)
    (first,) = (root / folder / record.study_id).glob(f"{record.image_id}*.png")
    Image.new("L", (3, 2), 255).save(first)
    make_job(root, tmp_path / "data", skip_bad=True, identities=identities, settings={"formats": ("png",)})
    (row,) = pd.read_csv(tmp_path / "data" / "skipped.csv").itertuples()
    assert row.reason == f"{first.relative_to(root)} is 3x2; expected the image's 160x192"


@pytest.mark.parametrize(
    ("sentence", "published"),
    [
        ("the image's view is 'Jane'; expected Doe'; expected CC", "the image's view is ...; expected CC"),
        ("Modality is JANE; DOE (1950) and 5; expected MG (or CR)", "Modality is ...; expected MG (or CR)"),
        ("A of 'Jane [...] Doe; or", "A of ..."),
        ("damaged or not decodable (Jane) (Doe); cut short", "damaged or not decodable ..."),
        ("Bits are 8 and Jane; expected 8", "Bits are ...; expected 8"),
        ("masks/s/i.png is 3x2; expected the image's 160x192", "masks/s/i.png is 3x2; expected the image's 160x192"),
        ("the box (1.0, 2.5, 3, 4) lies outside the image", "the box (1.0, 2.5, 3, 4) lies outside the image"),
        ("view is CC and side unknown; DICOM needs both", "view is CC and side unknown; DICOM needs both"),
        ("a.dcm is a link that leads nowhere", "a.dcm is a link that leads nowhere"),
        ("this is ^Jane", "this is ..."),
        ("this is 5; Jane; expected 6", "this is ...; expected 6"),
        ("the image has 3 rows; expected 4", "the image has 3 rows; expected 4"),
    ],
)
def test_without_values(sentence, published):
    assert without_values(sentence) == published


def test_pseudonyms():
    names, other = Deidentifier(bytes(32)), Deidentifier(bytes(31) + b"\1")
    assert "0000" not in repr(names)  # nor is the key in a traceback
    assert names.patient("a") == names.patient("a") != names.name("a")
    for ours, theirs in ((names.name("a"), other.name("a")), (names.uid("1.2"), other.uid("1.2"))):
        assert ours != theirs
    assert names.shift("a") == names.shift("a") != names.shift("b")
    assert names.uid("1.2").startswith("2.25.")
    assert len(names.uid("1.2")) <= 64
    assert names.uid("") == ""
    assert [names.age(years) for years in (None, 0.5, 89.0, 89.5, 90.0, 104.0)] == [None, 0.5, 89.0, 90, 90, 90]
    assert KeptIdentifiers().age(104.0) == 104.0
