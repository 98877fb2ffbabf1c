"""The VinDr-Mammo tables as records."""

import os

import numpy as np
import pytest
from PIL import Image

from gbci_fast.attributes import Attributes
from gbci_fast.data.fields import lesion_truth
from gbci_fast.data.vindr import BREAST_TABLE, FINDING_TABLE, IMAGE_COLUMNS, VinDr, find_inputs
from gbci_fast.errors import GBCIError, InputWarning

# What differs from the sample row of `make_root`.
HEALTHY = {"finding_categories": "['No Finding']"} | dict.fromkeys(
    ("finding_birads", "xmin", "ymin", "xmax", "ymax"), ""
)


# Reading ------------------------------------------------------------------------------------------------------------


def test_one_image_with_one_finding(make_root):
    root = make_root(findings=[{}])
    (image,) = VinDr(root).images
    assert (image.study_id, image.series_id, image.image_id, image.split) == ("s1", "e1", "i1", "training")
    assert (image.laterality, image.view_position, image.height, image.width) == ("L", "CC", 100, 80)
    assert image.path == root / "images" / "s1" / "i1.dicom"
    known = {"laterality": "L", "view_position": "CC", "breast_density": "C", "breast_birads": 2}
    assert image.attributes == Attributes(**known)
    (finding,) = image.findings
    assert finding.box == (10.0, 20.5, 30.0, 40.0)
    assert finding.attributes == Attributes(**known, finding_categories=("Mass",), finding_birads=4)


def test_several_findings_of_several_categories_go_to_their_images(make_root):
    root = make_root(
        breast=[{}, {"image_id": "i2"}, {"image_id": "i3"}],
        findings=[
            {"image_id": "i2", "finding_categories": "['Suspicious Calcification', 'Mass']"},
            {},
            {"image_id": "i2", "finding_categories": "['Asymmetry']", "xmin": "0"},
        ],
    )
    first, second, third = VinDr(root).images
    assert [len(image.findings) for image in (first, second, third)] == [1, 2, 0]
    assert second.findings[0].attributes.finding_categories == ("Mass", "Suspicious Calcification")
    assert second.findings[1].box[0] == 0


def test_no_finding_is_knowledge_and_no_row_is_not(make_root):
    root = make_root(breast=[{}, {"image_id": "i2"}], findings=[HEALTHY])
    healthy, silent = VinDr(root).images
    assert healthy.findings == silent.findings == ()
    assert healthy.attributes.finding_categories == ()
    assert silent.attributes.finding_categories is None


def test_row_without_category_and_box_says_nothing(make_root):
    (image,) = VinDr(make_root(findings=[HEALTHY | {"finding_categories": ""}])).images
    assert image.findings == ()
    assert image.attributes.finding_categories is None


def test_box_without_category_is_a_finding_of_unknown_category(make_root):
    (image,) = VinDr(make_root(findings=[{"finding_categories": ""}])).images
    assert image.findings[0].attributes.finding_categories is None


def test_without_the_finding_table_nothing_is_known_of_findings(make_root):
    (image,) = VinDr(make_root()).images
    assert image.findings == ()
    assert image.attributes.finding_categories is None


def test_blanks_are_unknown(make_root):
    blank = dict.fromkeys(
        ("series_id", "laterality", "view_position", "height", "width", "breast_birads", "breast_density", "split"), ""
    )
    (image,) = VinDr(make_root(breast=[blank], findings=[{"finding_birads": ""}])).images
    assert (image.series_id, image.height, image.width, image.split) == (None, None, None, None)
    assert image.attributes == Attributes()
    assert image.findings[0].attributes == Attributes(finding_categories=("Mass",))


@pytest.mark.parametrize("text", ["BI-RADS 0", "BI-RADS 6", "6", "0.0"])
def test_birads_0_and_6_are_unknown(make_root, text):
    (image,) = VinDr(make_root(breast=[{"breast_birads": text}], findings=[{"finding_birads": text}])).images
    assert image.attributes.breast_birads is None
    assert image.findings[0].attributes.finding_birads is None


def test_extra_columns_are_kept_at_both_levels(make_root):
    row = {"pathology": "malignant", "report": "round mass, 9 mm", "source": ""}
    (image,) = VinDr(make_root(breast=[row], findings=[row | {"pathology": "benign"}], columns=list(row))).images
    assert image.extra == {"pathology": "malignant", "report": "round mass, 9 mm"}
    assert image.findings[0].extra == {"pathology": "benign", "report": "round mass, 9 mm"}


