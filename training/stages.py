"""Presets, and entry points of the command line; the others are in `distill` and `classifier`."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from gbci_fast.choices import MODEL_SIZE
from gbci_fast.data.cache import CACHE_FILE
from gbci_fast.data.folds import TRAINED
from gbci_fast.data.vindr import BREAST_TABLE, FINDING_TABLE
from gbci_fast.errors import GBCIError
from gbci_fast.jobs.files import hash_weights, sha256_of
from gbci_fast.model.checkpoint import load_pipeline
from gbci_fast.model.pipeline import GBCIPipeline
from gbci_fast.training.bank import LatentBank, build_bank, kept_bank
from gbci_fast.training.data import load_images
from gbci_fast.training.ldm import LDMTask, build_pipeline
from gbci_fast.training.loop import check_output, train
from gbci_fast.training.ranks import rank_device
from gbci_fast.training.settings import LDMConfig, LoopConfig
from gbci_fast.training.vae import VAEConfig, VAETask


def vae_preset(name: str) -> tuple[VAEConfig, LoopConfig]:
    """`tiny` trains in seconds on a CPU (for tests); `base` is the shipped shape."""
    if name == "tiny":
        config = VAEConfig(block_out_channels=(16, 16, 32), norm_num_groups=8, crop=64)
        loop = LoopConfig(steps=60, batch_size=4, learning_rate=2e-3, warmup=10, ema_decay=0.9, precision="fp32")
        return config, loop
    return VAEConfig(), LoopConfig(steps=8000, batch_size=8, learning_rate=5e-4, ema_decay=0.998)


def train_vae(
    roots: Sequence[Path],
    output: Path,
    *,
    preset: str,
    overrides: Mapping[str, Any],
    resume: bool,
    init: Path | None = None,
    decoder_only: bool = False,
    device: str = "auto",
) -> None:
    """Trains the autoencoder on the training split of `roots`; ``output/vae`` holds the averaged weights.

    Args:
        roots: VinDr-layout folders or caches.
        output: folder of the run.
        preset: see `vae_preset`.
        overrides: fields of `LoopConfig` to replace.
        resume: continue the run in `output`.
        init: a pipeline folder whose autoencoder has the starting weights.
        decoder_only: keep the encoder, and so the latents, unchanged.
        device: see `rank_device`.

    Raises:
        GBCIError: `decoder_only` without `init` (an untrained encoder's latents are noise), or an error of `train`.
    """
    config, loop = vae_preset(preset)
    config, loop = replace(config, decoder_only=decoder_only), replace(loop, **overrides)
    if decoder_only and init is None:
        raise GBCIError("a decoder alone is trained on the latents of a trained encoder; name its pipeline with --init")
    place = rank_device(device)
    inputs = {"preset": preset, **_model_settings(config), **data_of(roots), **_started_from(init)}
    check_output(output, resume, loop, inputs)
    torch.manual_seed(loop.seed)
    task = VAETask(load_images(roots), config, place)
    if init is not None:
        trained = load_pipeline(init).vae
        _copy_weights(task.module, trained, init)
        if decoder_only:
            factors = {name: trained.config[name] for name in ("shift_factor", "scaling_factor")}
            task.module.register_to_config(**factors)
        else:
            task.balance()  # before training: it resets the posterior's standard deviation, which is then learned
    train(task, loop, output, resume=resume, device=place, inputs=inputs)


def ldm_preset(name: str) -> tuple[LDMConfig, LoopConfig]:
    """`tiny` trains in seconds on a CPU (for tests); `base` is the shipped shape."""
    if name == "tiny":
        config = LDMConfig(
            block_out_channels=(32, 64),
            context_dim=64,
            pooled_dim=64,
            vit_depth=1,
            report_depth=1,
            variants=1,
        )
        loop = LoopConfig(steps=40, batch_size=4, learning_rate=1e-3, warmup=10, ema_decay=0.9, precision="fp32")
        return config, loop
    return LDMConfig(), LoopConfig(steps=20000, batch_size=16, learning_rate=4e-4, ema_decay=0.999)


def train_ldm(
    roots: Sequence[Path],
    output: Path,
    *,
    vae: Path,
    preset: str,
    overrides: Mapping[str, Any],
    resume: bool,
    init: Path | None = None,
    device: str = "auto",
    **changes: Any,
) -> None:
    """Trains UNet and conditioner on the training split of `roots`; ``output/pipeline`` holds the averaged weights.

    Args:
        roots: VinDr-layout folders or caches.
        output: folder of the run.
        vae: folder of a finished ``train_vae`` run; its ``vae/`` is used and stays frozen.
        preset: see `ldm_preset`.
        overrides: fields of `LoopConfig` to replace.
        resume: continue the run in `output`.
        init: a pipeline folder whose UNet and conditioner have the starting weights.
        device: see `rank_device`.
        changes: fields of the preset's `LDMConfig` to replace.

    Raises:
        GBCIError: `vae` holds no autoencoder, `init` has another shape, a setting is out of range, or an error of
            `train`.
    """
    config, loop = ldm_preset(preset)
    config, loop = replace(config, **changes), replace(loop, **overrides)
    place = rank_device(device)
    if not (vae / "vae" / "config.json").exists():
        raise GBCIError(f"{vae} has no vae/ folder; expected the output of `gbci-fast train vae`")
    inputs = {
        "preset": preset,
        **_model_settings(config),
        **data_of(roots),
        "vae": hash_weights(vae / "vae")[:16],
        **_started_from(init),
    }
    check_output(output, resume, loop, inputs)
    autoencoder = _open_vae(vae / "vae")
    torch.manual_seed(loop.seed)
    pipe = build_pipeline(config, autoencoder, MODEL_SIZE)
    side = MODEL_SIZE // pipe.vae_scale_factor
    if max(config.latent_crops) > side:
        raise GBCIError(f"latent_crops are {list(config.latent_crops)}; expected at most the latent's side, {side}")
    if init is not None:
        _start_from(pipe, init)
    pipe.to(place)

    def encode() -> LatentBank:
        return build_bank(pipe, load_images(roots), config.variants, loop.seed, loop.precision)

    decides = ("data", "folds", "vae", "model.variants")
    origin = {name: inputs[name] for name in decides} | {"seed": loop.seed, "precision": loop.precision}
    bank = kept_bank(output, origin, encode)
    train(LDMTask(pipe, bank, config, place), loop, output, resume=resume, device=place, inputs=inputs)


def digest_roots(roots: Sequence[Path]) -> str:
    """16 hexadecimal digits of SHA-256 over the tables of VinDr-layout roots and the index files of caches, in order.

    Pixels are not covered, since that would take as long as reading them.
    """
    digest = hashlib.sha256()
    for root in roots:
        for name in (CACHE_FILE, BREAST_TABLE, FINDING_TABLE):
            file = Path(root) / name
            digest.update((sha256_of(file) if file.is_file() else "-").encode())
    return digest.hexdigest()[:16]


def data_of(roots: Sequence[Path]) -> dict[str, str]:
    """What a run says of its data, so that it does not go on with other ones."""
    return {"data": digest_roots(roots), "folds": TRAINED}


def _model_settings(config: VAEConfig | LDMConfig) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in asdict(config).items()}


def _open_vae(folder: Path) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_pretrained(folder, use_safetensors=True).requires_grad_(False).eval()
    except Exception as error:  # diffusers and safetensors raise half a dozen types for a damaged folder
        reason = " ".join(str(error).split())
        raise GBCIError(f"{folder} cannot be loaded as an autoencoder: {reason}") from error


def _started_from(init: Path | None) -> dict[str, str | None]:
    return {"init": None if init is None else hash_weights(init)[:16]}


def _start_from(pipe: GBCIPipeline, folder: Path) -> None:
    """Copies the UNet and the conditioner of a pipeline folder into `pipe`.

    Attributes that the folder's conditioner does not know start untrained.
    """
    trained = load_pipeline(folder)
    _copy_weights(pipe.unet, trained.unet, folder)
    with _of_another_shape(folder):
        pipe.conditioner.load_known(trained.conditioner)


def _copy_weights(module: nn.Module, trained: nn.Module, folder: Path) -> None:
    with _of_another_shape(folder):
        module.load_state_dict(trained.state_dict())


@contextmanager
def _of_another_shape(folder: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GBCIError(f"{folder} holds a model of another shape; expected that of the chosen --preset") from error
