"""Files that claim far more data than they hold are refused before memory is allocated."""

import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from gbci_fast.cli import main

MEBIBYTE = 2**20


def header(world, syntax=ExplicitVRLittleEndian):
    dataset = pydicom.dcmread(world["image"])
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def native(world, path):
    """12,000 x 12,000 pixels, of which the file holds 61 kB."""
    dataset = header(world)
    dataset.Rows = dataset.Columns = 12_000
    dataset.save_as(path)


def encoded(syntax):
    def make(world, path):
        dataset = header(world)
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        dataset.Rows = dataset.Columns = 12_000
        dataset.save_as(path)

    return make


def jpeg2000_of_its_own(world, path):
    """Header and codestream agree on 12,000 x 12,000."""
    dataset = header(world)
    dataset.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    side, start = (12_000).to_bytes(4, "big"), dataset.PixelData.index(b"\xff\x4f\xff\x51")
    data = bytearray(dataset.PixelData)
    for offset in (8, 12, 24, 28):  # the image and its only tile
        data[start + offset : start + offset + 4] = side
    dataset.PixelData, dataset.Rows, dataset.Columns = bytes(data), 12_000, 12_000
    dataset.save_as(path)


def deflated(world, path):
    """A quarter of a gigabyte of zeros, deflated; written in pieces, to take no memory here either."""
    dataset = header(world, DeflatedExplicitVRLittleEndian)
    del dataset.PixelData
    dataset.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    inside = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    element = b"\xe0\x7f\x10\x00OW\0\0" + (2**28).to_bytes(4, "little")
    zeros = bytes(MEBIBYTE)
    pieces = [packer.compress(inside + element), *(packer.compress(zeros) for _ in range(256)), packer.flush()]
    path.write_bytes(content[:start] + b"".join(pieces))


def false_length(world, path):
    """An element of 4 GB in a file of 30 kB."""
    header(world).save_as(path)
    content = path.read_bytes()
    tag = b"\xe0\x7f\x10\x00OW\0\0"
    at = content.index(tag) + len(tag)
    path.write_bytes(content[:at] + b"\xfe\xff\xff\xff" + content[at + 4 : at + 30_000])


def long_text(world, path):
    """Two million numbers in WindowCenter, which only an implicit VR can state."""
    dataset = header(world, ImplicitVRLittleEndian)
    dataset.WindowCenter = "12345678"
    dataset.save_as(path, implicit_vr=True, little_endian=True)
    content = path.read_bytes()
    at = content.index(b"\x28\x00\x50\x10")
    numbers = b"\\".join([b"1"] * 2_000_000) + b"\\"
    path.write_bytes(content[: at + 4] + len(numbers).to_bytes(4, "little") + numbers + content[at + 16 :])


def long_lut(world, path):
    """A LUT of 40 MB."""
    dataset, item = header(world), Dataset()
    for keyword in ("WindowCenter", "WindowWidth"):
        delattr(dataset, keyword)
    item.add_new("LUTDescriptor", "US", [0, 0, 16])
    item.add_new("LUTData", "OW", bytes(40 * MEBIBYTE))
    dataset.VOILUTSequence = [item]
    dataset.save_as(path)


def spliced(world, path, element):
    """The image with another element before its pixels."""
    header(world).save_as(path)
    content = path.read_bytes()
    at = content.index(b"\xe0\x7f\x10\x00OW")
    path.write_bytes(content[:at] + element + content[at:])


def many_items(tag, *, closed):
    """A sequence of a quarter of a million empty items, 8 bytes each, with or without its length."""

    def make(world, path):
        items = 250_000 * b"\xfe\xff\x00\xe0\x00\x00\x00\x00"
        if closed:
            spliced(world, path, tag + b"SQ\0\0" + len(items).to_bytes(4, "little") + items)
        else:
            spliced(world, path, tag + b"SQ\0\0\xff\xff\xff\xff" + items + b"\xfe\xff\xdd\xe0" + bytes(4))

    return make


