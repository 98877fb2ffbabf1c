"""Data sets: the VinDr-Mammo layout, frames and fields of view, segmentation, the cache of `prepare`."""
