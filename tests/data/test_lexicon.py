"""Shape and margin out of a report's words."""

import pytest

from gbci_fast.attributes import MARGINS, SHAPES
from gbci_fast.data import lexicon


@pytest.mark.parametrize(
    ("report", "shape", "margin"),
    [
        ("irregular mass with spiculated margins", "irregular", "spiculated"),
        ("oval mass with ill defined margins", "oval", "indistinct"),
        ("lobulated, oval mass with circumscribed, obscured margins", "lobulated", "obscured"),
        ("irregular-architectural distortion mass with ill defined-spiculated margins", "irregular", "spiculated"),
        ("lobulated mass with microlobulated margins", "lobulated", "microlobulated"),
        ("lymph node mass with n/a margins", None, None),
        ("High density mass with speculated margin; IMLN", None, "spiculated"),
        ("Two high density masses with speculated margin", None, None),
        ("High density mass with indistinct margin and two adjacent masses with microlobulated margin", None, None),
        ("Architectural distortion", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_words(report, shape, margin):
    assert lexicon.shape_and_margin(report) == (shape, margin)


def test_words_are_in_the_vocabulary():
    assert set(lexicon._SHAPES.values()) == set(SHAPES)
    assert set(lexicon._MARGINS.values()) == set(MARGINS)
