"""What decoders print: C and Rust libraries write to the process's standard error, past Python."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gbci_fast.errors import GBCIError

# libjpeg goes on over damage with a warning (jerror.h), and hands out whatever it has ...
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end of JPEG|Bogus |Inconsistent |Invalid |Unsupported ")
# ... but what it skips between the last pixel and the next marker costs none.
_HARMLESS = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker")
_STDERR = 2
CODEC_LOCK = threading.Lock()
"""Held while a frame is decoded or encoded: OpenJPEG's wrapper crashes where two threads are in it."""


@contextmanager
def no_complaints() -> Iterator[None]:
    """Runs a decoder with standard error kept aside.

    What is printed while it fails is dropped, because the exception says it. Lines that are not a decoder's (another
    thread's) are printed afterwards. One caller at a time: the descriptor belongs to the process.

    Raises:
        GBCIError: the decoder succeeded, but said that its data are damaged.
    """
    with CODEC_LOCK, os.fdopen(os.memfd_create("stderr"), "w+b") as aside:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # closed: nothing would be seen anyway
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
