"""Fused operators, one per file, each with its plain PyTorch reference beside it."""
