"""Tables, plans, priors, checkpoints, caches and training runs that cannot be used: one line is one case."""

import csv
import json

import pytest

BREASTS, FINDINGS = "breast-level_annotations.csv", "finding_annotations.csv"


def cell(table, column, value):
    """Another value in the table's first row that has one there."""

    def damage(root):
        with (root / table).open(newline="") as file:
            rows = list(csv.DictReader(file))
        next(row for row in rows if row[column])[column] = value
        with (root / table).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    return damage


def text(table, change):
    """Another text of the table."""
    return lambda root: (root / table).write_bytes(change((root / table).read_bytes()))


def first_line(content):
    return content.splitlines(keepends=True)[0]


# What damages a VinDr root -> what `generate` says of it.
TABLES = {
    "no breasts": (lambda root: (root / BREASTS).unlink(), f"{BREASTS} does not exist; a VinDr-Mammo folder has it"),
    "empty": (text(BREASTS, lambda t: b""), "has no column study_id, series_id, image_id"),
    "no rows": (text(BREASTS, first_line), "has no rows; expected one per image"),
    "column": (text(BREASTS, lambda t: t.replace(b"image_id", b"picture", 1)), "has no column image_id; expected at"),
    "twice": (text(BREASTS, lambda t: t.replace(b"series_id", b"image_id", 1)), "has no column series_id"),
    "repeated": (text(BREASTS, lambda t: t.replace(b"split", b"split,age,age", 1)), "has more than one column age"),
    "short row": (text(BREASTS, lambda t: t + b"a,b,c\n"), "has 3 fields; expected"),
    "long row": (text(BREASTS, lambda t: t.rstrip() + b",more\n"), "line 5 has"),
    "latin": (text(BREASTS, lambda t: t + b"\xe9\n"), "cannot be read as a table: 'utf-8' codec can't"),
    "quote": (text(BREASTS, lambda t: t + b'"open\n'), "cannot be read as a table: unexpected end of data"),
    "field": (text(BREASTS, lambda t: t + b'"' + b"x\n" * 100_000), "cannot be read as a table: field larger than"),
    "line": (text(BREASTS, lambda t: t + b"x" * 2**21), "it has a line of more than 1048576 characters"),
    "up": (cell(BREASTS, "study_id", "../../etc"), "study_id is '../../etc'; expected an identifier that is a plain"),
    "absolute": (cell(BREASTS, "image_id", "/etc/passwd"), "image_id is '/etc/passwd'; expected an identifier"),
    "backslash": (cell(BREASTS, "image_id", "..\\x"), "expected an identifier that is a plain file name"),
    "dots": (cell(BREASTS, "study_id", ".."), "study_id is '..'; expected an identifier"),
    "drive": (cell(BREASTS, "study_id", "C:x"), "study_id is 'C:x'; expected an identifier"),
    "long id": (cell(BREASTS, "image_id", "x" * 300), "expected an identifier that is a plain file name"),
    "line in id": (cell(BREASTS, "image_id", "a\nb"), "image_id is 'a\\nb'; expected an identifier"),
    "split": (cell(BREASTS, "split", "validation"), "split is 'validation'; expected one of training, test"),
    "height": (cell(BREASTS, "height", "tall"), "height is 'tall'; expected a number of pixels"),
    "no height": (cell(BREASTS, "height", "0"), "height is '0'; expected a number of pixels"),
    "endless height": (cell(BREASTS, "height", "9" * 400), "expected a number of pixels"),
    "other height": (cell(BREASTS, "height", "193"), "has 192 rows and 160 columns; expected 193 and 160"),
    "birads": (cell(BREASTS, "breast_birads", "BI-RADS 9"), "breast_birads is 9; expected one of 1, 2, 3, 4, 5"),
    "density": (cell(BREASTS, "breast_density", "DENSITY E"), "breast_density is 'E'; expected one of A, B, C, D"),
    "view": (cell(BREASTS, "view_position", "XCCL"), "view_position is 'XCCL'; expected one of CC, MLO"),
    "no such image": (cell(BREASTS, "image_id", "other"), "does not stand in"),
    "finding": (cell(FINDINGS, "finding_categories", "['Lump']"), "finding_categories is 'Lump'; expected one of"),
    "nested": (cell(FINDINGS, "finding_categories", "[" * 5000), "expected a list such as ['Mass']"),
    "minus": (cell(FINDINGS, "finding_categories", "[" + "-" * 50_000 + "1]"), "expected a list such as ['Mass']"),
    "box": (cell(FINDINGS, "xmin", "9999"), "expected numbers with xmin < xmax and ymin < ymax"),
    "nan box": (cell(FINDINGS, "ymin", "1e999"), "expected numbers with xmin < xmax and ymin < ymax"),
    "half a box": (cell(FINDINGS, "xmax", ""), "expected numbers with xmin < xmax and ymin < ymax"),
    "folder": (lambda root: ((root / BREASTS).unlink(), (root / BREASTS).mkdir()), "cannot be read as a table"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), TABLES.values(), ids=TABLES)
def test_table(refused, copy_of, damage, said):
    damage(root := copy_of("root"))
    sentence = refused(f"generate {root} --output {{tmp}}/data")
    assert str(root) in sentence
    assert said in sentence


