"""Pseudonyms that replace true identifiers in outputs, after the Basic Profile of DICOM PS3.15 Annex E.

A pseudonym is an HMAC-SHA256 (RFC 2104) under a secret key: the same id gives the same pseudonym, and without the key
nobody can test a guess. `KeptIdentifiers` has the same methods and changes nothing.
"""

import hmac
import uuid
from dataclasses import dataclass, field
from datetime import timedelta

OLDEST = 89  # years; higher ages are written as `OLDER`
OLDER = 90.0
LONGEST_SHIFT = timedelta(days=3650)


class KeptIdentifiers:
    """Keeps all identifiers unchanged."""

    removes = False

    def patient(self, patient: str) -> str:
        """Replacement for a patient's id."""
        return patient

    def name(self, text: str, digits: int = 16) -> str:
        """Replacement for the name of a study, an image or a file; a pseudonym has ``digits`` hexadecimal digits."""
        return text

    def uid(self, uid: str) -> str:
        """Replacement for a DICOM UID; blank stays blank."""
        return uid

    def age(self, years: float | None) -> float | None:
        """Replacement for an age in years; ``None`` = unknown."""
        return years

    def shift(self, patient: str) -> timedelta:
        """The time span that is added to every date and time of a patient."""
        return timedelta(0)


@dataclass(frozen=True)
class Deidentifier(KeptIdentifiers):
    """Pseudonyms under a secret ``key``: hexadecimal digits for names, ``2.25.<UUID>`` (PS3.5 B.2) for UIDs.

    Ages above `OLDEST` become `OLDER`. All dates and times of a patient move back by the same span, from one second to
    `LONGEST_SHIFT`, so that the time between two studies stays the same.
    """

    key: bytes = field(repr=False)

    removes = True

    def patient(self, patient: str) -> str:
        return self._digest("patient", patient).hex()[:16]

    def name(self, text: str, digits: int = 16) -> str:
        return self._digest("name", text).hex()[:digits]

    def uid(self, uid: str) -> str:
        return f"2.25.{uuid.UUID(bytes=self._digest('uid', uid)[:16], version=5).int}" if uid else uid

    def age(self, years: float | None) -> float | None:
        return years if years is None or years <= OLDEST else OLDER

    def shift(self, patient: str) -> timedelta:
        number = int.from_bytes(self._digest("dates", patient)[:8], "big")
        return -timedelta(seconds=1 + number % int(LONGEST_SHIFT.total_seconds()))

    def _digest(self, kind: str, text: str) -> bytes:
        return hmac.digest(self.key, f"{kind}\x1f{text}".encode(errors="surrogatepass"), "sha256")
