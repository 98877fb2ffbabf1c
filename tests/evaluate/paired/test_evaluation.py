"""`gbci-fast evaluate paired`: cases, conditions, report and command line, on a phantom and an untrained tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gbci_fast.attributes import Attributes
from gbci_fast.cli import evaluate as command
from gbci_fast.cli.parser import Parser
from gbci_fast.data.fields import VisibleLesion
from gbci_fast.data.frame import whole_breast_frame
from gbci_fast.data.segmentation import breast_mask
from gbci_fast.data.vindr import VinDr
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.paired.evaluation import (
    CONDITIONS,
    METRICS,
    NUM_EXAMPLES,
    REGIONS,
    ImageCase,
    PairedSettings,
    describe,
    evaluate_paired,
    load_cases,
)
from gbci_fast.phantom import generate_phantom

SIZE = 64
QUICK = PairedSettings(split="test", steps=2, batch_size=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three phantom studies, all of the split "test"."""
    root = tmp_path_factory.mktemp("paired") / "phantom"
    generate_phantom(root, studies=3, seed=3, size=128)
    for table in root.glob("*.csv"):
        table.write_text(table.read_text().replace(",training,", ",test,"))
    return root


@pytest.fixture(scope="module")
def weights(tiny_checkpoint):
    """An untrained pipeline; its numbers mean nothing, but they are reproducible."""
    return tiny_checkpoint(SIZE)


@pytest.fixture(scope="module")
def evaluation(root, weights):
    return evaluate_paired([root], weights, QUICK)


@pytest.fixture
def parser():
    parser = Parser(prog="gbci-fast")
    command.add_parser(parser.add_subparsers())
    return parser


def run(parser, *arguments: object) -> None:
    args = parser.parse_args(["evaluate", "paired", *map(str, arguments), "--split", "test"])
    args.run(args)


def load(root, settings: PairedSettings = QUICK) -> list[ImageCase]:
    return load_cases([root], settings, SIZE, lambda *_: None)[0]