PLANS = {
    "empty": ("", "has no column image; expected at least image"),
    "no rows": ("image\n", "has no rows; expected one per synthetic image"),
    "unknown column": ("image,color\n{id},red\n", "column 'color' is not known; expected out of image, variant"),
    "unknown image": ("image\nother\n", "line 2: image is 'other'; expected an image_id of INPUT or a path below it"),
    "path": ("image\n../../../etc/passwd\n", "image is '../../../etc/passwd'; expected an image_id of INPUT or a path"),
    "absolute path": ("image\n/etc/passwd\n", "image is '/etc/passwd'; expected an image_id of INPUT or a path"),
    "variant": ("image,variant\n{id},-1\n", "variant is '-1'; expected a whole number from 0"),
    "seed": ("image,seed\n{id},99999999999999999999\n", "seed is '99999999999999999999'; expected a whole number"),
    "attribute": ("image,finding_birads\n{id},9\n", "line 2: finding_birads is 9; expected one of 1, 2, 3, 4, 5"),
    "two masks": ("image,mask,xmin,ymin,xmax,ymax\n{id},m.png,1,1,9,9\n", "expected one of them, or none"),
    "mask": ("image,mask\n{id},absent.png\n", "absent.png cannot be read as a mask image: No such file"),
    "box": ("image,xmin,ymin,xmax,ymax\n{id},9,1,1,9\n", "the box is (9, 1, 1, 9); expected numbers with xmin < xmax"),
    "box outside": ("image,xmin,ymin,xmax,ymax\n{id},900,1,990,9\n", "lies outside the image of 160 x 192 pixels"),
    "ellipse": ("image,center_x\n{id},5\n", "an ellipse has center_x; expected center_x, center_y and one of"),
    "aspect": ("image,center_x,center_y,diameter_px,aspect\n{id},50,90,9,99\n", "aspect is 99; expected a number from"),
    "number": ("image,center_x,center_y,diameter_px\n{id},50,90,inf\n", "diameter_px is 'inf'; expected a number"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), PLANS.values(), ids=PLANS)
def test_plan(refused, world, tmp_path, content, said):
    plan = tmp_path / "plan.csv"
    plan.write_text(content.replace("{id}", world["image"].stem))
    assert said in refused(f"generate {{root}} --plan {plan}")


PRIORS = {
    "empty": ("", "cannot be read as lesion priors"),
    "other": ("[1, 2]", "format is"),
    "no categories": ('{"format": FORMAT}', "priors.json"),
    "nested": ("[" * 100_000, "cannot be read as lesion priors"),
}


@pytest.mark.parametrize(("content", "said"), PRIORS.values(), ids=PRIORS)
def test_priors(refused, tmp_path, content, said):
    from gbci_fast.generate.priors import FORMAT

    (tmp_path / "priors.json").write_text(content.replace("FORMAT", json.dumps(FORMAT)))
    sentence = refused("generate {image} --priors {tmp}/priors.json")
    assert "priors.json" in sentence
    assert said in sentence


def shortened(name, to=100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])


def entry(name, **changes):
    """Other entries of a JSON file."""

    def damage(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return damage


def pickled(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")


WEIGHTS = {
    "index": (shortened("model_index.json"), "cannot be loaded as a pipeline"),
    "index of nothing": (entry("model_index.json", unet=["os", "system"]), "cannot be loaded as a pipeline"),
    "unet weights": (shortened("unet/diffusion_pytorch_model.safetensors"), "cannot be loaded as a pipeline"),
    "no unet weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded as a"),
    "pickle": (pickled, "cannot be loaded as a pipeline"),
    "unet config": (shortened("unet/config.json", 20), "cannot be loaded as a pipeline"),
    "unet width": (entry("unet/config.json", block_out_channels=[8, 8]), "cannot be loaded as a pipeline"),
    "no vae config": (lambda f: (f / "vae/config.json").unlink(), "cannot be loaded as a pipeline"),
    "conditioner": (entry("conditioner/config.json", width=96), "cannot be loaded as a pipeline"),
    "scheduler": (shortened("scheduler/scheduler_config.json", 10), "cannot be loaded as a pipeline"),
}


@pytest.mark.parametrize(("damage", "said"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(refused, copy_of, damage, said):
    damage(folder := copy_of("weights"))
    assert f"{folder} {said}" in refused(f"generate {{image}} --weights {folder}")


CACHES = {
    "no description": (lambda f: (f / "cache.json").unlink(), "does not exist; a VinDr-Mammo folder has it"),
    "garbage": (lambda f: (f / "cache.json").write_text("{"), "cannot be read as the description of a cache"),
    "format": (entry("cache.json", format=99), "is a cache of format 99; expected 2"),
    "size": (entry("cache.json", size="big"), "cannot be read as the description of a cache"),
    "files": (entry("cache.json", files={}), "does not describe index.parquet, pixels.npy and masks.npy"),
    "pixels": (shortened("pixels.npy", 1000), "pixels.npy is absent or cut"),
    "index": (lambda f: (f / "index.parquet").write_bytes(bytes((f / "index.parquet").stat().st_size)), "is not the"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), CACHES.values(), ids=CACHES)
def test_cache(refused, copy_of, damage, said):
    damage(folder := copy_of("cache"))
    sentence = refused(f"train vae --data {folder} --preset tiny --output {{tmp}}/run")
    assert str(folder) in sentence
    assert said in sentence


def test_training_state(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"garbage")
    for more in ("", " --resume"):
        said = refused(f"train vae --data {{root}} --preset tiny --output {{tmp}}/run{more}")
        assert "run holds a state.pt without job.json; choose another folder" in said


def test_damaged_autoencoder(refused, copy_of):
    folder = copy_of("vae")
    shortened("vae/diffusion_pytorch_model.safetensors")(folder)
    said = refused(f"train ldm --data {{root}} --vae {folder} --preset tiny --output {{tmp}}/run")
    assert f"{folder / 'vae'} cannot be loaded as an autoencoder" in said
