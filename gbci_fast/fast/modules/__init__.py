"""Stock modules of diffusers, rebuilt from the same weights."""
