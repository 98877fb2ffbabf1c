"""How close the fast path and exported graphs come to the eager pipeline."""
