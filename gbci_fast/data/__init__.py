"""Data sets: the VinDr-Mammo layout, fields of view and their frames, segmentation, the cache of `prepare`."""
