"""Messages of decoders: C and Rust libraries print them to the process's standard error, bypassing Python."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gbci_fast.errors import GBCIError

# After damage libjpeg prints a warning (jerror.h), goes on, and returns a partly wrong image.
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end of JPEG|Bogus |Inconsistent |Invalid |Unsupported ")
# Extra bytes between the last pixel and the next marker change no pixel.
_HARMLESS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker")
_STDERR = 2
CODEC_LOCK = threading.Lock()
"""Held while a frame is decoded or encoded: OpenJPEG's wrapper crashes when two threads use it at once."""


@contextmanager
def no_complaints() -> Iterator[None]:
    """Runs a decoder with the process's standard error redirected, one caller at a time (`CODEC_LOCK`).

    If the decoder raises, its messages are dropped: the exception tells the same. If the decoder succeeds, lines that
    report no damage (such as another thread's) are printed afterwards.

    Raises:
        GBCIError: the decoder succeeded, but reported damaged data.
    """
    with CODEC_LOCK, os.fdopen(os.memfd_create("stderr"), "w+b") as aside:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # standard error is closed: no message would be seen
            yield
            return
        try:
            os.dup2(aside.fileno(), _STDERR)
            yield
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
        aside.seek(0)
        lines = aside.read().decode(errors="backslashreplace").splitlines(keepends=True)
    others = "".join(line for line in lines if not _DAMAGE.match(line))
    with suppress(OSError):
        os.write(_STDERR, others.encode())
    for line in lines:
        if _DAMAGE.match(line) and not _HARMLESS.match(line):
            raise GBCIError(f"damaged or not decodable ({line.strip()})")
