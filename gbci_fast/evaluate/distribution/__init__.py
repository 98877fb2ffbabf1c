"""Compares the distribution of synthetic lesions with that of real ones."""
