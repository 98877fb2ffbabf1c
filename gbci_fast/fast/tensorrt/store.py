"""Finds the engine for a module and shape: loaded in this process, in the cache, or built."""

import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from gbci_fast.fast import export
from gbci_fast.fast.modules import blocks
from gbci_fast.fast.runtimes import fused
from gbci_fast.fast.tensorrt.build import Built, Progress, build
from gbci_fast.fast.tensorrt.cache import EngineCache, EngineKey
from gbci_fast.fast.tensorrt.flavor import Flavor
from gbci_fast.fast.tensorrt.run import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to write the ONNX file of an engine, and the digests that tell whether the file would change.

    Attributes:
        part, shape, dtype, weights, graph: see `EngineKey`.
        write: writes the file.
    """

    part: str
    shape: str
    dtype: str
    weights: str
    graph: str
    write: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.part}-{self.shape}-{self.dtype}"

    def key(self, flavor: Flavor, capability: str) -> EngineKey:
        """The key of the engine for a compute capability, or for several ("8.0+8.6")."""
        return EngineKey(
            part=self.part,
            shape=self.shape,
            dtype=self.dtype,
            weights=self.weights,
            graph=self.graph,
            flavor=flavor.name,
            version=flavor.version,
            capability=capability,
        )


def unet_recipe(unet: UNet2DConditionModel, bucket: "export.Bucket", weights: str) -> Recipe:
    """The recipe of a UNet's core in the UNet's dtype; `weights` is the `digest` of the UNet."""
    return Recipe(
        part="unet",
        shape=str(bucket),
        dtype=str(unet.dtype).removeprefix("torch."),
        weights=weights,
        graph=_graph(unet, export, fused, blocks),
        write=lambda path: export.export_unet(unet, bucket, unet.dtype, path),
    )


def decoder_recipe(vae: AutoencoderKL, batch: int, height: int, width: int, weights: str) -> Recipe:
    """The recipe of a VAE's decoder for latents [batch, C, height, width]; `weights` is the `digest` of the VAE."""
    return Recipe(
        part="decoder",
        shape=f"b{batch}-{height}x{width}",
        dtype=str(vae.dtype).removeprefix("torch."),
        weights=weights,
        graph=_graph(vae, export),
        write=lambda path: export.export_decoder(vae, batch, height, width, vae.dtype, path),
    )


def digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's weights; independent of device and layout."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _graph(module: Any, *sources: ModuleType) -> str:
    """Digest of what determines the ONNX file besides weights, shape and dtype: the config and the exporting code."""
    config = {name: value for name, value in module.config.items() if not name.startswith("_")}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    sha.update(f"torch {torch.__version__} diffusers {diffusers.__version__}".encode())
    for source in sources:
        sha.update(Path(source.__file__).read_bytes())
    return sha.hexdigest()


def obtain(
    recipe: Recipe,
    flavor: Flavor,
    cache: EngineCache,
    capability: str,
    *,
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    on_built: Callable[[Built], None] | None = None,
) -> bytes:
    """The serialized engine of a recipe: from the cache, or built and then kept there.

    Args:
        recipe: of the engine.
        flavor: the flavor that builds it.
        cache: where engines are kept.
        capability: compute capabilities that the engine is for, such as "8.0+8.6", or `GENERIC`.
        device: the GPU to build on; None on a machine without one.
        on_progress: reports the builder's progress.
        on_built: called with the result of a build; not called for an engine from the cache.

    Raises:
        GBCIError: as `build` raises it, or the export fails.
    """

    def make() -> bytes:
        with tempfile.TemporaryDirectory(prefix="gbci_fast-") as folder:
            onnx = Path(folder) / f"{recipe}.onnx"
            with torch.inference_mode(False), torch.no_grad():
                recipe.write(onnx)
            logger.warning("building %s with %s %s, which may take minutes", recipe, flavor.name, flavor.version)
            built = build(onnx, flavor, capabilities=capability.split("+"), device=device, on_progress=on_progress)
        if on_built is not None:
            on_built(built)
        return built.engine

    return cache.get_or_build(recipe.key(flavor, capability), make)


class Engines:
    """The engines of one module that this process has loaded. Missing ones are obtained for the GPU that they run on.

    A copy has the same flavor and cache, and no loaded engines.
    """

    def __init__(self, flavor: Flavor, cache: EngineCache):
        self.flavor, self.cache = flavor, cache
        self._loaded: dict[tuple[Hashable, torch.device], Engine] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Engines, (self.flavor, self.cache)

    def __call__(self, shape: Hashable, recipe: Callable[[], Recipe], device: torch.device) -> Engine:
        """The engine for a shape on a GPU; `recipe` is called once per shape and GPU.

        Raises:
            GBCIError: as `obtain` and `Engine` raise it.
        """
        with self._lock:
            if (shape, device) not in self._loaded:
                serialized = obtain(recipe(), self.flavor, self.cache, self.flavor.target(device), device=device)
                self._loaded[shape, device] = Engine(serialized, self.flavor, device)
            return self._loaded[shape, device]

    def clear(self) -> None:
        """Drops all loaded engines, for example when the module's weights changed."""
        with self._lock:
            self._loaded.clear()
