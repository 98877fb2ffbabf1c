"""Mammograms in and out: readers, writers, the VinDr-Mammo layout, model space, phantoms."""
