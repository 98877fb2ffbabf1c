"""Pasting a synthesis into a template's stored values, and the masks on both grids."""

import dataclasses
from itertools import chain

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from gbci_fast.attributes import Attributes
from gbci_fast.data.boxes import box_ellipse
from gbci_fast.data.segmentation import breast_mask, pectoral_mask
from gbci_fast.data.vindr import Finding, VinDr, find_inputs
from gbci_fast.errors import GBCIError
from gbci_fast.generate import template as engine
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import SamplerSettings
from gbci_fast.generate.synthesizer import Synthesizer
from gbci_fast.generate.template import open_template, paste

NAMES = ("full_LCC.dcm", "inverted_LCC.dcm", "windowed_LCC.dcm", "eight_LCC.png", "twelve_LCC.png", "sixteen_LCC.png")
MASK_BOX = (20, 50, 60, 110)


@pytest.fixture(scope="module")
def opened(templates):
    return {name: open_template(find_inputs(templates / name)[0]) for name in NAMES}


def brighter(template, change):
    """`template` brighter by `change` everywhere, pasted under an elliptic mask; and the mask."""
    mask = box_ellipse(MASK_BOX, template.mammogram.shape)
    return paste(template, template.pixels + np.float32(change), mask), mask


@pytest.mark.parametrize("change", [0.2, -0.2])
@pytest.mark.parametrize("name", NAMES)
def test_paste_changes_the_presentation_by_the_change_and_nothing_outside(opened, name, change):
    template = opened[name]
    original, presentation = template.mammogram.stored, template.mammogram.presentation
    stored, mask = brighter(template, change)
    assert (stored.dtype, stored.shape) == (original.dtype, original.shape)
    np.testing.assert_array_equal(stored[~mask], original[~mask])
    before, after = presentation.to_unit(original), presentation.to_unit(stored)
    deep = ndimage.distance_transform_edt(mask) * template.frame.scale[0] > 1
    free = deep & (before > 0) & (before < 1) & (before + change > 0) & (before + change < 1)
    assert free.sum() > 300
    one_level = np.abs(np.diff(presentation.levels)).max()
    np.testing.assert_allclose((after - before)[free], change, atol=0.51 * one_level)


@pytest.mark.parametrize("change", [0.25, -0.25])
def test_where_the_window_clips_the_difference_is_added(opened, change):
    template = opened["windowed_LCC.dcm"]
    original = template.mammogram.stored
    stored, mask = brighter(template, change)
    before = template.mammogram.presentation.to_unit(original)
    deep = ndimage.distance_transform_edt(mask) * template.frame.scale[0] > 1
    clipped = deep & (before == (0 if change > 0 else 1))
    assert clipped.sum() > 20
    # A quarter of the window of 1000 values is 250, also for pixels outside the window.
    assert np.abs((stored.astype(int) - original)[clipped] - 1000 * change).max() <= 1


def test_monochrome1_stores_brighter_as_lower(opened):
    template = opened["inverted_LCC.dcm"]
    stored, mask = brighter(template, 0.2)
    assert (stored[mask] <= template.mammogram.stored[mask]).all()
    assert (stored[mask] < template.mammogram.stored[mask]).mean() > 0.8


def test_no_change_is_the_original_bit_for_bit(opened):
    for template in opened.values():
        np.testing.assert_array_equal(brighter(template, 0.0)[0], template.mammogram.stored)


def test_the_change_fades_in_over_a_model_pixel(breast, write_template, tmp_path):
    size = 900, 700  # 4 native pixels per model pixel
    path = write_template(tmp_path / "large_LCC.dcm", np.round(50000 * breast(*size) + 1000).astype(np.uint16))
    template = open_template(find_inputs(path)[0])
    box = (100, 300, 300, 600)
    mask = box_ellipse(box, size)
    stored = paste(template, template.pixels + np.float32(0.1), mask)
    to_unit = template.mammogram.presentation.to_unit
    change = to_unit(stored).astype(float) - to_unit(template.mammogram.stored)
    steps = np.abs(np.diff(change, axis=1)).max(), np.abs(np.diff(change, axis=0)).max()
    assert 3 < 1 / template.frame.scale[0] < 5
    assert 0.09 < change.max() < 0.11
    assert max(steps) < 1.3 * 0.1 * template.frame.scale[0]  # no seam


