"""What tests of several folders use: a tiny pipeline, a disk that loses power, DICOM files, real films."""

import copy
import os
import stat
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    generate_uid,
)

from gbci_fast.data.segmentation import breast_mask
from gbci_fast.dicom.reading import read_mammogram

GDCM_SYNTAXES = {JPEGLosslessSV1: "JPEGLosslessProcess14_1", JPEGLSLossless: "JPEGLSLossless"}


@cache
def _tiny_parts(size: int, spread: float, seed: int) -> dict:
    """Modules of random weights for `size` x `size` pixels, in evaluation mode; `spread` is added to the UNet's."""
    import torch  # torch and diffusers take seconds to import: tests/dicom starts without them

    from gbci_fast.training.ldm import build_pipeline
    from gbci_fast.training.stages import ldm_preset, vae_preset
    from gbci_fast.training.vae import build_vae

    torch.manual_seed(seed)
    made = build_pipeline(ldm_preset("tiny")[0], build_vae(vae_preset("tiny")[0]), size)
    if spread:
        with torch.no_grad():
            for weight in made.unet.parameters():
                weight.add_(spread * torch.randn_like(weight))
    return {name: part.eval() for name, part in made.components.items() if isinstance(part, torch.nn.Module)}


@pytest.fixture(scope="session")
def tiny_pipeline():
    """`tiny_pipeline(size=64, spread=0.0, seed=0, shared=False)`: a silent pipeline of untrained modules.

    `size` is the side of its images in pixels; a latent cell is 4 x 4 pixels. `spread` is the standard deviation of
    noise on every weight of the UNet: zero biases and unit gains would hide what is left out. Each pipeline has a
    scheduler of its own, and modules of its own unless `shared`: a test leaves shared modules as they are.
    """

    def make(size=64, *, spread=0.0, seed=0, shared=False):
        from gbci_fast.model.pipeline import GBCIPipeline
        from gbci_fast.training.ldm import build_scheduler

        parts = _tiny_parts(size, spread, seed)
        made = GBCIPipeline(**(parts if shared else copy.deepcopy(parts)), scheduler=build_scheduler())
        made.set_progress_bar_config(disable=True)
        return made

    return make


@pytest.fixture(scope="session")
def square():
    """`square(top=30, left=30, side=20, **changes)`: a case of a bright square lesion, its mask, in a gray breast."""
    from gbci_fast.attributes import Attributes
    from gbci_fast.evaluate.lesions import LesionCase

    def make(top=30, left=30, side=20, **changes):
        lesion = np.zeros((96, 96), bool)
        lesion[top : top + side, left : left + side] = True
        given = {"root": "set", "image_id": "image", "number": 0, "patient": "set/p", "split": "test", "seed": 1}
        given |= {"image": np.where(lesion, 50000, 20000).astype(np.uint16), "breast": np.ones_like(lesion)}
        given |= {"lesion": lesion, "mask": lesion, "attributes": Attributes(), "report": None}
        return LesionCase(**(given | changes))

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_pipeline, tmp_path_factory):
    """`tiny_checkpoint(size=64)`: the folder of a saved `tiny_pipeline`, one per size; a test leaves it as it is."""

    @cache
    def saved(size=64):
        folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
        tiny_pipeline(size, shared=True).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def sample():
    """`sample(pipe, **options)`: one image of 64 x 64 pixels with a lesion, as a call of a `tiny_pipeline`."""
    import torch

    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 12:30, 10:33] = 1

    def call(pipe, **options):
        options = {"num_inference_steps": 2, "output_type": "latent", "seed": 5, "report": "a mass"} | options
        return pipe(image, mask, **options).images

    return call


