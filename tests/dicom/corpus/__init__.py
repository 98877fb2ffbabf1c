"""Every kind of DICOM file that is read or refused, built in memory, with its expected display or refusal."""
