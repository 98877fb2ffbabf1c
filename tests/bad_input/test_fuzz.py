"""A few seconds of the fuzzer, and regression tests of the faults that it has found."""

import importlib.util
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames

from gbci_fast.data.mask_files import read_mask
from gbci_fast.dicom.reading import read_mammogram
from gbci_fast.errors import GBCIError, one_line

FUZZ = Path(__file__).parents[1] / "fuzz"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("seeds", FUZZ / "seeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.remake(tmp_path_factory.mktemp("fuzz") / "seeds")


def test_smoke(tmp_path):
    command = [sys.executable, FUZZ / "fuzz_readers.py", "--seconds", "4", "--seed", "7", "--output", tmp_path]
    done = subprocess.run([*command, "--kinds", "dicom,png,mask,table"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "refused" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_warning_of_the_decoder_refuses_the_file(seeds, tmp_path, capfd):
    """libjpeg fills in what is missing from lossless data, says so on stderr alone, and returns an image."""
    dataset = pydicom.dcmread(seeds / "dicom" / "JPEGLosslessSV1-window.dcm")
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")
    dataset.PixelData = encapsulate([frame[: len(frame) * 2 // 3] + b"\xff\xd9"])
    dataset.save_as(tmp_path / "x.dcm")
    with pytest.raises(GBCIError, match=r"x.dcm: damaged or not decodable \(Corrupt JPEG data: premature end"):
        read_mammogram(tmp_path / "x.dcm")
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_panics_prints_nothing(seeds, tmp_path, capfd):
    dataset = pydicom.dcmread(seeds / "dicom" / "RLELossless-window.dcm")
    frame = bytearray(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    second = int.from_bytes(frame[8:12], "little")
    frame[second:] = b"\x00\x01" + b"\x81\x00" * 32
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset.save_as(tmp_path / "x.dcm")
    with pytest.raises(GBCIError):
        read_mammogram(tmp_path / "x.dcm")
    assert capfd.readouterr() == ("", "")


def test_quoted_values_are_printable_and_short(seeds, tmp_path):
    content = (seeds / "dicom" / "ExplicitVRLittleEndian-window.dcm").read_bytes()
    (tmp_path / "x.dcm").write_bytes(content.replace(b"MONOCHROME2", b"MONO\x00\x1bROME2"))
    with pytest.raises(GBCIError) as raised:
        read_mammogram(tmp_path / "x.dcm")
    assert r"a color image (MONO\x00\x1bROME2, 1 samples per pixel)" in str(raised.value)
    assert len(one_line("x" * 5000)) < 1000
    assert one_line("a\nb\udcff") == r"a\nb\udcff"


@pytest.mark.parametrize("kind", ["png", "mask"])
def test_a_chunk_of_four_gigabytes(seeds, tmp_path, kind):
    """Pillow asks for as many bytes as the next chunk claims."""
    name = "gray8.png" if kind == "png" else "gray.png"
    content = bytearray((seeds / kind / name).read_bytes())
    content[33:37] = b"\xff\xff\xff\xfe"  # the length of the first IDAT
    (tmp_path / "x.png").write_bytes(content)
    tracemalloc.start()
    try:  # it may be read: all pixels are there, and Pillow tolerates the rest
        (read_mammogram if kind == "png" else read_mask)(tmp_path / "x.png")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
