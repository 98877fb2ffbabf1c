"""Engines of TensorRT: built, kept, refitted, run; and the denoiser that runs them."""
