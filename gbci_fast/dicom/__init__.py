"""Mammograms in DICOM: reading, presentation, writing."""

import zlib  # noqa: F401  (loaded before pydicom loads GDCM: GDCM's own zlib corrupts a system zlib loaded after it)
