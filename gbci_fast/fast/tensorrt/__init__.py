"""Engines of TensorRT: built, kept, run; and the denoiser that runs them."""
