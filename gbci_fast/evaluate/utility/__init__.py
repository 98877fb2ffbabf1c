"""Whether a detector learns from synthetic lesions."""
