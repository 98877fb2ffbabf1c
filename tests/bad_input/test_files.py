"""Image and mask files that cannot be used: one line is one case."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, RLELossless

NAME = "scan_LCC"


def raw(content):
    return lambda world, folder: _write(folder / f"{NAME}.dcm", content)


def dicom(syntax=None, cut=None, frame=None, **tags):
    """The phantom's image with other tags (None = without), encoded, its frame changed, the file cut to a share."""

    def make(world, folder):
        dataset, path = pydicom.dcmread(world["image"]), folder / f"{NAME}.dcm"
        for keyword, value in tags.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        if syntax is not None and "PixelData" not in dataset:
            dataset.file_meta.TransferSyntaxUID = syntax
        elif syntax is not None:
            dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        if frame is not None:
            encoded = next(generate_frames(dataset.PixelData, number_of_frames=1))
            dataset.PixelData = encapsulate([frame(encoded)])
        dataset.save_as(path)
        return path if cut is None else _write(path, path.read_bytes()[: int(cut * path.stat().st_size)])

    return make


def blank(value):
    return lambda world, folder: _png(folder / f"{NAME}.png", np.full((192, 160), value, np.uint16))


def png(mode=None, name=NAME, cut=None, header=None):
    def make(world, folder):
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
        image, path = Image.fromarray(pixels), folder / f"{name}.png"
        (image.convert("RGB").convert(mode) if mode else image).save(path)
        content = bytearray(path.read_bytes())
        if header is not None:
            content[16:24] = struct.pack(">II", *header)
            content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return _write(path, bytes(content[: None if cut is None else int(cut * len(content))]))

    return make


def dust(world, folder):
    pixels = np.zeros((192, 160), np.uint16)
    pixels[::40, ::40] = 60000
    return _png(folder / f"{NAME}.png", pixels)


def lut(descriptor, data):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "US", data)
    return [item]


def _write(path, content):
    path.write_bytes(content)
    return path


