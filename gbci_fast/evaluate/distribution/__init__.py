"""Whether synthetic lesions are distributed as real ones."""
