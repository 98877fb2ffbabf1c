"""A pipeline with random weights, small inputs, and jobs that several tests look at."""

import hashlib
import json
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom import Dataset

from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.dicom.writing import MammogramHeader, mammogram_dataset, uid_from_seed, write_dicom
from gbci_fast.generate.identities import job_identities
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.jobs.files import sha256_of
from gbci_fast.phantom import generate_phantom

QUICK = SamplerSettings(num_inference_steps=1, guidance_scale=1.0)


@pytest.fixture(scope="session")
def pipe(tiny_pipeline):
    """Untrained: what it paints is noise, but it goes through every step."""
    return tiny_pipeline(224, shared=True)


@pytest.fixture(scope="session")
def make_job(pipe):
    """`make_job(records or INPUT, output, mask=..., overrides=..., ...)`: a plan and its run; returns the plan.

    Its items have the ids under which they were published.
    """
    eager = pipe

    def make(
        inputs,
        output,
        *,
        pipe=eager,
        resume=False,
        skip_bad=False,
        on_batch=lambda images: None,
        workers=0,
        check="digests",
        settings=None,
        identities=None,
        seed=0,
        **planned,
    ):
        records = inputs if isinstance(inputs, list) else find_inputs(inputs)
        plan = make_plan(records, **{"variants": 1, "seed": seed, **planned})
        settings = {"batch_size": 2, "sampler": QUICK, "weights_hash": "ab" * 32, **(settings or {})}
        settings = JobSettings(seed=seed, **settings)
        identities = identities or job_identities(output, seed, {item.template.path for item in plan})
        options = {"resume": resume, "check": check, "skip_bad": skip_bad, "workers": workers, "on_batch": on_batch}
        run_job(pipe, plan, output, settings, identities=identities, **options)
        return [identities.item(item) for item in plan]

    make.sampler, make.pipe = QUICK, eager
    return make


@pytest.fixture(scope="session")
def stop_after():
    """`stop_after(count, error)`: an `on_batch` that raises once so many images are made."""

    def stop(count, error=KeyboardInterrupt):
        def on_batch(images):
            if images >= count:
                raise error

        return on_batch

    return stop


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """One VinDr study of four views; both left images show one mass, the right ones none."""
    root = tmp_path_factory.mktemp("phantom") / "root"
    generate_phantom(root, studies=1, seed=0, size=(192, 160))
    return root


@pytest.fixture(scope="session")
def finished(make_job, phantom, tmp_path_factory):
    """A job over the phantom, never interrupted: 4 images in batches of 2."""
    output = tmp_path_factory.mktemp("finished") / "data"
    make_job(phantom, output)
    return output


@pytest.fixture(scope="session")
def breast():
    """`breast(height, width)`: display values float64 [H, W], a textured half ellipse on the left."""

    def draw(height=160, width=120):
        y, x = np.mgrid[:height, :width]
        radius = np.hypot((y - height / 2) / (0.45 * height), x / (0.8 * width))
        texture = 0.6 + 0.25 * np.sin(x / 7) * np.cos(y / 9)
        return np.where(radius < 1, texture * (1 - radius**6) + 0.1, 0.0)

    return draw


@pytest.fixture(scope="session")
def write_template():
    """`write_template(path, stored, photometric=..., bits=..., **elements)`: a DICOM of the left breast, CC view."""

    def write(path, stored, photometric="MONOCHROME2", bits=16, **elements):
        like = Dataset()
        like.PhotometricInterpretation, like.BitsStored = photometric, bits
        for keyword, value in elements.items():
            setattr(like, keyword, value)
        header = MammogramHeader(
            view_position="CC",
            laterality="L",
            study_uid=uid_from_seed("study"),
            series_uid=uid_from_seed("series"),
            instance_uid=uid_from_seed(path.name),
            study_datetime=datetime(2000, 1, 1),
            patient_id="patient",
            software_version="1",
            derivation="",
            spacing=(0.5, 0.25),
        )
        write_dicom(mammogram_dataset(stored, header, like=like), path)
        return path

    return write


@pytest.fixture(scope="session")
def templates(breast, write_template, tmp_path_factory):
    """A folder with one template per way of storing pixels, by name."""
    folder, unit = tmp_path_factory.mktemp("templates"), breast()
    twelve = np.round(400 + 3000 * unit).astype(np.uint16)
    window = {"WindowCenter": "2400", "WindowWidth": "1000"}  # clips dark and bright tissue
    write_template(folder / "full_LCC.dcm", np.round(60000 * unit).astype(np.uint16))
    write_template(folder / "inverted_LCC.dcm", 4095 - twelve, photometric="MONOCHROME1", bits=12)
    write_template(folder / "windowed_LCC.dcm", twelve, bits=12, **window)
    for name, white, dtype in (("eight", 255, np.uint8), ("twelve", 4095, np.uint16), ("sixteen", 65535, np.uint16)):
        Image.fromarray(np.round(white * unit / unit.max()).astype(dtype)).save(folder / f"{name}_LCC.png")
    return folder


@pytest.fixture(scope="session")
def tree():
    """`tree(folder)`: SHA-256 of every file below, hidden ones too, by relative name."""

    def digest(folder):
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return digest


@pytest.fixture(scope="session")
def images_of(tree):
    """`images_of(output)`: SHA-256 of every file below ``images/`` and ``masks/``, by name."""
    return lambda output: {
        name: digest for name, digest in tree(output).items() if name.split("/")[0] in ("images", "masks")
    }


@pytest.fixture(scope="session")
def assert_valid_part(images_of):
    """`assert_valid_part(output, plan, count)`: `output` holds the first `count` images of the plan, and no others."""

    def check(output, plan, count):
        manifest = pd.read_parquet(output / "manifest.parquet")
        assert manifest.image_id.tolist() == [item.image_id for item in plan[:count]]
        assert images_of(output).keys() == {*manifest.dicom_file, *manifest.png_file, *manifest.mask_file}
        lesions = [mask for masks in manifest.finding_masks for mask in json.loads(masks)]
        assert len(lesions) >= count
        assert {mask["file"]: mask["sha256"] for mask in lesions} == {
            path.relative_to(output).as_posix(): sha256_of(path) for path in (output / "finding_masks").glob("*/*")
        }
        data = VinDr(output)
        assert [image.image_id for image in data.images] == manifest.image_id.tolist()
        assert data.missing() == []
        assert Image.open(output / "preview.png").size == (8 * 224, 224 * count + 18)

    return check
