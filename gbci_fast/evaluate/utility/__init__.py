"""Measures whether a lesion detector learns from synthetic lesions."""