def square_case(**changes) -> ImageCase:
    """Gray 0.25, brighter by 0.5 in a frame 3 to 8 pixels around a square mask; breast everywhere."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[24:40, 24:40] = True
    image = np.full((SIZE, SIZE), 0.25)
    image[16:48, 16:48] = 0.75
    image[22:42, 22:42] = 0.25
    case = ImageCase(
        root="square", study_id="s", image_id="i", patient="p", seed=0, image=np.round(image * 65535).astype(np.uint16),
        breast=np.ones_like(mask), mask=mask, attributes=Attributes(), report=None,
    )  # fmt: skip
    return replace(case, **changes)


def test_cases_are_the_images_with_findings(root):
    expected = [(image.study_id, image.image_id) for image in VinDr(root).images if image.findings]
    assert [(case.study_id, case.image_id) for case in load(root)] == expected
    assert len(expected) >= 3


def test_masks_and_regions(root):
    """Checked pixel by pixel against the files: 3 pixels around the lesion, then 2 more, little of it in the air."""
    records = {image.image_id: image for image in VinDr(root).images}
    for case in load(root):
        unit = records[case.image_id].read().unit()
        frame = whole_breast_frame(breast_mask(unit), SIZE)
        truth = np.asarray(Image.open(root / "masks" / case.study_id / f"{case.image_id}.png")) > 0
        np.testing.assert_allclose(case.pixels, frame.to_model(unit), atol=1e-5)
        lesion = frame.to_model(truth) > 0.25
        np.testing.assert_array_equal(
            case.mask, lesion | (near(lesion, 3) & near(case.breast, 2)), err_msg=case.image_id
        )
        assert list(case.regions) == list(REGIONS)
        np.testing.assert_array_equal(case.regions["roi"], near(case.mask, 2))
        assert case.regions["image"].all()
        assert 0.1 < case.regions["breast"].mean() < 0.9


def near(mask: np.ndarray, radius: int) -> np.ndarray:
    """The pixels whose center is at most `radius` from that of a pixel of the mask, by looking at all pairs."""
    points = np.argwhere(np.ones_like(mask))
    squared = ((points[:, None] - np.argwhere(mask)) ** 2).sum(-1).min(1)
    return (squared <= radius**2).reshape(mask.shape)


def test_ring_mean_of_a_square():
    assert square_case().ring_mean == pytest.approx(0.75, abs=0.03)


def test_ring_stays_in_the_breast():
    breast = np.zeros((SIZE, SIZE), bool)
    breast[:, 32:] = True
    image = np.full((SIZE, SIZE), 0.2)
    image[:, 32:] = 0.6
    case = square_case(breast=breast, image=np.round(image * 65535).astype(np.uint16))
    assert case.ring_mean == pytest.approx(0.6, abs=1e-4)


def test_ring_without_breast_takes_what_is_not_masked():
    case = square_case()
    covered = replace(case, breast=case.mask)
    assert covered.ring_mean == pytest.approx(float(case.pixels[~case.mask].mean()))


def test_several_lesions_are_described_together():
    def lesion(pixels: int, report: str | None, **known) -> VisibleLesion:
        drawn = np.zeros((8, 8), bool)
        drawn.flat[:pixels] = True
        return VisibleLesion(pixels=drawn, attributes=Attributes(**known), report=report)

    attributes, report = describe(
        [
            lesion(2, "calcifications", finding_categories=("Suspicious Calcification",), finding_birads=5),
            lesion(9, "mass", finding_categories=("Mass",), finding_birads=3, view_position="CC"),
            lesion(1, "mass", view_position="MLO"),
            lesion(1, None),
        ]
    )
    assert attributes == Attributes(
        finding_categories=("Mass", "Suspicious Calcification"), finding_birads=5, view_position="CC"
    )
    assert report == "calcifications; mass"
    assert describe([lesion(1, None)]) == (Attributes(), None)


def test_conditions_are_what_they_say(evaluation):
    _, examples = evaluation
    for case, images in examples:
        assert list(images) == list(CONDITIONS)
        outside, inside = ~case.mask, case.mask
        for name in ("pipeline", "copy_input", "ring_mean"):
            np.testing.assert_array_equal(images[name][outside], case.pixels[outside])
        assert (images["copy_input"][inside] == 0.5).all()
        assert (images["ring_mean"][inside] == np.float32(case.ring_mean)).all()
        for name in ("source_setting", "vae"):
            assert (images[name][outside] != case.pixels[outside]).mean() > 0.5
        assert (images["source_setting"] != images["vae"]).mean() > 0.5


def test_report_schema(evaluation, root):
    report, examples = evaluation
    assert len(examples) == min(NUM_EXAMPLES, len(report["images"]))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for group in (report["all"], report["roots"]["phantom"]):
        assert group["num_images"] == len(report["images"])
        assert group["num_patients"] == len({row["study_id"] for row in report["images"]})
        assert list(group["scores"]) == list(CONDITIONS)
    for condition in CONDITIONS:
        for region in REGIONS:
            for metric in METRICS:
                values = [row["scores"][condition][region][metric] for row in report["images"]]
                summary = report["all"]["scores"][condition][region][metric]
                assert summary["mean"] == pytest.approx(np.mean(values))
                assert summary["median"] == pytest.approx(np.median(values))
                assert summary["low"] <= summary["mean"] <= summary["high"]
    settings = report["settings"]
    assert (settings["scheduler"], settings["image_size"], settings["steps"]) == ("DDIMScheduler", SIZE, 2)
    assert len(settings["weights_sha256"]) == 64
    assert set(report["versions"]) == {"python", "gbci_fast", "torch", "diffusers", "numpy", "scipy", "scikit-image"}


def test_the_batch_size_changes_nothing(evaluation, root, weights):
    alone, _ = evaluate_paired([root], weights, replace(QUICK, batch_size=1, limit=3))
    together = {row["image_id"]: row for row in evaluation[0]["images"]}
    assert len(alone["images"]) == 3
    for row in alone["images"]:
        other = together[row["image_id"]]
        assert row["seed"] == other["seed"]
        for condition in CONDITIONS:
            for region in REGIONS:
                assert row["scores"][condition][region] == pytest.approx(other["scores"][condition][region], abs=1e-3)


def test_the_seed_changes_the_noise_alone(evaluation, root, weights):
    """The untrained VAE and the fillings draw nothing."""
    other, _ = evaluate_paired([root], weights, replace(QUICK, seed=1, limit=2))
    same = {row["image_id"]: row["scores"] for row in evaluation[0]["images"]}
    for row in other["images"]:
        for condition, scores in row["scores"].items():
            changed = abs(scores["roi"]["psnr"] - same[row["image_id"]][condition]["roi"]["psnr"]) > 1e-4
            assert changed == (condition in ("pipeline", "source_setting"))


def test_limit_spreads_over_all(root):
    everything = load(root)
    assert [case.image_id for case in load(root, replace(QUICK, limit=2))] == [
        everything[0].image_id,
        everything[len(everything) // 2].image_id,
    ]


def test_command_writes_report_and_figure(parser, root, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "out" / "report.json"
    run(parser, root, "--weights", weights, "--output", output, "--steps", 1, "--limit", 2, "--device", "cpu")
    report = json.loads(output.read_text())
    assert report["settings"]["limit"] == len(report["images"]) == 2
    with Image.open(output.with_suffix(".png")) as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 500
    printed = capsys.readouterr().out
    assert all(condition in printed for condition in CONDITIONS)
    assert "…" not in printed  # nothing is cut off at 80 columns
    assert f"{report['all']['scores']['vae']['roi']['psnr']['mean']:.1f}" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == ["report.json", "report.png"]


def test_interrupted_run_leaves_nothing(parser, root, weights, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gbci_fast.evaluate.paired.evaluation._row", interrupt)
    output = tmp_path / "out" / "report.json"
    with pytest.raises(KeyboardInterrupt):
        run(parser, root, "--weights", weights, "--output", output, "--steps", 1, "--device", "cpu")
    assert list(output.parent.iterdir()) == []


def test_no_finding_in_the_split(root, weights):
    with pytest.raises(GBCIError, match=r"no image with a finding in .*phantom \(training split, fold C\)"):
        evaluate_paired([root], weights, replace(QUICK, split="C"))


def test_missing_weights(parser, root, tmp_path):
    with pytest.raises(GBCIError, match=r"nowhere has no model_index.json; expected a pipeline folder"):
        run(parser, root, "--weights", tmp_path / "nowhere", "--output", tmp_path / "r.json", "--device", "cpu")
    assert not (tmp_path / "r.json").exists()


def test_incomplete_weights(root, weights, tmp_path):
    (tmp_path / "model_index.json").write_text((weights / "model_index.json").read_text())
    with pytest.raises(GBCIError, match=r"cannot be loaded as a pipeline"):
        evaluate_paired([root], tmp_path, QUICK)


@pytest.mark.parametrize("name", ["steps", "batch_size", "limit"])
def test_settings_are_checked(name):
    with pytest.raises(GBCIError, match=f"{name} is 0; expected at least 1"):
        PairedSettings(**{name: 0})
    with pytest.raises(GBCIError, match="seed is -1; expected at least 0"):
        PairedSettings(seed=-1)


def test_figure_must_not_replace_the_report(parser, root, weights, tmp_path):
    with pytest.raises(GBCIError, match="expected two files"):
        run(parser, root, "--weights", weights, "--output", tmp_path / "report.png")
