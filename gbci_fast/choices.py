"""What can be asked for, and what is taken unasked. Without torch, so that the command line starts fast."""

RUNTIMES = ("auto", "eager", "fused", "compile", "tensorrt")
RUNTIME = "auto"
TIERS = ("exact", "tolerance", "approximate")
TIER = "tolerance"
STEPS = 20
GUIDANCE_SCALE = 2.0  # classifier-free guidance; how it was chosen: docs/training.md
SHARD_SIZE = 1000  # images of a WebDataset shard
MODEL_SIZE = 224  # side of the whole-breast view in pixels
SPLITS = ("training", "test")
FIELDS = ("whole", "lesion")  # of view, in a cache
