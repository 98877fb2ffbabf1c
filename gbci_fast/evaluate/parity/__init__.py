"""Compares the fast path and exported graphs with the eager pipeline."""
