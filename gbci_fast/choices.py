"""Choices and defaults of commands. The module does not import torch, so that the command line starts fast."""

RUNTIMES = ("auto", "eager", "fused", "compile", "tensorrt")
RUNTIME = "auto"
TIERS = ("exact", "tolerance", "approximate")
TIER = "tolerance"
STEPS = 20
GUIDANCE_SCALE = 2.0  # classifier-free guidance; how it was chosen: docs/training.md
SHARD_SIZE = 1000  # images per WebDataset shard
MODEL_SIZE = 224  # pixels along a side of the model image
SPLITS = ("training", "test")
JUDGED = ("C", "test")
"""The lesions that an evaluation judges: fold C of the training split, or the test split."""
FIELDS = ("whole", "lesion")  # kinds of field of view in a cache
