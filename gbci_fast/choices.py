"""What `gbci_fast.fast.accelerate` can be asked for. Apart from it, so that the command line knows without torch."""

RUNTIMES = ("auto", "eager", "fused", "compile", "tensorrt")
TIERS = ("exact", "tolerance", "approximate")
