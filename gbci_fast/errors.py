"""The exception that the command line shows as a sentence instead of a traceback, and warnings about inputs."""

import re

LONGEST = 1000  # characters
# Error sentences quote the content of files after "is" or "are", in parentheses or in quotation marks. The phrases in
# the lookaheads, numbers and sizes are never quotations.
_VALUES = re.compile(
    r"""(?: (?<=\bis\ ) (?! (?:CC|MLO|unknown)\ and\ side\ | a\ link\ that\ leads\ nowhere | all\ zero )
            (?! [\d.x-]+ (?:;\ expected|$) )
          | (?<=\bare\ )
          | \( (?! [\d., -]+ \) )
          | (?<!\w) ['"] )
        (?: .* (?=;\ expected) | .* )""",
    re.VERBOSE,
)


class GBCIError(ValueError):
    """Bad input or a failed run: one sentence that names the file, the value and what was expected.

    The sentence quotes text from files only where `without_values` removes it. Unprintable characters are escaped, and
    the middle of an overlong sentence is left out (`one_line`).
    """

    def __init__(self, sentence: str):
        super().__init__(one_line(sentence))


def without_values(sentence: str) -> str:
    """A `GBCIError`'s sentence that identifies no patient: "..." replaces its values, up to "; expected"."""
    return _VALUES.sub("...", sentence, count=1)


class InputWarning(UserWarning):
    """A note on an input that is used nevertheless; the command line prints it as a note."""


def one_line(text: str) -> str:
    """`text` on one printable line of at most `LONGEST` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(escaped) <= LONGEST:
        return escaped
    return f"{escaped[: LONGEST * 2 // 3]} [...] {escaped[-LONGEST // 4 :]}"
