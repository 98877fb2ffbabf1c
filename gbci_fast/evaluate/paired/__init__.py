"""How close a synthetic lesion comes to the real one that it replaces."""
