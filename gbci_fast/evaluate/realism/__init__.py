"""Realism: whether a judge that is trained for it can tell painted lesions from real ones."""
