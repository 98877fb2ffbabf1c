"""Quality control: every kind of issue is found at its image, and text from the data never becomes markup."""

import csv
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gbci_fast.data.cache import Cache
from gbci_fast.data.prepare import prepare
from gbci_fast.data.qc import find_issues, image_table, robust_z, write_qc
from gbci_fast.data.settings import PrepareSettings
from gbci_fast.data.vindr import BOX_COLUMNS, BREAST_TABLE, FINDING_TABLE, IMAGE_COLUMNS

SIZE = 128
NAME = "<script>alert(1)<script>&'\""  # a legal file name


def breast(radius=56, level=18000):
    """A half disk on the left border with a gentle texture, uint16 [SIZE, SIZE]."""
    y, x = np.ogrid[:SIZE, :SIZE]
    texture = 1 + 0.05 * np.sin(x / 5) * np.cos(y / 7)
    return np.where(np.hypot(y - SIZE / 2, x) < radius, level * texture, 0).astype(np.uint16)


def write_root(root, images):
    """Writes a VinDr root; each image is (id, study, pixels, {column: text}, [(xmin, ymin, xmax, ymax), ...])."""
    rows, findings = [], []
    for name, study, pixels, columns, boxes in images:
        path = root / "images" / study / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        known = {"study_id": study, "series_id": study, "image_id": name, "split": "training"} | columns
        rows.append([known.get(column, "") for column in IMAGE_COLUMNS])
        findings += [[name, "['Mass']", "BI-RADS 4", *box] for box in boxes]
    header = ["image_id", "finding_categories", "finding_birads", *BOX_COLUMNS]
    for table, lines in ((BREAST_TABLE, [IMAGE_COLUMNS, *rows]), (FINDING_TABLE, [header, *findings])):
        with (root / table).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    parent = tmp_path_factory.mktemp("qc")
    plain = [(f"plain{i}", f"s{i}", breast(50 + i), {"laterality": "L"}, []) for i in range(8)]
    bright = breast(56, 60000)
    bright[55:75, 5:30] = 65535
    images = [
        *plain,
        ("tiny", "t", breast(58), {}, [(20, 60, 22, 62), *2 * [(10, 40, 30, 60)]]),
        ("outside", "o", breast(59), {}, [(52, 60, 72, 80), (100, 5, 120, 15)]),
        ("bright", "b", bright, {"breast_density": "DENSITY C", "view_position": "CC"}, []),
        ("right", "r", breast(60), {"laterality": "R"}, []),
        ("again", "s1", breast(51), {"split": "test"}, []),
        (NAME, "e", breast(61), {"height": SIZE, "width": SIZE, "laterality": "R"}, [(-9, 50, 30, 70)]),
    ]
    prepare([write_root(parent / "root", images)], parent / "cache", PrepareSettings(size=64, views=("whole",)))
    return Cache(parent / "cache")


@pytest.fixture(scope="module")
def issues(cache):
    """The issues as {(kind, image id): text}."""
    found = find_issues(image_table(cache))
    return {(issue.kind, cache.row(issue.position)["image_id"]): issue.text for issue in found}


def test_every_problem_is_found_where_it_is(issues):
    assert issues["Lesions below 3 pixels", "tiny"].startswith("finding 0 is 1.")
    assert issues["Boxes outside the field of view", "outside"] == "1 of 2 boxes lie outside the breast's crop"
    assert re.match(r"\d\d% of finding 0 lies outside", issues["Lesions outside the breast", "outside"])
    assert issues["Outliers: brightness", "bright"].startswith("0.9")
    assert "z = " in issues["Outliers: saturated", "bright"]
    stated = "stated to be a right breast, but the chest wall lies on the left"
    assert issues[f"Note: {stated}", "right"] == stated
    assert issues["The same file twice", "again"] == (
        "the same file as root/images/s1/plain1.png, which is of split training, not test"
    )
    assert issues["Patients in both splits", "plain1"] == "patient s1 is in both splits"
    unexpected = {key for key, text in issues.items() if key[1].startswith("plain") and "bit depth" not in text}
    assert unexpected == {("Patients in both splits", "plain1")}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_escapes_everything_and_loads_nothing(cache):
    text = (cache.path / "qc" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert NAME in "".join(page.words)  # as text
    assert all(source.startswith("data:image/png;base64,") or source == "contact-sheet.png" for source in page.sources)
    assert page.tags.count("img") > 5
    assert len(text) < 1_000_000
    assert "default-src 'none'" in text


def test_the_page_counts(cache):
    words = " ".join(" ".join(Page((cache.path / "qc" / "report.html").read_text()).words).split())
    for expected in (
        "Images 14",
        "Boxes cut at the image's edge 1",
        "a finding, left out 1",
        "C 1 unknown 13",
        "training 13",
        "test 1",
    ):
        assert expected in words
    assert "Finding BI-RADS (boxes) all 4 4" in words  # one of five boxes lies outside


def test_contact_sheets_spread_over_the_data(cache, tmp_path):
    write_qc(cache, tmp_path / "qc", sheets=3)
    assert sorted(path.name for path in (tmp_path / "qc").iterdir()) == [
        "contact-sheet.png",
        "report.html",
        "summary.png",
    ]
    with Image.open(tmp_path / "qc" / "contact-sheet.png") as sheet:
        assert sheet.size == (8 * 192, 2 * 218)  # 14 tiles
        pixels = np.asarray(sheet)
    for color in ((64, 200, 96), (255, 64, 64)):  # the breast's outline, the boxes
        assert (pixels == color).all(-1).sum() > 20


def test_pages_of_a_larger_set(cache, tmp_path):
    from gbci_fast.data.qc_figures import draw_sheets

    positions = [i % len(cache) for i in range(150)]
    pages = draw_sheets(cache, positions, tmp_path, 2)
    assert [page.name for page in pages] == ["contact-sheet.png", "contact-sheet-2.png"]
    for page in pages:
        with Image.open(page) as sheet:
            assert sheet.size == (8 * 192, 6 * 218)


def test_robust_z():
    values = np.array([1.0, 1.1, 0.9, 1.0, 1.2, 9.0])
    scores = robust_z(values, 0.01)
    assert scores.argmax() == 5
    assert scores[5] > 50
    assert scores[:5].max() < 2
    assert robust_z(np.array([1.0, 1.0, 1.001]), 0.02).max() < 0.1