def test_age_is_understood(make_root):
    (image,) = VinDr(make_root(breast=[{"age": "51"}], findings=[{"age": "51"}], columns=["age"])).images
    assert image.attributes.age == image.findings[0].attributes.age == 51
    assert image.extra == {}


def test_boxes_are_clamped_and_counted(make_root):
    beyond = {"xmin": "-3", "ymin": "60", "xmax": "20", "ymax": "100.5"}
    data = VinDr(make_root(findings=[beyond, {}, {"xmax": "80", "ymax": "100", "xmin": "0", "ymin": "0"}]))
    assert [finding.box for finding in data.images[0].findings] == [
        (0, 60, 20, 100),
        (10, 20.5, 30, 40),
        (0, 0, 80, 100),
    ]
    assert data.clamped == 1


def test_splits(make_root):
    data = VinDr(make_root(breast=[{}, {"image_id": "i2", "split": "test"}, {"image_id": "i3", "split": ""}]))
    assert [image.image_id for image in data.of_split("training")] == ["i1"]
    assert [image.image_id for image in data.of_split("test")] == ["i2"]
    with pytest.raises(GBCIError, match="split is 'validation'; expected one of training, test"):
        data.of_split("validation")


def test_tables_from_a_spreadsheet(make_root):
    # Byte-order mark, carriage returns, spaces around names and values, blank lines.
    root = make_root()
    text = (root / BREAST_TABLE).read_text().replace("image_id", " image_id ").replace('"L"', '" L"')
    (root / BREAST_TABLE).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    (image,) = VinDr(root).images
    assert image.laterality == "L"


# Pixels -------------------------------------------------------------------------------------------------------------


def test_nothing_is_opened_until_asked(make_root, make_dicom):
    root = make_root(breast=[{}, {"image_id": "i2"}])
    (root / "images" / "s1").mkdir(parents=True)
    (root / "images" / "s1" / "i1.dicom").write_bytes(b"no image at all")
    data = VinDr(root)
    assert [image.image_id for image in data.missing()] == ["i2"]
    with pytest.raises(GBCIError, match=r"i1.dicom: neither DICOM nor PNG by its content"):
        data.images[0].read()
    with pytest.raises(GBCIError, match=r"i2.dicom: No such file"):
        data.images[1].read()


@pytest.mark.parametrize("suffix", ["dicom", "dcm", "png"])
def test_read_fills_in_view_and_side_where_the_header_has_none(make_root, make_dicom, suffix):
    root = make_root()
    stored = np.arange(8000, dtype=np.uint16).reshape(100, 80)
    (root / "images" / "s1").mkdir(parents=True)
    if suffix == "png":
        Image.fromarray(stored).save(root / "images" / "s1" / "i1.png")
    else:
        make_dicom(stored, name=f"images/s1/i1.{suffix}", ImageLaterality="R")
    mammogram = VinDr(root).images[0].read()
    np.testing.assert_array_equal(mammogram.stored, stored)
    assert (mammogram.view_position, mammogram.laterality) == ("CC", "L" if suffix == "png" else "R")


def test_image_of_another_size_than_the_table_states(make_root, make_dicom):
    root = make_root()
    (root / "images" / "s1").mkdir(parents=True)
    make_dicom(np.arange(2000, dtype=np.uint16).reshape(50, 40), name="images/s1/i1.dicom")
    with pytest.raises(GBCIError, match=r"i1.dicom has 50 rows and 40 columns; expected 100 and 80 as breast-level"):
        VinDr(root).images[0].read()


# Bad tables ---------------------------------------------------------------------------------------------------------


