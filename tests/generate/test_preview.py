"""The contact sheet shows what is in the files."""

import numpy as np
import pytest
from PIL import Image

from gbci_fast.attributes import Attributes
from gbci_fast.data.boxes import box_ellipse
from gbci_fast.data.vindr import find_inputs
from gbci_fast.generate.job import _preview_slot
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.preview import preview_panels, write_preview
from gbci_fast.generate.template import Extent, Synthesis, open_template, paste

BOX = (30, 60, 50, 90)


def synthesis(templates, change):
    record = find_inputs(templates / "full_LCC.dcm")[0]
    template = open_template(record)
    mask = box_ellipse(BOX, template.mammogram.shape)
    (item,) = make_plan([record], variants=1, seed=0)
    stored = paste(template, template.pixels + np.float32(change), mask)
    return Synthesis(
        item=item, template=template, attributes=Attributes(), stored=stored, mask=mask, lesion=Extent.of(mask)
    )


@pytest.mark.parametrize(("change", "channel"), [(0.1, 0), (-0.1, 2)])
def test_panels(templates, change, channel):
    image = synthesis(templates, change)
    panels = preview_panels(image)
    assert (panels.dtype, panels.shape) == (np.uint8, (224, 8 * 224, 3))
    for view in np.split(panels.astype(int), 2, axis=1):
        before, outlined, after, difference = np.split(view, 4, axis=1)
        changed = (after != before).any(-1)
        assert np.sign((after - before).sum()) == np.sign(change)
        assert (difference[changed][:, channel] > 0).mean() > 0.9
        assert not np.delete(difference, channel, axis=-1).any()
        red = (outlined == (255, 64, 64)).all(-1)
        assert red.any()
        np.testing.assert_array_equal(outlined[~red], before[~red])


def test_one_view_is_the_whole_breast_the_other_four_times_the_lesion(templates):
    image = synthesis(templates, 0.1)
    changed = preview_panels(image).reshape(224, 8, 224, 3).any(-1)[:, (3, 7)]
    whole, close_up = changed[:, 0], changed[:, 1]
    assert not (whole & (image.template.frame.to_model(image.mask) == 0)).any()
    assert 52 <= close_up.any(1).sum() <= 58
    ys, xs = np.nonzero(close_up)
    assert abs(ys.mean() - 112) < 3
    assert abs(xs.mean() - 112) < 3


def test_sheet(templates, tmp_path):
    panels = preview_panels(synthesis(templates, 0.1))
    write_preview([panels, panels, panels], tmp_path / "preview.png")
    sheet = np.asarray(Image.open(tmp_path / "preview.png"))
    assert sheet.shape == (18 + 3 * 224, 8 * 224, 3)
    np.testing.assert_array_equal(sheet[18 + 224 : 18 + 448], panels)
    captions = sheet[:18].reshape(18, 8, 224, 3)
    assert (captions > 0).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize(
    ("total", "slots"),
    [(1, [0]), (5, [0, 1, 2, 3, 4]), (32, [i // 4 for i in range(32)]), (9, [0, 1, 2, 3, 4, 5, 6, 7, 7])],
)
def test_rows_are_spread_over_the_plan(total, slots):
    assert [_preview_slot(place, total) for place in range(total)] == slots
