"""Writes docs/dicom.md: `python tests/dicom/corpus`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from corpus import second
    from corpus.table import DCMTK, DOCUMENT, make_document

    if second.version() != DCMTK:
        sys.exit(f"dcmtk {DCMTK} is needed; found {second.version()}")
    DOCUMENT.write_text(make_document(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