def failure(root):
    with pytest.raises(GBCIError) as caught:
        VinDr(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"laterality": "B"}, "laterality is 'B'; expected one of L, R"),
        ({"view_position": "ML"}, "view_position is 'ML'; expected one of CC, MLO"),
        ({"breast_density": "DENSITY E"}, "breast_density is 'E'; expected one of A, B, C, D"),
        ({"breast_birads": "BI-RADS 7"}, "breast_birads is 7; expected one of 1, 2, 3, 4, 5"),
        ({"breast_birads": "four"}, "breast_birads is 'four'; expected a BI-RADS category such as 'BI-RADS 4'"),
        ({"split": "validation"}, "split is 'validation'; expected one of training, test"),
        ({"height": "0"}, "height is '0'; expected a number of pixels"),
        ({"width": "8e1"}, "width is '8e1'; expected a number of pixels"),
        ({"image_id": "i1"}, "image_id 'i1' stands in the table twice"),
        ({"image_id": ""}, "image_id is ''; expected an identifier that is a plain file name"),
        ({"image_id": "../../etc/passwd"}, "image_id is '../../etc/passwd'; expected an identifier"),
        ({"image_id": "/etc/passwd"}, "image_id is '/etc/passwd'; expected an identifier"),
        ({"study_id": ".."}, "study_id is '..'; expected an identifier"),
        ({"study_id": "a\\b"}, r"study_id is 'a\\b'; expected an identifier"),
    ],
)
def test_breast_row(make_root, row, reason):
    root = make_root(breast=[{}, {"image_id": "i2"} | row])
    assert failure(root).startswith(f"{root / BREAST_TABLE}, line 3: {reason}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image_id": "i9"}, "image_id 'i9' does not stand in breast-level_annotations.csv"),
        ({"finding_categories": "['Lump']"}, "finding_categories is 'Lump'; expected one of Mass, "),
        ({"finding_categories": "['Mass'"}, "finding_categories is \"['Mass'\"; expected a list"),
        ({"finding_birads": "BI-RADS 9"}, "finding_birads is 9; expected one of 1, 2, 3, 4, 5"),
        ({"xmin": "30"}, "the box is (30, 20.5, 30, 40); expected numbers with xmin < xmax and ymin < ymax"),
        ({"ymax": ""}, "the box is (10, 20.5, 30, ); expected numbers"),
        ({"ymax": "inf"}, "the box is (10, 20.5, 30, inf); expected numbers"),
        ({"xmin": "left"}, "the box is (left, 20.5, 30, 40); expected numbers"),
        ({"xmin": "80", "xmax": "90"}, "the box (80.0, 20.5, 90.0, 40.0) lies outside the image of 80 x 100 pixels"),
        ({"ymin": "-9", "ymax": "0"}, "the box (10.0, -9.0, 30.0, 0.0) lies outside the image of 80 x 100 pixels"),
        ({"finding_categories": "['No Finding']"}, "'No Finding' comes with the box (10.0, 20.5, 30.0, 40.0)"),
        (HEALTHY | {"finding_categories": "['Mass']"}, "['Mass'] comes without a box; expected xmin to ymax"),
    ],
)
def test_finding_row(make_root, row, reason):
    root = make_root(findings=[{}, row])
    assert failure(root).startswith(f"{root / FINDING_TABLE}, line 3: {reason}")


def test_line_number_counts_blank_lines(make_root):
    root = make_root(breast=[{"laterality": "B"}])
    header, row = (root / BREAST_TABLE).read_text().splitlines()
    (root / BREAST_TABLE).write_text(f"{header}\n\n\n{row}\n")
    assert ", line 4: laterality is 'B'" in failure(root)


@pytest.mark.parametrize("table", [BREAST_TABLE, FINDING_TABLE])
def test_missing_columns_are_named(make_root, table):
    root = make_root(findings=[{}])
    text = (root / table).read_text()
    (root / table).write_text(text.replace("image_id", "image").replace("finding_birads", "birads"))
    absent = "image_id" if table == BREAST_TABLE else "image_id, finding_birads"
    assert failure(root).startswith(f"{root / table} has no column {absent}; expected at least ")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00s\x00t", ",".join(IMAGE_COLUMNS).encode() + b'\n"unclosed'])
def test_file_that_is_no_table(make_root, content):
    root = make_root()
    (root / BREAST_TABLE).write_bytes(content)
    assert failure(root).startswith(f"{root / BREAST_TABLE} cannot be read as a table: ")


def test_empty_table(make_root):
    root = make_root()
    (root / BREAST_TABLE).write_bytes(b"")
    assert failure(root).startswith(f"{root / BREAST_TABLE} has no column study_id, series_id, image_id, ")


def test_row_with_too_many_fields(make_root):
    root = make_root()
    (root / BREAST_TABLE).write_text((root / BREAST_TABLE).read_text().rstrip() + ",surplus\n")
    assert failure(root) == f"{root / BREAST_TABLE}, line 2 has 11 fields; expected 10"


