"""Feature extractors by name: radiomics, fine bands, EfficientNet-Lite0, or the folder of a vision transformer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.backbone import open_lite0
from gbci_fast.evaluate.features import Bands, Extractor, Radiomics
from gbci_fast.evaluate.lesions import Crops
from gbci_fast.jobs.files import hash_weights, real_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMERS = ("dinov2", "dinov2_with_registers")  # model types whose first token is the class token
PREPROCESSOR = "preprocessor_config.json"
LITE0_SIDE = 160  # pixels


def open_extractors(text: str) -> list[Extractor]:
    """The extractors of a list of names or folders, separated by commas.

    Raises:
        GBCIError: as for `open_extractor`, or an entry occurs twice.
    """
    names = text.split(",")
    if len(set(names)) < len(names):
        raise GBCIError(f"features are {text!r}; expected each once")
    return [open_extractor(name) for name in names]


def open_extractor(text: str) -> Extractor:
    """The extractor of a name of `NAMED`, or that of a local folder with a DINOv2 or RAD-DINO model.

    Raises:
        GBCIError: `text` is neither a name nor a folder, or the extractor cannot be opened.
    """
    if text in NAMED:
        return NAMED[text]()
    if not text or not Path(text).is_dir():
        names = ", ".join(NAMED)
        raise GBCIError(f"features {text!r} are not known; expected {names} or the folder of a DINOv2 model")
    return ClassToken(Path(text))


class Lite0Features:
    """The ImageNet features of EfficientNet-Lite0 (see `open_lite0`) of crops resized to `LITE0_SIDE`.

    Raises:
        GBCIError: its wheels are not installed.
    """

    name = "lite0"
    standardized = gaussian = False

    def __init__(self) -> None:
        self._net = open_lite0()
        self.digest = self._net.digest

    def __call__(self, crops: Crops) -> np.ndarray:
        """float64 [N, D]."""
        side = (LITE0_SIDE, LITE0_SIDE)
        resized = F.interpolate(
            torch.from_numpy(crops.pixels)[:, None], side, mode="bicubic", antialias=True, align_corners=False
        )
        return self._net(resized[:, 0].clamp(0, 1).numpy()).astype(np.float64)


class ClassToken:
    """The class token of a DINOv2 (Oquab et al. 2024) or RAD-DINO (Perez-Garcia et al. 2025) model.

    Crops are resized, center-cropped and normalized in torch, as the folder's own `PREPROCESSOR` says. The three
    channels are equal.

    Args:
        folder: in the layout of Hugging Face; safetensors only. Nothing is downloaded.
        batch_size: crops per forward pass.

    Raises:
        GBCIError: transformers is not installed, or the folder holds no such model.
    """

    standardized = gaussian = False

    def __init__(self, folder: Path, batch_size: int = 32):
        self.name, self.batch_size = real_path(folder).name, batch_size
        self.preprocessing = _read_preprocessing(folder)
        self.model = _load(folder)
        self.digest = hash_weights(folder)

    @torch.no_grad()
    def __call__(self, crops: Crops) -> np.ndarray:
        """float64 [N, D]."""
        parts = [
            self.model(pixel_values=self.prepare(crops.pixels[start : start + self.batch_size])).last_hidden_state[:, 0]
            for start in range(0, len(crops), self.batch_size)
        ]
        return torch.cat(parts).double().numpy()

    def prepare(self, pixels: np.ndarray) -> torch.Tensor:
        """The model's input, float32 [N, 3, S, S], of crops, float32 [N, C, C] in [0, 1]."""
        resized, cut, mean, sd = self.preprocessing
        x = F.interpolate(
            torch.from_numpy(pixels)[:, None], (resized, resized), mode="bicubic", antialias=True, align_corners=False
        )
        edge = (resized - cut) // 2
        x = x[..., edge : edge + cut, edge : edge + cut].clamp(0, 1).expand(-1, 3, -1, -1)
        return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(sd)[:, None, None]


def _load(folder: Path) -> "PreTrainedModel":
    config = _read_json(folder / "config.json")
    if config.get("model_type") not in TRANSFORMERS:
        raise GBCIError(
            f"{folder} holds a model of type {config.get('model_type')!r}; expected one of {', '.join(TRANSFORMERS)}"
        )
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise GBCIError(
            f"features of {folder} need the package transformers; install it by `pip install gbci_fast[evaluate]`"
        ) from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its errors are raised as exceptions, too
    try:
        model, loaded = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise GBCIError(f"{folder} cannot be loaded as a {config['model_type']} model: {error}") from error
    # transformers fills missing weights with noise. The mask token is not used here.
    if missing := sorted(set(loaded["missing_keys"]) - {"embeddings.mask_token"}):
        raise GBCIError(f"{folder} lacks {len(missing)} weights of its model, such as {missing[0]}; expected all")
    return model.eval()


def _read_preprocessing(folder: Path) -> tuple[int, int, list[float], list[float]]:
    """The sides before and after the center crop, and the channels' means and standard deviations."""
    path = folder / PREPROCESSOR
    config = _read_json(path)
    resized = _side(path, "size", config.get("size"))
    cut = _side(path, "crop_size", config.get("crop_size")) if config.get("do_center_crop") else resized
    if cut > resized:
        raise GBCIError(f"{path}: crop_size is {cut}; expected at most the size, {resized}")
    mean, sd = (_channels(path, key, config.get(key)) for key in ("image_mean", "image_std"))
    if min(sd) <= 0:
        raise GBCIError(f"{path}: image_std is {sd}; expected positive numbers")
    return resized, cut, mean, sd


def _side(path: Path, key: str, value: Any) -> int:
    """The side of a square, given as `N`, `{"shortest_edge": N}` or `{"height": N, "width": N}`."""
    side = value
    if isinstance(value, dict):
        side = value.get("shortest_edge", value.get("height"))
        if value.get("width", side) != value.get("height", side):
            side = None
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= 4096:
        raise GBCIError(f"{path}: {key} is {value!r}; expected one side from 1 to 4096 pixels, of a square")
    return side


def _channels(path: Path, key: str, value: Any) -> list[float]:
    numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
    if not numbers:
        raise GBCIError(f"{path}: {key} is {value!r}; expected three numbers")
    return [float(x) for x in value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GBCIError(f"{path} cannot be read; expected a file as Hugging Face models have: {error}") from error
    if not isinstance(config, dict):
        raise GBCIError(f"{path} holds a {type(config).__name__}; expected a JSON object")
    return config


NAMED = {"radiomics": Radiomics, "bands": Bands, "lite0": Lite0Features}
"""{name: class}, the extractors without a folder."""
