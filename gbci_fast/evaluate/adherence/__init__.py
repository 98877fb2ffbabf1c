"""Whether a lesion shows what its description asks for."""
