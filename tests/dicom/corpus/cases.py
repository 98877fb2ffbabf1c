"""All cases of the corpus, in the order of the table."""

from . import classes, displays, encodings
from .case import Case

CASES: tuple[Case, ...] = (
    *encodings.encodings(),
    *encodings.refused_encodings(),
    *encodings.depths(),
    *encodings.refused_depths(),
    *displays.modalities(),
    *displays.windows(),
    *displays.refused_displays(),
    *displays.paddings(),
    *classes.raw_images(),
    *classes.kinds(),
    *classes.geometries(),
)
READ = tuple(case for case in CASES if case.display is not None)
REFUSED = tuple(case for case in CASES if case.display is None)