def test_grain_finer_than_the_model_survives(breast, write_template, tmp_path):
    size, rng = (900, 700), np.random.default_rng(0)
    grain = rng.normal(0, 400, size) * (breast(*size) > 0)
    path = write_template(tmp_path / "grain_LCC.dcm", np.round(20000 + 30000 * breast(*size) + grain).astype(np.uint16))
    template = open_template(find_inputs(path)[0])
    box = (150, 350, 250, 500)
    mask = box_ellipse(box, size)
    smooth = ndimage.gaussian_filter(template.pixels, 3)  # the model paints no grain at all
    stored = paste(template, smooth, mask)
    window = np.s_[400:450, 180:220]

    def grain_of(image):
        return image[window] - ndimage.gaussian_filter(image.astype(float), 1)[window]

    correlation = np.corrcoef(grain_of(stored).ravel(), grain_of(template.mammogram.stored).ravel())[0, 1]
    assert correlation > 0.95


def stream(synthesizer, *batches):
    """The syntheses of every batch; raises the first error."""
    made = list(synthesizer.stream(batches, lambda synthesis: synthesis))
    for image in chain.from_iterable(made):
        if isinstance(image, GBCIError):
            raise image
    return [[image.value for image in images] for images in made]


def run(pipe, records, **planned):
    plan = make_plan(records, **{"variants": 1, "seed": 0, **planned})
    return stream(Synthesizer(pipe, SamplerSettings(num_inference_steps=1, guidance_scale=1.0)), plan)[0]


def test_automatic_masks_lie_in_the_breast_of_either_side(pipe, phantom):
    for synthesis in run(pipe, VinDr(phantom).images):
        breast = breast_mask(synthesis.template.mammogram.unit())
        assert synthesis.mask.any()
        assert not (synthesis.mask & ~ndimage.binary_dilation(breast)).any()
        tissue = synthesis.template.frame.to_native(synthesis.template.tissue, (0, 0, *synthesis.mask.shape[::-1]))
        assert tissue[synthesis.mask].min() > 0.3  # the rim as well; interpolated
        assert (synthesis.stored != synthesis.template.mammogram.stored).any()


def rims(synthesis):
    """Pixels of the mask beyond the lesion's box, left, top, right, bottom; in pixels of the model image."""
    ys, xs = np.nonzero(synthesis.mask)
    xmin, ymin, xmax, ymax = synthesis.box
    beyond = (xmin - xs.min(), ymin - ys.min(), xs.max() + 1 - xmax, ys.max() + 1 - ymax)
    return np.array(beyond) * synthesis.template.frame.scale[0]


def test_what_is_painted_is_the_lesion_and_a_rim(pipe, phantom):
    for planned in ({}, {"mask": "annotations"}):
        for synthesis in run(pipe, VinDr(phantom).images, **planned):
            assert (rims(synthesis) >= 0).all()  # the tissue may end there
            assert np.median(rims(synthesis)) == pytest.approx(3, abs=1.5)
            assert rims(synthesis).max() < 5


def test_tissue_is_off_the_skin_and_the_muscle(phantom):
    views = []
    for record in VinDr(phantom).images:
        template = open_template(record)
        view, tissue = template.mammogram.view_position, template.tissue
        muscle = pectoral_mask(template.pixels, template.breast, view)
        assert muscle.any() == (view == "MLO")
        assert not (tissue & (muscle | ~template.breast)).any()
        # 3 of 224 pixels of skin, none at the chest wall on the left
        deep = ndimage.binary_erosion(template.breast, np.ones((9, 9)), border_value=1)
        assert tissue[deep & ~muscle].all()
        assert not (tissue & ~ndimage.binary_erosion(template.breast, iterations=3, border_value=1)).any()
        assert tissue[:, 0].any()
        views.append(view)
    assert set(views) == {"CC", "MLO"}


