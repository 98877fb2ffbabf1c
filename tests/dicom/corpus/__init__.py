"""Every kind of DICOM file that is read or refused: built here, with what it must display as."""
