"""Compares synthetic lesions with the real ones that they replace."""