def test_an_annotated_box_becomes_its_ellipse_and_a_rim(pipe, phantom):
    syntheses = run(pipe, VinDr(phantom).images, mask="annotations")
    assert len(syntheses) == 2
    for synthesis in syntheses:
        (finding,) = synthesis.template.record.findings
        ellipse = box_ellipse(finding.box, synthesis.mask.shape)
        away = ndimage.distance_transform_edt(~ellipse) * synthesis.template.frame.scale[0]
        assert synthesis.mask[away <= 1.5].all()
        assert not synthesis.mask[away >= 4.5].any()
        assert synthesis.box == finding.box


def test_a_drawn_mask_is_taken_as_it_is(pipe, templates, tmp_path):
    mask = np.zeros((160, 120), np.uint8)
    mask[60:90, 20:45] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (synthesis,) = run(pipe, find_inputs(templates / "full_LCC.dcm"), mask=str(tmp_path / "mask.png"))
    np.testing.assert_array_equal(synthesis.mask, mask > 0)
    assert synthesis.box == (20, 60, 45, 90)
    assert (synthesis.stored != synthesis.template.mammogram.stored)[60:90, 20:45].mean() > 0.5


def test_a_drawn_mask_ends_where_the_model_sees_nothing(pipe, templates, tmp_path):
    Image.fromarray(np.full((160, 120), 255, np.uint8)).save(tmp_path / "mask.png")
    (synthesis,) = run(pipe, find_inputs(templates / "full_LCC.dcm"), mask=str(tmp_path / "mask.png"))
    frame = synthesis.template.frame
    assert synthesis.box == (frame.x0, frame.y0, frame.x1, frame.y1) != (0, 0, 120, 160)


