"""Plans of ten million images: nothing is held, and everything is found by its place."""

import hashlib
import time
import tracemalloc
from pathlib import Path

import pytest

from gbci_fast.attributes import Attributes
from gbci_fast.data.vindr import Finding, ImageRecord
from gbci_fast.errors import GBCIError
from gbci_fast.generate.plan import LARGEST_INDEX, make_plan
from gbci_fast.generate.plan_csv import read_plan, write_plan

MEGABYTE = 10**6
FOUND = Finding(box=(10.0, 20.0, 30.5, 40.0), attributes=Attributes(finding_categories=("Mass",), finding_birads=5))
RECORDS = [
    ImageRecord(
        study_id="s",
        image_id="a",
        path=Path("in/s/a.dicom"),
        attributes=Attributes(breast_density="C", breast_birads=5),
        findings=(FOUND,),
    ),
    ImageRecord(study_id="s", image_id="b", path=Path("in/s/b.dicom")),
]


@pytest.fixture
def peak():
    """`peak()`: the largest number of bytes in use since the test began, beyond those at its beginning."""
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[1] - start
    tracemalloc.stop()


@pytest.mark.parametrize("balance", [None, "natural"])
def test_ten_million_variants_open_at_once(peak, balance):
    make_plan(RECORDS, variants=1, seed=0, balance=balance)  # reads the priors
    began = time.process_time()
    plan = make_plan(RECORDS, variants=5_000_000, seed=0, balance=balance)
    last = plan[-1]
    assert time.process_time() - began < 1
    assert (len(plan), last.index, last.variant, last.template) == (10**7, 10**7 - 1, 4_999_999, RECORDS[1])
    assert [item.index for item in plan[3:9_000_000:4_000_000]] == [3, 4_000_003, 8_000_003]
    assert peak() < 2 * MEGABYTE


def test_a_plan_file_is_not_held(tmp_path, peak):
    """A list of items would take 30 MB."""
    rows = 20_000
    with (tmp_path / "plan.csv").open("w") as file:
        file.write("image,variant,seed,index,finding_birads,report\n")
        file.writelines(f"{'ab'[i % 2]},{i // 2},{i * 7919},{rows - 1 - i},{2 + i % 4},text {i}\n" for i in range(rows))
    plan = read_plan(tmp_path / "plan.csv", RECORDS, tmp_path, seed=0)
    assert [(item.index, item.report) for item in (plan[0], plan[-1], plan[777])] == [
        (rows - 1, "text 0"), (0, f"text {rows - 1}"), (rows - 778, "text 777"),
    ]  # fmt: skip
    assert peak() < 2 * MEGABYTE


def test_blank_variants_are_known_at_every_place(tmp_path):
    stated = {3: 9, 500: 0, 501: 7}
    cells = "".join(f"{'ab'[i // 3 % 2]},{stated.get(i, '')}\n" for i in range(1000))
    (tmp_path / "plan.csv").write_text(f"image,variant\n{cells}")
    plan = read_plan(tmp_path / "plan.csv", RECORDS, tmp_path, seed=0)
    upcoming, expected = {"a": 0, "b": 0}, []
    for i in range(1000):
        image = "ab"[i // 3 % 2]
        expected.append(stated.get(i, upcoming[image]))
        upcoming[image] = expected[-1] + 1
    assert [plan[i].variant for i in reversed(range(1000))] == expected[::-1]


def test_a_part_makes_the_items_of_the_whole():
    plan = make_plan(RECORDS, variants=10, seed=3)
    part = plan[4:16:3]
    assert len(part) == 4
    assert [item.image_id for item in part] == [plan[place].image_id for place in (4, 7, 10, 13)]
    assert [item.index for item in part[1:3]] == [7, 10]
    assert part[-1].image_id == plan[13].image_id
    assert not set(part.identity.values()) & set(plan.identity.values())
    assert plan[:].identity == plan.identity
    with pytest.raises(IndexError):
        plan[20]


@pytest.mark.parametrize(
    "options",
    [{"variants": 3}, {"seed": 1}, {"mask": "annotations"}, {"report": "x"}, {"overrides": {"finding_birads": 2}},
     {"balance": "natural"}, {"balance": "finding_birads"}],
)  # fmt: skip
def test_the_identity_of_other_items_is_another(options):
    plain = make_plan(RECORDS, variants=2, seed=0)
    assert make_plan(RECORDS, variants=2, seed=0).identity == plain.identity
    other = make_plan(RECORDS, **{"variants": 2, "seed": 0, **options})
    assert other.identity["descriptions"] != plain.identity["descriptions"]
    denser = [RECORDS[0], ImageRecord(study_id="s", image_id="b", path=Path("b"), attributes=Attributes(age=50))]
    assert make_plan(denser, variants=2, seed=0).identity["descriptions"] != plain.identity["descriptions"]


def test_more_images_than_dicom_counts():
    with pytest.raises(GBCIError, match=f"so there are {2 * LARGEST_INDEX} images; expected at most {LARGEST_INDEX}"):
        make_plan(RECORDS, variants=LARGEST_INDEX, seed=0)


def digest(plan):
    """Of all that a plan decided before its items were made on access."""
    text = "".join(f"{item.index},{item.image_id},{item.study_id},{item.seed};" for item in plan)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_ids_and_seeds_are_those_of_plans_that_were_lists(tmp_path):
    annotated = {"mask": "annotations", "report": "x", "overrides": {"finding_birads": 4}}
    assert digest(make_plan(RECORDS, variants=3, seed=5)) == "b92fd1af8cb059f7"
    assert digest(make_plan(RECORDS, variants=3, seed=5, **annotated)) == "e738da4241457def"
    balance = "finding_categories,finding_birads"
    assert digest(make_plan(RECORDS, variants=9, seed=5, balance=balance)) == "b747be1cd5917127"
    columns = "image,variant,seed,index,finding_categories,finding_birads,report,mask,center_x,center_y,diameter_px"
    (tmp_path / "plan.csv").write_text(
        f"{columns},xmin,ymin,xmax,ymax\n"
        "a,,,,,,,,,,,,,,\n"
        "b,4,77,9,Mass|Asymmetry,3,told,,30,40,12,,,,\n"
        "s/b.dicom,,,,No Finding,,,auto,,,,,,,\n"
        "a,,,,unknown,unknown,,,,,,1,2,3.5,4\n"
    )
    (tmp_path / "in" / "s").mkdir(parents=True)
    records = [
        ImageRecord(
            study_id="s",
            image_id=record.image_id,
            path=tmp_path / record.path,
            attributes=record.attributes,
            findings=record.findings,
        )
        for record in RECORDS
    ]
    assert digest(read_plan(tmp_path / "plan.csv", records, tmp_path / "in", seed=5)) == "5cc11f9af9f35d20"


def test_a_long_plan_is_written_row_by_row(tmp_path, peak):
    plan = make_plan(RECORDS, variants=1000, seed=0)
    write_plan(plan, tmp_path / "plan.csv")
    assert peak() < 2 * MEGABYTE
    read = read_plan(tmp_path / "plan.csv", RECORDS, tmp_path, seed=0)
    assert [(item.image_id, item.lesion_id) for item in read[::100]] == [
        (item.image_id, item.lesion_id) for item in plan[::100]
    ]
