"""The specification: the eager pipeline, its parts, its noise and its checkpoint."""