class RecordedDisk:
    """A folder whose calls of ``fsync`` are recorded, so that a power cut can be simulated.

    After the cut, a file has the content of its last sync (without one, it is empty), and a folder has the names of its
    last sync. Some file systems also keep names that were never synced: `cut` simulates both kinds.
    """

    def __init__(self, root: Path):
        self.root = root
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._kinds: dict[int, bool] = {}  # whether an inode is a folder
        self._held: list[int] = []  # descriptors: an inode is not used again while it is open
        self._lock = threading.Lock()
        self.states: list[tuple[dict, dict, dict]] = []

    def note(self, descriptor: int) -> None:
        """Notes what a call of ``os.fsync`` does."""
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self.root):
            return
        with self._lock:
            names = self._names()
            self._held.append(os.dup(descriptor))
            status = os.fstat(descriptor)
            self._kinds[status.st_ino] = stat.S_ISDIR(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                self._folders[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
                self._kinds |= {entry.inode(): entry.is_dir() for entry in os.scandir(path)}
            else:
                self._files[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self.states.append((dict(self._files), dict(self._folders), names))

    def cut(self, count: int, target: Path, *, names: bool) -> None:
        """Writes into `target` what a power cut after so many calls of ``fsync`` leaves.

        Args:
            names: whether names are kept that were not synced, up to the next call.
        """
        files, folders, _ = self.states[count - 1]
        if names:
            folders = self.states[count][2]
        self._restore(self.root.stat().st_ino, target, files, folders)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _restore(self, inode: int, target: Path, files: dict, folders: dict) -> None:
        target.mkdir(parents=True)
        for name, below in folders.get(inode, {}).items():
            if self._kinds[below]:
                self._restore(below, target / name, files, folders)
            else:
                (target / name).write_bytes(files.get(below, b""))

    def _names(self) -> dict[int, dict[str, int]]:
        found = {}
        for folder, _, _ in os.walk(self.root):
            entries = list(os.scandir(folder))
            self._kinds |= {entry.inode(): entry.is_dir() for entry in entries}
            found[Path(folder).stat().st_ino] = {entry.name: entry.inode() for entry in entries}
        return found


@pytest.fixture
def recorded_disk(tmp_path, monkeypatch):
    """A `RecordedDisk` that is empty."""
    disk, fsync = RecordedDisk(tmp_path / "disk"), os.fsync
    disk.root.mkdir()

    def recorded(descriptor):
        disk.note(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    yield disk
    disk.close()


def image_dataset(stored, **tags):
    """Header and pixels of `stored` [H, W]; `tags` override any attribute, None removes it."""
    bits = 8 * stored.dtype.itemsize
    dataset = Dataset()
    dataset.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "MG"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = bits
    dataset.BitsStored = tags.get("BitsStored", bits)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.add_new("PixelData", "OB" if bits == 8 else "OW", stored.tobytes() + b"\0" * (stored.nbytes % 2))
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


@pytest.fixture(scope="session")
def outlined():
    """Called with a path: pixels in [0, 1], the breast's mask, and the mammogram."""

    @cache
    def read(path):
        mammogram = read_mammogram(path)
        unit = mammogram.unit()
        return unit, breast_mask(unit), mammogram

    return read


def write(dataset, path, syntax=ExplicitVRLittleEndian):
    """Writes in any transfer syntax that pydicom or GDCM can encode."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    if syntax == ExplicitVRBigEndian:
        width = dataset.BitsAllocated // 8
        dataset["PixelData"].value = np.frombuffer(dataset.PixelData, f"<u{width}").astype(f">u{width}").tobytes()
    if syntax.is_encapsulated and syntax not in GDCM_SYNTAXES:
        dataset.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    elif syntax.is_deflated:
        dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    if syntax in GDCM_SYNTAXES:
        _transcode(path, GDCM_SYNTAXES[syntax])
    return path


def _transcode(path, syntax):
    import gdcm  # not before pydicom, which has loaded the system's zlib: see gbci_fast/dicom/__init__.py

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.fixture
def make_dicom(tmp_path):
    """`make_dicom(stored, name="image.dcm", syntax=..., **tags)` writes a file and returns its path."""

    def make(stored, name="image.dcm", syntax=ExplicitVRLittleEndian, **tags):
        return write(image_dataset(stored, **tags), tmp_path / name, syntax)

    return make


@pytest.fixture
def ramp():
    """uint16 [16, 32]: 512 different 12-bit values, 8 apart."""
    return (np.arange(512, dtype=np.uint16) * 8).reshape(16, 32)
