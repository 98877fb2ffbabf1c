"""The one exception that reaches a user as a sentence instead of a traceback, and notes on inputs."""

import re

LONGEST = 1000  # characters
# A sentence quotes a file behind "is" or "are", in parentheses or in quotation marks. Always our own: numbers, sizes,
# and what is spelled out here.
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
    """Bad input or a failed run: one sentence naming the file, the value and what was expected.

    Texts out of files stand in it where `without_values` looks for them. Whatever does not print is escaped, and the
    middle of a sentence that grew too long is left out.
    """

    def __init__(self, sentence: str):
        super().__init__(one_line(sentence))


def without_values(sentence: str) -> str:
    """A sentence of a `GBCIError` that names nobody: "..." for its values, from the first to what was expected."""
    return _VALUES.sub("...", sentence, count=1)


class InputWarning(UserWarning):
    """A note on an input that is used in spite of it; the command line prints it as one."""


def one_line(text: str) -> str:
    """`text` on one printable line of at most `LONGEST` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(escaped) <= LONGEST:
        return escaped
    return f"{escaped[: LONGEST * 2 // 3]} [...] {escaped[-LONGEST // 4 :]}"