@pytest.mark.parametrize(
    ("corner", "shape", "sentence"),
    [
        ((12, 82), (160, 120), "full_LCC.dcm: the mask lies outside the breast; expected it to overlap"),
        (
            (3, 3),
            (80, 60),
            r"full_LCC.dcm: the mask file .*mask.png is 60x80 but the image is 120x160; expected",
        ),
    ],
)
def test_a_drawn_mask_that_does_not_fit(pipe, templates, tmp_path, corner, shape, sentence):
    mask = np.zeros(shape, np.uint8)
    mask[corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(GBCIError, match=sentence):
        run(pipe, find_inputs(templates / "full_LCC.dcm"), mask=str(tmp_path / "mask.png"))


def test_an_annotation_beside_the_outline_of_the_breast_is_trusted(pipe, templates):
    (record,) = find_inputs(templates / "full_LCC.dcm")
    finding = Finding(box=(82.0, 12.0, 90.0, 20.0), attributes=Attributes(finding_categories=("Skin Thickening",)))
    (synthesis,) = run(pipe, [dataclasses.replace(record, findings=(finding,))], mask="annotations")
    assert synthesis.box == finding.box


def test_the_smallest_box_of_a_large_image_keeps_a_pixel(pipe, breast, write_template, tmp_path):
    path = write_template(tmp_path / "large_LCC.dcm", np.round(60000 * breast(1400, 1000)).astype(np.uint16))
    (record,) = find_inputs(path)
    finding = Finding(box=(300.0, 700.0, 302.0, 702.0), attributes=Attributes(finding_categories=("Mass",)))
    (synthesis,) = run(pipe, [dataclasses.replace(record, findings=(finding,))], mask="annotations")
    assert synthesis.box == (300, 700, 302, 702)


def test_the_file_knows_view_side_and_spacing_better_than_its_name(pipe, breast, write_template, tmp_path):
    path = write_template(tmp_path / "R_MLO.dcm", np.round(60000 * breast()).astype(np.uint16))
    (synthesis,) = run(pipe, find_inputs(path))
    assert (synthesis.attributes.laterality, synthesis.attributes.view_position) == ("L", "CC")
    assert synthesis.attributes.pixel_spacing == pytest.approx(0.5 / synthesis.template.frame.scale[1])
    (overridden,) = run(pipe, find_inputs(path), overrides={"laterality": "R", "view_position": "MLO"})
    assert (overridden.attributes.laterality, overridden.attributes.view_position) == ("R", "MLO")


def test_no_breast_names_the_file(tmp_path):
    noise = np.zeros((64, 64), np.uint8)
    noise[3, 3] = 255
    Image.fromarray(noise).save(tmp_path / "dust.png")
    with pytest.raises(GBCIError, match=r"dust.png: no breast found"):
        open_template(find_inputs(tmp_path / "dust.png")[0])


def test_an_image_that_cannot_be_pasted_into_names_the_file(pipe, opened, monkeypatch, templates):
    template = opened["full_LCC.dcm"]
    zigzag = dataclasses.replace(
        template.mammogram.presentation,
        levels=np.tile(np.float32([0, 1]), len(template.mammogram.presentation.levels) // 2),
    )
    broken = dataclasses.replace(template, mammogram=dataclasses.replace(template.mammogram, presentation=zigzag))
    monkeypatch.setattr("gbci_fast.generate.workers.open_template", lambda record: broken)
    with pytest.raises(GBCIError, match=r"full_LCC.dcm: the image's lookup table is not monotone"):
        run(pipe, find_inputs(templates / "full_LCC.dcm"))


def test_a_template_stays_open_as_long_as_it_is_used(pipe, templates, monkeypatch):
    reads = []

    def counted(record):
        reads.append(record.image_id)
        return open_template(record)

    monkeypatch.setattr("gbci_fast.generate.workers.open_template", counted)
    records = [record for record in find_inputs(templates) if record.image_id in ("eight_LCC", "full_LCC")]
    plan = make_plan(records, variants=3, seed=0)
    synthesizer = Synthesizer(pipe, SamplerSettings(num_inference_steps=1, guidance_scale=1.0), threads=1)
    items = list(plan)
    batches = items[:2], items[2:4], items[4:]
    for batch, made in zip(batches, stream(synthesizer, *batches), strict=True):
        assert [synthesis.item for synthesis in made] == batch
    assert reads == ["eight_LCC", "full_LCC"]


def test_a_guidance_that_overflows_is_one_sentence(pipe, phantom):
    plan = make_plan(find_inputs(phantom)[:1], variants=1, seed=0)
    settings = SamplerSettings(num_inference_steps=1, guidance_scale=1e300)
    with pytest.raises(GBCIError, match=r"holds NaN or infinity; guidance_scale 1e\+300 may be too large") as caught:
        stream(Synthesizer(pipe, settings), plan)
    assert str(plan[0].template.path) in str(caught.value)


def test_a_view_that_was_set_decides_where_lesions_lie(pipe, phantom, monkeypatch):
    """It also decides the view that the sampler and the tables get."""
    views, draw = [], engine.automatic_mask
    monkeypatch.setattr(engine, "automatic_mask", lambda *given: views.append(given[3]) or draw(*given))
    records = [record for record in find_inputs(phantom) if record.view_position == "CC"][:1]
    (stated,) = run(pipe, records)
    (as_set,) = run(pipe, records, overrides={"view_position": "MLO"})
    assert views == [stated.attributes.view_position, as_set.attributes.view_position] == ["CC", "MLO"]


def test_a_lesion_below_the_pixels_of_a_tiny_image_is_one_sentence(breast, tmp_path):
    unit = breast(24, 18)
    Image.fromarray(np.round(255 * unit / unit.max()).astype(np.uint8)).save(tmp_path / "tiny_LCC.png")
    records, sentences = find_inputs(tmp_path / "tiny_LCC.png"), []
    template = open_template(records[0])
    for item in make_plan(records, variants=100, seed=0):
        try:
            _, mask, _ = engine.draw_masks(item, template)
            assert mask.any()
        except GBCIError as error:
            sentences.append(str(error))
    assert set(sentences) == {"no pixel of this 18 x 24 image lies under the lesion; expected a larger one"}
    assert len(sentences) < 50
