"""Mammograms in DICOM: reading, presentation, writing."""

import zlib  # noqa: F401  (before pydicom loads GDCM: its zlib would corrupt the system's if that were loaded later)
