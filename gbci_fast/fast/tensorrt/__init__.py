"""Builds, caches and runs TensorRT engines, and has the denoiser that uses them."""
