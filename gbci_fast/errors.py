"""The one exception that reaches a user as a sentence instead of a traceback, and notes on inputs."""

LONGEST = 1000  # characters


class GBCIError(ValueError):
    """Bad input or a failed run: one sentence naming the file, the value and what was expected.

    Values out of damaged files are quoted in it: whatever does not print is escaped, and the middle of a sentence that
    grew too long is left out.
    """

    def __init__(self, sentence: str):
        super().__init__(one_line(sentence))


class InputWarning(UserWarning):
    """A note on an input that is used in spite of it; the command line prints it as one."""


def one_line(text: str) -> str:
    """`text` on one printable line of at most `LONGEST` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(escaped) <= LONGEST:
        return escaped
    return f"{escaped[: LONGEST * 2 // 3]} [...] {escaped[-LONGEST // 4 :]}"