SIZES = {
    "items": (many_items(b"\x54\x00\x20\x02", closed=True), "ViewCodeSequence holds 250000 items; expected at most"),
    "items without a length": (many_items(b"\x08\x00\x15\x11", closed=False), "more than 15000 elements and items"),
    "native": (native, "PixelData holds 61440 of 288000000 bytes"),
    "rle": (encoded(RLELossless), "cannot hold them"),
    "jpeg 2000": (encoded(JPEG2000Lossless), "its frame has 1 components, rows and columns [192, 160]"),
    "jpeg 2000 codestream": (jpeg2000_of_its_own, "cannot hold them"),
    "deflated": (deflated, "its deflated data set grows beyond"),
    "false length": (false_length, "PixelData holds"),
    "long text": (long_text, "WindowCenter holds 4000000 bytes; expected at most 65536"),
    "long lut": (long_lut, "a LUT holds 41943040 bytes; expected at most 131072"),
}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def case(world, tmp_path, request):
    make, said = request.param
    (tmp_path / "input").mkdir()
    path = tmp_path / "input" / "scan_LCC.dcm"
    make(world, path)
    return path, said


# VmHWM, not ru_maxrss: that one starts at the parent's, which has torch in memory.
READ = """
import re, sys
from pathlib import Path
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError

def memory(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

read_mammogram(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
try:
    read_mammogram(sys.argv[1])
    print(memory("VmHWM") - before, "read")
except GBCIError as error:
    print(memory("VmHWM") - before, error)
"""


def peak(world, path):
    """(peak bytes of reading, output), measured in another process, because decoders allocate outside of Python."""
    command = [sys.executable, "-c", READ, str(path), str(world["image"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    kilobytes, _, sentence = done.stdout.partition(" ")
    return int(kilobytes) * 1024, sentence


def test_peak_of_a_reader(world, case):
    path, said = case
    taken, sentence = peak(world, path)
    assert said in sentence
    assert taken < 16 * MEBIBYTE + 3 * path.stat().st_size


def test_the_peak_is_seen(world, tmp_path):
    """The measured peak grows with the size of the file."""
    dataset = header(world)
    stored = np.zeros((4096, 3328), np.uint16)
    stored[:192, :160] = dataset.pixel_array
    dataset.Rows, dataset.Columns, dataset.PixelData = *stored.shape, stored.tobytes()
    dataset.save_as(tmp_path / "x.dcm")
    taken, said = peak(world, tmp_path / "x.dcm")
    assert said == "read\n"
    assert taken > stored.nbytes


def test_refused(refused, case):
    path, said = case
    sentence = refused(f"generate {path}")
    assert said in sentence or "PixelData holds" in sentence  # the check of the header finds this first


def test_a_table_of_one_line(copy_of, tmp_path, capfd):
    """A gigabyte without a line break; sparse on the disk."""
    root = copy_of("root")
    with (root / "finding_annotations.csv").open("r+b") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        assert main(["priors", str(root), "--output", str(tmp_path / "priors.json")]) == 1
        assert tracemalloc.get_traced_memory()[1] < 32 * MEBIBYTE
    finally:
        tracemalloc.stop()
    assert "it has a line of more than 1048576 characters" in capfd.readouterr().err


def test_limits_let_real_images_pass(world):
    """The most compressible real image: a mammogram that is mostly air, encoded losslessly."""
    from gbci_fast.dicom.reading import read_mammogram

    dataset = pydicom.dcmread(world["image"])
    stored = np.zeros((4096, 3328), np.uint16)
    stored[:192, :160] = dataset.pixel_array
    dataset.Rows, dataset.Columns, dataset.PixelData = *stored.shape, stored.tobytes()
    for syntax in (JPEG2000Lossless, RLELossless):
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.Rows, dataset.Columns, dataset.PixelData = *stored.shape, stored.tobytes()
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        path = world["root"].parent / f"{syntax.keyword}.dcm"
        dataset.save_as(path)
        assert np.array_equal(read_mammogram(path).stored, stored)
        path.unlink()
