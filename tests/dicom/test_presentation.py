"""Display values against pydicom and the standard's examples; pasting back as property tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from gbci_fast.dicom.luts import lut_entries
from gbci_fast.dicom.presentation import Presentation, full_scale, presentation_of
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError

EVERY_12_BIT = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def header(bits=12, signed=False, **tags):
    dataset = Dataset()
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsStored = bits
    dataset.PixelRepresentation = int(signed)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def lut_item(data, first=0, bits=16):
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(data) % 65536, first, bits])
    item.add_new("LUTData", "US", list(map(int, data)))
    return item


def every_value(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    return np.arange(low, low + 2**bits).astype(np.int16 if signed else np.uint16).reshape(-1, 16)


# Forward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "center", "width", "stored", "expected"),
    [
        # PS3.3 C.11.2.1.2.1, examples in the notes
        ("LINEAR", 2048, 4096, [0, 1, 4094, 4095], [0, 1 / 4095, 4094 / 4095, 1]),
        ("LINEAR", 2048, 1, [2047, 2048], [0, 1]),
        ("LINEAR", 100, 100, [50, 51, 100, 148, 149, 150], [0, 1 / 99, 50 / 99, 98 / 99, 1, 1]),
        # PS3.3 C.11.2.1.3.2
        ("LINEAR_EXACT", 2048, 4096, [0, 1024, 2048, 4095], [0, 0.25, 0.5, 4095 / 4096]),
        ("LINEAR_EXACT", 2048, 0.5, [2047, 2048, 2049], [0, 0.5, 1]),
        # PS3.3 C.11.2.1.3.1
        ("SIGMOID", 1000, 400, [900, 1000, 1100], [1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-1))]),
    ],
)
def test_windows_by_hand(function, center, width, stored, expected):
    dataset = header(WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    unit = presentation_of(dataset, EVERY_12_BIT).to_unit(np.array([stored], np.uint16))
    np.testing.assert_allclose(unit[0], expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 10, 12]),
    signed=st.booleans(),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    place=st.floats(0.1, 0.9),
    share=st.floats(0.1, 3),
    slope=st.sampled_from([1, 0.5, 2.5, -1]),
    intercept=st.sampled_from([0, -1024, 3.5]),
)
def test_windows_agree_with_pydicom(bits, signed, function, place, share, slope, intercept):
    stored = every_value(bits, signed)
    first, last = (int(value) * slope + intercept for value in (stored.min(), stored.max()))
    low, high = sorted((first, last))
    dataset = header(bits, signed, VOILUTFunction=function, RescaleSlope=slope, RescaleIntercept=intercept)
    dataset.WindowCenter, dataset.WindowWidth = round(low + place * (high - low), 3), round(share * (high - low), 3)
    expected = apply_voi_lut(apply_modality_lut(stored, dataset), dataset)
    # pydicom scales to the output range of the modality transformation.
    presentation = presentation_of(dataset, stored)
    np.testing.assert_allclose(presentation.to_unit(stored), (expected - first) / (last - first), atol=1e-6)
    assert presentation.window is None


@pytest.mark.parametrize("first", [0, 100, -50])
def test_voi_and_modality_luts_agree_with_pydicom(first):
    rng = np.random.default_rng(0)
    modality = np.sort(rng.integers(0, 1024, 300))
    voi = np.sort(rng.integers(0, 4096, 700))
    dataset = header(signed=first < 0, ModalityLUTSequence=[lut_item(modality, first)])
    dataset.VOILUTSequence = [lut_item(voi, 50, bits=12), lut_item(voi[::-1], 0, bits=12)]
    dataset.WindowCenter, dataset.WindowWidth = 10, 20
    stored = every_value(12, first < 0)
    expected = apply_voi_lut(apply_modality_lut(stored, dataset), dataset)
    presentation = presentation_of(dataset, stored)
    assert presentation.kind == "lut"
    np.testing.assert_allclose(presentation.to_unit(stored), expected / 4095, atol=1e-6)


@pytest.mark.parametrize(("bits", "width"), [(16, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("little_endian", [True, False])
def test_lut_data_as_bytes(bits, width, little_endian):
    data = np.linspace(0, 2**bits - 1, 256).astype(f"{'<' if little_endian else '>'}u{width}")
    item = lut_item(data, bits=bits)
    item.add_new("LUTData", "OW", data.tobytes())
    dataset = header(8, VOILUTSequence=[item])
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=little_endian)
    stored = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = data.astype(np.float64).reshape(16, 16) / (2**bits - 1)
    np.testing.assert_allclose(presentation_of(dataset, stored).to_unit(stored), expected, atol=1e-6)


@pytest.mark.parametrize("little_endian", [True, False])
@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (8190, "a LUT holds 8190 bytes; expected 4096 entries of 8 bits in bytes or words"),
        (8000, "a LUT holds 8000 bytes; expected 4096 entries of 8 bits in bytes or words"),
        (5000, "a LUT holds 5000 bytes; expected 4096 entries of 8 bits in bytes or words"),
        (4096, "a LUT of 8 bits holds 2048 words; expected 4096 entries; cut short"),
        (4000, "a LUT holds 4000 bytes; expected 4096 entries of 8 bits in bytes or words"),
    ],
)
def test_words_of_8_bits_that_are_cut_are_no_bytes(length, reason, little_endian):
    data = (np.arange(4096) // 16).astype("<u2" if little_endian else ">u2")
    item = lut_item(data, bits=8)
    item.add_new("LUTData", "OW", data.tobytes()[:length])
    with pytest.raises(GBCIError, match=reason):
        lut_entries(item, big_endian=not little_endian)
    dataset = header(VOILUTSequence=[item])
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=little_endian)
    with pytest.raises(GBCIError, match=reason):
        presentation_of(dataset, EVERY_12_BIT)


@pytest.mark.parametrize("size", [255, 256])
def test_bytes_are_padded_to_an_even_length(size):
    data = np.arange(size, dtype=np.uint8)
    item = lut_item(data, bits=8)
    item.add_new("LUTData", "OW", data.tobytes() + b"\0" * (size % 2))
    entries = lut_entries(item, big_endian=True)
    assert entries.dtype == np.uint8
    np.testing.assert_array_equal(entries, data)


def test_lut_of_65536_entries_and_a_negative_start_written_as_unsigned():
    # A size of 0 means 65536. The LUT's input is signed, so its first value is read as negative.
    data = np.arange(65536)
    item = lut_item(data)
    item.add_new("LUTDescriptor", "US", [0, 65536 - 1024, 16])
    dataset = header(RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=[item])
    unit = presentation_of(dataset, EVERY_12_BIT).to_unit(EVERY_12_BIT)
    np.testing.assert_allclose(unit, EVERY_12_BIT / 65535, atol=1e-7)


def test_the_first_of_several_windows_is_used():
    several = header(WindowCenter=[1000, 2000], WindowWidth=[500, 100])
    first = header(WindowCenter=1000, WindowWidth=500)
    shown = (presentation_of(dataset, EVERY_12_BIT).to_unit(EVERY_12_BIT) for dataset in (several, first))
    np.testing.assert_array_equal(*shown)


def test_monochrome1_is_inverted_last():
    tags = {"WindowCenter": 1000, "WindowWidth": 500, "RescaleSlope": 2, "RescaleIntercept": -100}
    normal = presentation_of(header(**tags), EVERY_12_BIT)
    inverted = presentation_of(header(PhotometricInterpretation="MONOCHROME1", **tags), EVERY_12_BIT)
    np.testing.assert_allclose(inverted.to_unit(EVERY_12_BIT), 1 - normal.to_unit(EVERY_12_BIT), atol=1e-7)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(4000, None), (3900, 4000), (4000, 3900)])
def test_padding_is_black(photometric, value, limit):
    dataset = header(WindowCenter=2048, WindowWidth=4096, PhotometricInterpretation=photometric)
    plain = presentation_of(dataset, EVERY_12_BIT).to_unit(EVERY_12_BIT)
    dataset.PixelPaddingValue = value
    if limit is not None:
        dataset.PixelPaddingRangeLimit = limit
    padded = presentation_of(dataset, EVERY_12_BIT)
    low, high = min(value, limit or value), max(value, limit or value)
    inside = np.isin(EVERY_12_BIT, range(low, high + 1))
    np.testing.assert_array_equal(padded.is_padding(EVERY_12_BIT), inside)
    np.testing.assert_array_equal(padded.to_unit(EVERY_12_BIT), np.where(inside, 0, plain))


def test_padding_written_with_the_other_sign():
    dataset = header(signed=True, WindowCenter=0, WindowWidth=4096, PixelPaddingValue=65536 - 2000)
    assert presentation_of(dataset, every_value(12, True)).padding == (-2000, -2000)


def test_padding_that_the_stored_bits_cannot_hold_marks_no_pixel():
    dataset = header(WindowCenter=2048, WindowWidth=4096, PixelPaddingValue=65535)
    assert presentation_of(dataset, EVERY_12_BIT).padding is None


@pytest.mark.parametrize("keyword", ["PixelPaddingValue", "PixelPaddingRangeLimit"])
def test_several_padding_values_are_refused(keyword):
    dataset = header(WindowCenter=2048, WindowWidth=4096, PixelPaddingValue=0)
    dataset.add_new(keyword, "US", [0, 4095])
    with pytest.raises(GBCIError, match=rf"{keyword} holds \[0.0, 4095.0\]; expected one integer"):
        presentation_of(dataset, EVERY_12_BIT)


# Percentiles --------------------------------------------------------------------------------------------------------


def test_percentiles_of_the_breast_by_hand():
    # 1000 pixels of breast, 101 ... 1100, and 600 of background: percentile 0.5 is the 5th value, 99.9 the 999th.
    stored = np.concatenate([np.full(600, 7), np.arange(101, 1101)]).astype(np.uint16).reshape(40, 40)
    presentation = presentation_of(header(), stored)
    assert presentation.kind == "percentiles"
    unit = presentation.to_unit(np.array([[7, 105, 602, 1099, 1100]], np.uint16))
    np.testing.assert_allclose(unit[0], [0, 0, 0.5, 1, 1], atol=1e-6)


def test_percentiles_of_monochrome1_are_those_of_the_mirrored_image():
    rng = np.random.default_rng(0)
    stored = np.where(rng.random((50, 50)) < 0.4, 0, rng.integers(200, 3000, (50, 50))).astype(np.uint16)
    normal = presentation_of(header(), stored).to_unit(stored)
    mirrored = (4095 - stored).astype(np.uint16)
    inverted = presentation_of(header(PhotometricInterpretation="MONOCHROME1"), mirrored).to_unit(mirrored)
    np.testing.assert_allclose(inverted, normal, atol=1e-6)


def test_padding_does_not_count_in_percentiles():
    image = np.arange(100, 356, dtype=np.uint16).reshape(16, 16)
    surrounded = np.full((32, 32), 4095, np.uint16)
    surrounded[:16, :16] = image
    alone = presentation_of(header(), image).to_unit(image)
    padded = presentation_of(header(PixelPaddingValue=4095), surrounded).to_unit(surrounded)
    np.testing.assert_array_equal(padded[:16, :16], alone)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_window_lets_a_copy_display_alike(photometric):
    stored = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    tags = {"PhotometricInterpretation": photometric, "RescaleSlope": 2, "RescaleIntercept": -1024}
    original = presentation_of(header(**tags), stored)
    center, width = original.window
    copy = presentation_of(header(WindowCenter=center, WindowWidth=width, **tags), stored)
    np.testing.assert_array_equal(copy.to_unit(stored), original.to_unit(stored))


def test_two_valued_image_is_black_and_white():
    stored = np.array([[3, 3], [9, 3]], np.uint16)
    assert presentation_of(header(), stored).to_unit(stored).tolist() == [[0, 0], [1, 0]]


# For Processing -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    relationship=st.sampled_from(["LIN", "LOG", ""]),
    sign=st.sampled_from([1, -1]),
    bits=st.sampled_from([10, 12, 14]),
    seed=st.integers(0, 2**32 - 1),
)
def test_raw_images_are_bright_where_they_are_dense(photometric, relationship, sign, bits, seed):
    dataset = header(bits, PhotometricInterpretation=photometric, PresentationIntentType="FOR PROCESSING")
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = relationship, sign
    stored = np.random.default_rng(seed).integers(1, 2**bits, (20, 20)).astype(np.uint16)
    presentation = presentation_of(dataset, stored)
    assert presentation.kind == "for processing"
    unit = presentation.to_unit(stored)
    assert (unit.min(), unit.max()) == (0, 1)
    rising = np.diff(unit.ravel()[np.argsort(stored.ravel(), kind="stable")])
    assert (-sign * rising >= 0).all()
    # A copy with the LUT displays alike, bit for bit.
    first, table = presentation.lut
    copy = header(bits, PhotometricInterpretation=photometric, VOILUTSequence=[lut_item(table, first)])
    np.testing.assert_array_equal(presentation_of(copy, stored).to_unit(stored), unit)


def test_half_the_intensity_is_one_step_of_the_display_anywhere():
    dataset = header(PixelIntensityRelationship="LIN", PixelIntensityRelationshipSign=1)
    dataset.PresentationIntentType = "FOR PROCESSING"
    unit = presentation_of(dataset, EVERY_12_BIT).to_unit(np.array([[64, 128, 256, 512, 1024, 2048]], np.uint16))
    np.testing.assert_allclose(np.diff(unit[0]), np.diff(unit[0]).mean(), atol=2e-5)
    assert np.diff(unit[0]).mean() < -0.05


@pytest.mark.parametrize(
    ("intercept", "reason"),
    [(0, "every pixel has one and the same value"), (-5000, "an image For Processing without a positive X-ray")],
)
def test_intensity_without_a_positive_value_is_refused(intercept, reason):
    dataset = header(signed=True, PixelIntensityRelationship="LIN", PixelIntensityRelationshipSign=1)
    dataset.PresentationIntentType, dataset.RescaleIntercept = "FOR PROCESSING", intercept
    with pytest.raises(GBCIError, match=reason):
        presentation_of(dataset, -np.arange(100, dtype=np.int16).reshape(10, 10))


# Pasting ------------------------------------------------------------------------------------------------------------


@st.composite
def presentations(draw, kinds=("LINEAR", "LINEAR_EXACT", "SIGMOID", "lut", "percentiles")):
    """A monotone presentation of 8 to 12 bits, and an image [12, 12] for it."""
    bits, signed = draw(st.sampled_from([8, 10, 12])), draw(st.booleans())
    dataset = header(bits, signed, PhotometricInterpretation=draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"])))
    values = every_value(bits, signed)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        dataset.RescaleSlope, dataset.RescaleIntercept = draw(st.sampled_from([(2, -1024), (-1, 100), (0.25, 0)]))
    modality = apply_modality_lut(values, dataset).astype(np.float64)
    kind = draw(st.sampled_from(kinds))
    if kind == "lut":
        table = np.sort(rng.integers(0, 65536, 2**bits // 2))
        dataset.VOILUTSequence = [lut_item(table, int(modality.mean()) - 2 ** (bits - 2))]
    elif kind != "percentiles":
        dataset.VOILUTFunction = kind
        spread = np.ptp(modality)
        dataset.WindowCenter = round(modality.min() + draw(st.floats(0.2, 0.8)) * spread, 2)
        dataset.WindowWidth = round(draw(st.floats(0.2, 1.5)) * spread, 2)
    if draw(st.booleans()):
        dataset.PixelPaddingValue = int(draw(st.sampled_from([values.min(), values.max(), int(values.mean())])))
    stored = rng.choice(values.ravel(), (12, 12))
    return presentation_of(dataset, stored), stored


@settings(max_examples=100, deadline=None)
@given(presentations(), st.integers(0, 2**32 - 1))
def test_pasting_what_is_there_changes_no_bit(case, seed):
    presentation, stored = case
    rng = np.random.default_rng(seed)
    unit = presentation.to_unit(stored)
    np.testing.assert_array_equal(presentation.paste(stored, unit), stored)
    # Around a change, the other pixels keep their values, too.
    new, changed = unit.copy(), rng.random(stored.shape) < 0.3
    new[changed] = rng.random(changed.sum())
    pasted = presentation.paste(stored, new)
    assert pasted.dtype == stored.dtype
    np.testing.assert_array_equal(pasted[~changed], stored[~changed])


@settings(max_examples=100, deadline=None)
@given(presentations(), st.integers(0, 2**32 - 1))
def test_padding_is_neither_changed_nor_hit_and_bits_stored_suffice(case, seed):
    presentation, stored = case
    pasted = presentation.paste(stored, np.random.default_rng(seed).random(stored.shape).round(1).astype(np.float32))
    padding = presentation.is_padding(stored)
    np.testing.assert_array_equal(pasted[padding], stored[padding])
    np.testing.assert_array_equal(presentation.is_padding(pasted), padding)
    assert presentation.limits[0] <= pasted.min()
    assert pasted.max() <= presentation.limits[1]


@settings(max_examples=100, deadline=None)
@given(presentations(kinds=("LINEAR", "LINEAR_EXACT", "percentiles")), st.integers(0, 2**32 - 1))
def test_inside_the_window_the_new_display_is_right_within_one_stored_step(case, seed):
    presentation, stored = case
    low, high = presentation.limits
    reachable = presentation.levels[np.arange(low, high + 1)]
    new = np.random.default_rng(seed).uniform(reachable.min(), reachable.max(), stored.shape).astype(np.float32)
    unit = presentation.to_unit(stored)
    inside = (unit > 0) & (unit < 1) & ~presentation.is_padding(stored)
    pasted = presentation.paste(stored, new)
    # Rounding changes a value by up to half a step, moving off the padding value by up to one more.
    step = np.abs(np.diff(reachable)).max() * (1 if presentation.padding is None else 2)
    assert (np.abs(presentation.to_unit(pasted) - new)[inside] <= step + 1e-5).all()


@settings(max_examples=100, deadline=None)
@given(presentations(), st.integers(0, 2**32 - 1))
def test_brighter_moves_every_stored_value_the_same_way(case, seed):
    presentation, stored = case
    low, high = presentation.limits
    direction = np.sign(np.float64(presentation.levels[high]) - presentation.levels[low])
    unit = presentation.to_unit(stored)
    brighter = unit + np.random.default_rng(seed).random(stored.shape, np.float32) * (1 - unit)
    moved = presentation.paste(stored, brighter).astype(int) - stored
    assert (moved * direction >= 0).all()


def test_brighter_lowers_stored_values_of_monochrome1():
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    stored = np.full((4, 4), 3000, np.uint16)
    stored[0, 0] = 0
    normal = presentation_of(header(**tags), stored)
    inverted = presentation_of(header(PhotometricInterpretation="MONOCHROME1", **tags), stored)
    tenth = np.where(stored == 3000, np.float32(0.1), 0)
    assert normal.paste(stored, normal.to_unit(stored) + tenth)[1, 1] == 3410  # 0.1 · 4095 = 409.5, 3409.5 to even
    assert inverted.paste(stored, inverted.to_unit(stored) + tenth)[1, 1] == 2590


def test_where_the_window_clips_the_difference_is_added():
    # Window 1000 ... 2000: 2500 shows as 1. Darkening by a quarter subtracts 250 from the stored value, not 750.
    stored = np.array([[2500, 500], [1500, 4095]], np.uint16)
    presentation = presentation_of(header(WindowCenter=1500.5, WindowWidth=1001), stored)
    assert presentation.to_unit(stored).tolist() == [[1, 0], [0.5, 1]]
    new = np.array([[0.75, 0.25], [0.75, 1]], np.float32)
    assert presentation.paste(stored, new).tolist() == [[2250, 750], [1750, 4095]]


def test_pasted_values_stay_within_bits_stored():
    stored = np.array([[4090, 5], [2000, 3000]], np.uint16)
    presentation = presentation_of(header(WindowCenter=2048, WindowWidth=100), stored)
    wide = presentation.paste(stored, np.array([[0.0, 1.0], [0.0, 1.0]], np.float32))
    assert wide[0].tolist() == [3991, 104]
    presentation = presentation_of(header(WindowCenter=2048, WindowWidth=8192), stored)
    assert presentation.paste(stored, np.array([[1.0, 0.0], [0.5, 0.5]], np.float32))[0].tolist() == [4095, 0]


def test_pasting_full_resolution_sixteen_bits_is_exact():
    presentation = full_scale(16)
    stored = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    target = stored[::-1, ::-1]
    np.testing.assert_array_equal(presentation.paste(stored, presentation.to_unit(target)), target)


def test_lut_that_is_not_monotone_cannot_be_pasted_into():
    data = np.concatenate([np.arange(2048), np.arange(2048)[::-1]])
    presentation = presentation_of(header(VOILUTSequence=[lut_item(data, bits=12)]), EVERY_12_BIT)
    with pytest.raises(GBCIError, match="lookup table is not monotone"):
        presentation.paste(EVERY_12_BIT, np.full(EVERY_12_BIT.shape, 0.3, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_new_image_must_be_finite(value):
    with pytest.raises(GBCIError, match="the new image holds NaN or infinity"):
        full_scale(12).paste(EVERY_12_BIT, np.full(EVERY_12_BIT.shape, value, np.float32))


def test_new_image_must_have_the_same_shape():
    with pytest.raises(GBCIError, match=r"shape \(64, 32\); expected that of the original, \(64, 64\)"):
        full_scale(12).paste(EVERY_12_BIT, np.zeros((64, 32), np.float32))


def test_from_file_to_file_only_the_changed_pixels_differ(make_dicom):
    rng = np.random.default_rng(0)
    stored = rng.integers(-500, 500, (32, 32)).astype(np.int16)
    tags = {"BitsStored": 12, "WindowCenter": 0, "WindowWidth": 900, "PhotometricInterpretation": "MONOCHROME1"}
    mammogram = read_mammogram(make_dicom(stored, **tags))
    assert isinstance(mammogram.presentation, Presentation)
    new = mammogram.unit().copy()
    new[8:16, 8:16] = 0.5
    again = read_mammogram(make_dicom(mammogram.presentation.paste(mammogram.stored, new), name="new.dcm", **tags))
    outside = np.ones(stored.shape, bool)
    outside[8:16, 8:16] = False
    np.testing.assert_array_equal(again.stored[outside], stored[outside])
    in_window = ~outside & (np.abs(stored) < 400)
    np.testing.assert_allclose(again.unit()[in_window], 0.5, atol=1 / 899)
