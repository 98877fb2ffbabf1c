"""Mammograms in and out: readers, writers, the VinDr-Mammo layout, model space, phantoms."""

import zlib  # noqa: F401  (before pydicom loads GDCM: its zlib would corrupt the system's if that were loaded later)