def _png(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


# What makes INPUT -> what `generate` says of it.
IMAGES = {
    "empty": (raw(b""), "an empty file; expected a DICOM or PNG file"),
    "gif": (raw(b"GIF89a" + bytes(200)), "neither DICOM nor PNG by its content"),
    "zeros": (raw(bytes(500)), "neither DICOM nor PNG by its content"),
    "preamble alone": (raw(bytes(128) + b"DICM"), "scan_LCC.dcm: "),
    "no pixels": (dicom(PixelData=None), "damaged or not decodable (PixelData holds"),
    "no rows": (dicom(Rows=None), "the header claims 160 x None pixels"),
    "zero rows": (dicom(Rows=0), "the header claims 160 x 0 pixels"),
    "more rows than pixels": (dicom(Rows=193), "PixelData holds"),
    "huge": (dicom(Rows=65535, Columns=65535), "the header claims 65535 x 65535 pixels; expected 1 to 150000000"),
    "large": (dicom(Rows=12000, Columns=12000), "bytes)"),
    "frames": (dicom(NumberOfFrames=3), "3 frames; expected a single image"),
    "color": (dicom(PhotometricInterpretation="RGB", SamplesPerPixel=3), "a color image (RGB, 3 samples per pixel)"),
    "bits": (dicom(BitsStored=4), "BitsAllocated, BitsStored and HighBit are 16, 4 and"),
    "wide": (dicom(BitsAllocated=32), "BitsAllocated, BitsStored and HighBit are 32,"),
    "sign": (dicom(PixelRepresentation=2), "PixelRepresentation is 2; expected 0 or 1"),
    "window": (dicom(WindowWidth="0"), "and WindowWidth 0.0; expected numbers that LINEAR"),
    "window function": (dicom(VOILUTFunction="GAMMA"), "VOILUTFunction is 'GAMMA'; expected LINEAR"),
    "rescale": (dicom(RescaleSlope="0"), "RescaleSlope is 0.0 and RescaleIntercept"),
    "lut": (dicom(VOILUTSequence=lut([4, 0, 16], [1, 2, 3])), "a LUT holds 3 entries"),
    "lut bits": (dicom(VOILUTSequence=lut([3, 0, 24], [1, 2, 3])), "a LUTDescriptor asks for 24 bits per entry"),
    "spacing": (dicom(ImagerPixelSpacing=["0", "0"]), "ImagerPixelSpacing is [0, 0]; expected two numbers"),
    "cut": (dicom(cut=0.5), "damaged or not decodable (PixelData holds"),
    "cut in the header": (dicom(cut=0.01), "scan_LCC.dcm: "),
    "rle cut": (dicom(RLELossless, frame=lambda f: f[: len(f) // 4 * 2]), "damaged or not decodable"),
    "rle garbage": (dicom(RLELossless, frame=lambda f: f[:64] + bytes(64)), "damaged or not decodable"),
    "rle of nothing": (dicom(RLELossless, PixelData=None), "no PixelData, or cut short before its end"),
    "j2k cut": (dicom(JPEG2000Lossless, frame=lambda f: f[: len(f) // 4 * 2]), "damaged or not decodable"),
    "j2k garbage": (dicom(JPEG2000Lossless, frame=lambda f: b"\xff\x4f" + bytes(98)), "damaged JPEG 2000 data: no"),
    "j2k size": (
        dicom(JPEG2000Lossless, frame=lambda f: f[:8] + struct.pack(">I", 2**31) + f[12:]),
        "damaged JPEG 2000 data: its frame has 1 components, rows and columns [192, 2147483648]",
    ),
    "png color": (png("RGB"), "a PNG of color type 2 with 8 bits; expected gray"),
    "png alpha": (png("LA"), "a PNG of color type 4 with 8 bits; expected gray"),
    "png palette": (png("P"), "a PNG of color type 3 with 8 bits; expected gray"),
    "png bits": (png("1"), "a PNG of color type 0 with 1 bits; expected gray"),
    "png cut": (png(cut=0.5), "image file is truncated; expected a readable DICOM or PNG file"),
    "png header cut": (raw(b"\x89PNG\r\n\x1a\n" + bytes(4)), "damaged or not decodable"),
    "png huge": (png(header=(100_000, 100_000)), "the header claims 100000 x 100000 pixels; expected 1 to 150000000"),
    "png bomb": (png(header=(12_000, 12_000)), "the header claims 12000 x 12000 pixels; a file of"),
    "png nothing": (png(header=(0, 10)), "the header claims 0 x 10 pixels"),
    "black": (blank(0), "every pixel has one and the same value; expected an image"),
    "white": (blank(65535), "every pixel has one and the same value; expected an image"),
    "dust": (dust, "no breast found"),
    "no view": (png(name="scan"), "view is unknown and side unknown; DICOM needs both: write them"),
}  # fmt: skip


def _made(make, world, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    return make(world, folder)


@pytest.mark.parametrize(("make", "said"), IMAGES.values(), ids=IMAGES)
def test_image(world, refused, tmp_path, make, said):
    path = _made(make, world, tmp_path)
    sentence = refused(f"generate {path}")
    assert str(path) in sentence
    assert said in sentence


@pytest.mark.parametrize("name", ["gif", "huge", "cut", "rle garbage", "png bomb", "dust"])
def test_image_to_prepare(world, refused, tmp_path, name):
    make, said = IMAGES[name]
    path = _made(make, world, tmp_path)
    sentence = refused(f"prepare {path} --workers 1")
    assert path.name in sentence
    assert said in sentence


MASKS = {
    "absent": (lambda path: None, "cannot be read as a mask image: No such file or directory"),
    "text": (lambda path: path.write_text("no image"), "cannot be read as a mask image; expected one of PNG"),
    "color": (lambda path: Image.new("RGB", (160, 192), "red").save(path), "is a color image; expected a gray mask"),
    "nothing": (lambda path: Image.new("L", (160, 192)).save(path), "is all zero; expected at least one pixel"),
    "size": (lambda path: Image.new("L", (192, 160), 255).save(path), "is 192x160 but the image is 160x192"),
    "bomb": (lambda path: _write(path, _gray_png(20_000, 6_000)), "claims 20000 x 6000 pixels, too many"),
    "labels": (
        lambda path: Image.fromarray(np.arange(192 * 160, dtype=np.uint8).reshape(192, 160) % 3).save(path),
        "has the values 0, 1, 2; expected two values, or the many grays of soft edges",
    ),
    "large labels": (
        lambda path: Image.fromarray(np.arange(192 * 160, dtype=np.uint16).reshape(192, 160) % 3 * 1000).save(path),
        "has the values 0, 1000, 2000; expected two values, or the many grays of soft edges",
    ),
    "122 samples per pixel": (lambda path: _tiff_of_samples(path, 122), "cannot be read as a mask image"),
    "folder": (lambda path: path.mkdir(), "cannot be read as a mask image: Is a directory"),
    "beside": (lambda path: _drawn(path, np.s_[0:2, 158:160]), "the mask lies outside the breast; expected it to"),
}  # fmt: skip


def _gray_png(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _tiff_of_samples(path, samples):
    """A TIFF that Pillow refuses with a log line of its own."""
    file = io.BytesIO()
    Image.new("L", (160, 192)).save(file, "TIFF", tiffinfo={277: 1})
    entry = struct.pack("<HHI", 277, 3, 1)  # SamplesPerPixel, SHORT, one value
    data = file.getvalue()
    assert entry + struct.pack("<I", 1) in data
    path.write_bytes(data.replace(entry + struct.pack("<I", 1), entry + struct.pack("<I", samples)))


def _drawn(path, where):
    mask = np.zeros((192, 160), np.uint8)
    mask[where] = 255
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize(("make", "said"), MASKS.values(), ids=MASKS)
def test_mask(refused, tmp_path, make, said):
    path = tmp_path / "drawn.png"
    make(path)
    assert said in refused(f"generate {{image}} --mask {path}")


def test_a_decoder_says_nothing_beside_our_sentence(tmp_path):
    """Runs in a process of its own, because pytest captures log lines."""
    _tiff_of_samples(tmp_path / "mask.tif", 122)
    script = (
        "import sys; from pathlib import Path; from gbci_fast.data.mask_files import read_mask\n"
        "try: read_mask(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "mask.tif"], capture_output=True, text=True)
    assert "cannot be read as a mask image; expected one of" in ended.stdout
    assert ended.stderr == ""
