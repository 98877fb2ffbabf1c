"""Choices and defaults of sampling. The module does not import torch, so that the command line starts fast."""

RUNTIMES = ("auto", "eager", "fused", "compile", "tensorrt")
TIERS = ("exact", "tolerance", "approximate")
GUIDANCE_SCALE = 2.0  # classifier-free guidance; how it was chosen: docs/training.md
SHARD_SIZE = 1000  # images per WebDataset shard
