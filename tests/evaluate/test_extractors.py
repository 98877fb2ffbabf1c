"""Extractors by name, and a tiny random DINOv2 out of a folder, against transformers' own preprocessing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.extractors import ClassToken, open_extractor, open_extractors
from gbci_fast.evaluate.features import Radiomics
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PREPROCESSING = {
    "do_center_crop": True,
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DINOv2 of two layers with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


@pytest.fixture
def damaged(folder, tmp_path):
    """`damaged(name, key, value)`: a copy of the folder with one entry changed, or left out where it is None."""

    def copy(name, key, value):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((tmp_path / name).read_text())
        config[key] = value
        (tmp_path / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return str(tmp_path)

    return copy


def crops(n=5, seed=0):
    pixels = np.random.default_rng(seed).random((n, CROP_SIZE, CROP_SIZE)).astype(np.float32)
    return Crops(pixels=pixels, masks=np.ones(pixels.shape, bool), patients=tuple("abcdefgh"[:n]))


class TestClassToken:
    def test_features_are_the_normalized_class_token_of_the_model(self, folder):
        model = transformers.Dinov2Model.from_pretrained(folder).eval()
        x = torch.from_numpy(crops().pixels)[:, None]
        # torchvision is not needed; the antialiased resize and the cut are those of its image processors.
        x = F.interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)[..., 2:30, 2:30].repeat(1, 3, 1, 1)
        mean, sd = (torch.tensor(PREPROCESSING[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
        with torch.no_grad():
            expected = model(pixel_values=(x - mean) / sd).pooler_output  # the class token after the last norm
        features = open_extractor(str(folder))(crops())
        assert features.shape == (5, 16)
        assert features.dtype == np.float64
        np.testing.assert_allclose(features, expected, atol=1e-5)

    def test_batches_do_not_change_features(self, folder):
        one, two = (ClassToken(folder, batch_size=n)(crops()) for n in (2, 5))
        np.testing.assert_allclose(one, two, atol=1e-5)

    def test_the_digest_follows_weights_and_preprocessing(self, folder, damaged):
        extractor, again = ClassToken(folder), ClassToken(folder)
        other = open_extractor(damaged("preprocessor_config.json", "image_mean", [0.1, 0.1, 0.1]))
        assert extractor.digest == again.digest != other.digest
        assert extractor.name == "tiny-dino"

    @pytest.mark.parametrize("size", [28, {"shortest_edge": 28}, {"height": 28, "width": 28}])
    def test_every_way_to_state_a_size(self, damaged, size):
        path = damaged("preprocessor_config.json", "do_center_crop", None)
        config = json.loads((Path(path) / "preprocessor_config.json").read_text())
        (Path(path) / "preprocessor_config.json").write_text(json.dumps(config | {"size": size}))
        assert open_extractor(path).prepare(crops().pixels).shape == (5, 3, 28, 28)

    def test_a_missing_package_is_one_sentence(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(GBCIError, match=r"need the package transformers; install it by `pip install gbci_fast\[ev"):
            open_extractor(str(folder))

    @pytest.mark.parametrize(
        ("name", "key", "value", "said"),
        [
            ("config.json", "model_type", "resnet", "holds a model of type 'resnet'; expected one of dinov2"),
            ("preprocessor_config.json", "size", None, "size is None; expected one side from 1 to 4096 pixels"),
            ("preprocessor_config.json", "size", {"height": 8, "width": 9}, "expected one side from 1 to 4096 pixels"),
            ("preprocessor_config.json", "size", 20, "crop_size is 28; expected at most the size, 20"),
            ("preprocessor_config.json", "image_mean", [0.5], r"image_mean is \[0.5\]; expected three numbers"),
            ("preprocessor_config.json", "image_std", [0.5, 0.0, 1], "expected positive numbers"),
        ],
    )
    def test_damaged_configs_are_one_sentence(self, damaged, name, key, value, said):
        with pytest.raises(GBCIError, match=said):
            open_extractor(damaged(name, key, value))

    def test_damaged_weights_are_one_sentence(self, damaged):
        path = damaged("preprocessor_config.json", "do_resize", True)
        weights = Path(path) / "model.safetensors"
        tensors = load_file(weights)
        del tensors["layernorm.weight"]  # would be filled in silently
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(GBCIError, match=r"lacks 1 weights of its model, such as layernorm.weight; expected all"):
            open_extractor(path)
        weights.write_bytes(b"no weights")
        with pytest.raises(GBCIError, match="cannot be loaded as a dinov2 model"):
            open_extractor(path)
        weights.unlink()
        with pytest.raises(GBCIError, match="cannot be loaded as a dinov2 model"):
            open_extractor(path)


class TestLite0:
    def test_features_of_crops_follow_the_pixels_and_not_the_masks(self):
        extractor = open_extractor("lite0")
        one = crops(3)
        features = extractor(one)
        assert features.shape == (3, 1280)
        np.testing.assert_array_equal(extractor(replace(one, masks=~one.masks)), features)
        assert np.abs(extractor(replace(one, pixels=one.pixels[::-1].copy()))[::-1] - features).max() < 1e-4
        assert not extractor.gaussian


class TestNames:
    def test_radiomics_is_known(self):
        assert isinstance(open_extractor("radiomics"), Radiomics)

    def test_a_list_keeps_its_order(self, folder):
        assert [one.name for one in open_extractors(f"{folder},radiomics")] == ["tiny-dino", "radiomics"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("inception", "features 'inception' are not known; expected radiomics, bands, lite0 or the folder"),
            ("", "features '' are not known"),
            ("radiomics,", "features '' are not known"),
            ("radiomics,radiomics", "features are 'radiomics,radiomics'; expected each once"),
        ],
    )
    def test_unknown_names_are_one_sentence(self, text, said):
        with pytest.raises(GBCIError, match=said):
            open_extractors(text)

    def test_a_folder_without_a_model_is_one_sentence(self, tmp_path):
        with pytest.raises(GBCIError, match=r"preprocessor_config.json cannot be read; expected a file as Hugging"):
            open_extractor(str(tmp_path))