def test_table_cut_short(make_root):
    root = make_root(breast=[{}, {"image_id": "i2"}])
    text = (root / BREAST_TABLE).read_text()
    (root / BREAST_TABLE).write_text(text[: text.rindex(',"BI-RADS')])
    assert failure(root) == f"{root / BREAST_TABLE}, line 3 has 7 fields; expected 10"


def test_table_without_rows(make_root):
    root = make_root(breast=[])
    assert failure(root) == f"{root / BREAST_TABLE} has no rows; expected one per image"


def test_folder_that_is_no_data_set(tmp_path):
    assert failure(tmp_path) == f"{tmp_path / BREAST_TABLE} does not exist; a VinDr-Mammo folder has it"


REPEATS = {
    "the row": {},
    "numbers written otherwise": {"xmin": "10.0", "ymax": "40.00", "finding_birads": "4"},
    "other columns": {"breast_density": "DENSITY D", "series_id": "e9"},
    "beyond the edge": {"xmin": "10", "xmax": "30"},
}


@pytest.mark.parametrize("row", REPEATS.values(), ids=REPEATS)
def test_a_row_that_repeats_a_finding_is_one_lesion_and_said(make_root, row):
    root = make_root(findings=[{}, {"xmin": "11"}, row, {}])
    with pytest.warns(InputWarning, match=r"finding_annotations.csv, line 4 and 1 more rows: the same image, box, "):
        data = VinDr(root)
    assert data.repeated == 2
    assert [finding.box[0] for finding in data.images[0].findings] == [10, 11]


def test_boxes_that_are_equal_once_they_are_cut_are_one_lesion(make_root):
    root = make_root(findings=[{"xmax": "90"}, {"xmax": "80"}])
    with pytest.warns(InputWarning, match=r"line 3: the same image, box"):
        data = VinDr(root)
    assert (data.repeated, data.clamped, len(data.images[0].findings)) == (1, 1, 1)


def test_a_row_that_is_left_out_keeps_its_mask(make_root):
    """Mask files are numbered by their image's rows with a box: file 2 belongs to the row that repeats the first."""
    rows = [{}, {"image_id": "i2"}, {}, HEALTHY | {"image_id": "i2"}, {"xmin": "11"}, {"image_id": "i2", "xmin": "12"}]
    root = make_root(breast=[{}, {"image_id": "i2"}], findings=rows)
    (root / "finding_masks" / "s1").mkdir(parents=True)
    for number, column in ((1, 15), (2, 16), (3, 17)):
        mask = np.zeros((100, 80), np.uint8)
        mask[30, column] = 255
        Image.fromarray(mask).save(root / "finding_masks" / "s1" / f"i1-{number}.png")
    with pytest.warns(InputWarning, match="line 4: the same image, box"):
        first, second = VinDr(root).images
    assert [np.argwhere(mask).tolist() for mask in lesion_truth(first, root, (100, 80))] == [[[30, 15]], [[30, 17]]]
    assert [finding.number for finding in second.findings] == [1, 2]


@pytest.mark.parametrize(
    "row",
    [{"finding_categories": "['Asymmetry']"}, {"finding_birads": "BI-RADS 5"}, {"image_id": "i2"}, {"ymin": "21"}],
)
def test_rows_that_differ_are_two_lesions(make_root, recwarn, row):
    data = VinDr(make_root(breast=[{}, {"image_id": "i2"}], findings=[{}, row]))
    assert (data.repeated, sum(len(image.findings) for image in data.images)) == (0, 2)
    assert not recwarn.list


def test_a_root_whose_tables_are_links_to_nothing_is_no_plain_folder(make_root, make_dicom, ramp):
    root = make_root(findings=[{}])
    make_dicom(ramp, name="a_LCC.dcm")
    for table in (FINDING_TABLE, BREAST_TABLE):
        (root / table).unlink()
        (root / table).symlink_to(root / "absent.csv")
        with pytest.raises(GBCIError, match=rf"{table} does not exist"):
            find_inputs(root)


@pytest.mark.parametrize("name", [BREAST_TABLE, FINDING_TABLE])
def test_a_table_that_is_a_pipe_is_not_waited_for(make_root, name):
    root = make_root(findings=[{}])
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(GBCIError, match=rf"{name} cannot be read as a table: a pipe, a socket or a device"):
        VinDr(root)
