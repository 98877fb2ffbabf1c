"""Measures the quality of synthetic images against held-out real ones; reports hold all that a repetition needs."""
