"""The reference implementation: the eager pipeline, its parts, its noise and its checkpoint format."""
