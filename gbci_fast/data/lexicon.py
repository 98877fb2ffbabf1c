"""Reads shape and margin of a mass from a free-text report, in the words of the BI-RADS lexicon."""

import re

# From the least to the most suspicious; where a report names several, the most suspicious one decides, as in BI-RADS.
_SHAPES = {"round": "round", "oval": "oval", "lobulated": "lobulated", "irregular": "irregular"}
_MARGINS = {
    "circumscribed": "circumscribed",
    "obscured": "obscured",
    "microlobulated": "microlobulated",
    "indistinct": "indistinct",
    "ill[- ]defined": "indistinct",  # the word of the third edition
    "sp[ei]culated": "spiculated",  # often misspelt in CDD-CESM
}
_ONE_MASS = re.compile(r"^(?P<before>[^;]*?)\bmass with (?P<margin>[^;]*?)\bmargins?\b", re.IGNORECASE)
_SEVERAL = re.compile(r"\b(masses|two|three|multiple)\b", re.IGNORECASE)


def shape_and_margin(report: str | None) -> tuple[str | None, str | None]:
    """Shape (of `SHAPES`) and margin (of `MARGINS`) of the one mass that a report describes; None = not stated.

    A report that speaks of several masses states neither: it does not say which mass has which margin.
    """
    found = _ONE_MASS.search(report or "")
    if found is None or _SEVERAL.search(report or ""):
        return None, None
    return _last(_SHAPES, found["before"]), _last(_MARGINS, found["margin"])


def _last(words: dict[str, str], text: str) -> str | None:
    named = [name for word, name in words.items() if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
    return named[-1] if named else None
