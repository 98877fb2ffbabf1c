"""Whether a lesion changes with its description, and only as told."""
