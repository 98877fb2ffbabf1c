"""The one exception that reaches a user as a sentence instead of a traceback."""


class GBCIError(ValueError):
    """Bad input or a failed run: one sentence naming the file, the value and what was expected."""
