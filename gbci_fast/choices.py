"""What sampling can be asked for, and what it does unasked. Without torch, so that the command line starts fast."""

RUNTIMES = ("auto", "eager", "fused", "compile", "tensorrt")
TIERS = ("exact", "tolerance", "approximate")
GUIDANCE_SCALE = 2.0  # classifier-free guidance; how it was chosen: docs/training.md
SHARD_SIZE = 1000  # images of a WebDataset shard
