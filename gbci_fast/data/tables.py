"""CSV tables, read row by row: in order, or by place in a table of any length."""

import csv
import io
import os
import weakref
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from gbci_fast.dicom.bounds import bounded_lines, check_regular
from gbci_fast.errors import GBCIError

BLOCK = 64  # rows that are read together where one of them is asked for
_UNREADABLE = (OSError, UnicodeDecodeError, csv.Error, GBCIError)
_BOM = b"\xef\xbb\xbf"


def read_table(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("file, line n", {column: text}) for every row that is not blank, with stripped texts.

    Uses the standard library's reader, because pandas silently accepts rows that are too short or too long.

    Raises:
        GBCIError: the file is absent or no table, a column is absent or repeated, or a row has too few or too many
            fields.
    """
    return Table(path, required).scan()


class Table:
    """A CSV table whose rows are found by their place, from 0, after one pass over the file.

    In memory, every `BLOCK` rows take 16 bytes: where they start, and a digest that shows whether they have changed
    since. The file stays open, so a file that replaces it under its name does not matter.

    Args:
        path: the file, in UTF-8.
        required: columns that it must have.

    Attributes:
        columns: of the header.

    Raises:
        GBCIError: the file is absent or no table, or a column is absent or repeated.
    """

    def __init__(self, path: Path, required: tuple[str, ...]):
        self.path = path
        try:
            check_regular(path)
            with path.open("rb") as file:
                self._file = os.dup(file.fileno())
        except FileNotFoundError:
            raise GBCIError(f"{path} does not exist; a VinDr-Mammo folder has it") from None
        except _UNREADABLE as error:
            raise GBCIError(f"{path} cannot be read as a table: {error}") from None
        weakref.finalize(self, os.close, self._file)
        self._end = 0  # of the records, in bytes
        self.columns: list[str] = next(self._records(), (0, 0, []))[2]
        self._starts, self._digests = array("q"), array("Q")
        self._length = 0
        self._block: tuple[int, list[list[str]]] = (-1, [])  # the last one read, and its number
        if absent := [column for column in required if column not in self.columns]:
            raise GBCIError(f"{path} has no column {', '.join(absent)}; expected at least {', '.join(required)}")
        if repeated := [name for name in dict.fromkeys(self.columns) if name and self.columns.count(name) > 1]:
            raise GBCIError(f"{path} has more than one column {', '.join(repeated)}; expected one of each")

    def __len__(self) -> int:
        """The number of rows that `scan` has passed."""
        return self._length

    def __getitem__(self, place: int) -> dict[str, str]:
        """A row that `scan` has passed.

        Raises:
            GBCIError: the file has changed since.
        """
        number, rows = self._block
        if number != place // BLOCK:
            number = place // BLOCK
            self._block = number, rows = number, self._read(number)
        return dict(zip(self.columns, rows[place % BLOCK], strict=True))

    def scan(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields the rows as `read_table` does, and notes where they are.

        Raises:
            GBCIError: the file cannot be read, or a row has too few or too many fields.
        """
        self._starts, self._digests, self._length = array("q"), array("Q"), 0
        for line, start, fields in self._records(header=False):
            if len(fields) != len(self.columns):
                raise GBCIError(f"{self.path}, line {line} has {len(fields)} fields; expected {len(self.columns)}")
            if self._length % BLOCK == 0:
                self._close_block(start)
                self._starts.append(start)
            self._length += 1
            yield f"{self.path}, line {line}", dict(zip(self.columns, fields, strict=True))
        self._close_block(self._end)

    def _records(self, *, header: bool = True) -> Iterator[tuple[int, int, list[str]]]:
        """Yields (line, first byte, stripped texts) of the records that are not blank, and of any header."""
        os.lseek(self._file, 0, os.SEEK_SET)
        with open(self._file, newline="", encoding="utf-8-sig", closefd=False) as file:
            lines = _Lines(bounded_lines(file), len(_BOM) if os.pread(self._file, 3, 0) == _BOM else 0)
            reader, first = csv.reader(lines, strict=True), True
            while True:
                start = lines.end
                try:
                    fields = next(reader, None)
                except _UNREADABLE as error:
                    raise GBCIError(f"{self.path} cannot be read as a table: {error}") from None
                if fields is None:
                    self._end = lines.end
                    return
                texts = [text.strip() for text in fields]
                if header if first else any(texts):
                    yield reader.line_num, start, texts
                first = False

    def _close_block(self, end: int) -> None:
        """Notes the digest of the last block, which ends at byte `end`."""
        if len(self._starts) > len(self._digests):
            self._digests.append(_digest(self._bytes(self._starts[-1], end)))

    def _read(self, number: int) -> list[list[str]]:
        end = self._starts[number + 1] if number + 1 < len(self._starts) else self._end
        content = self._bytes(self._starts[number], end)
        if _digest(content) != self._digests[number]:
            raise GBCIError(f"{self.path} has changed since it was checked; run the command again")
        fields = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        return [texts for row in fields if any(texts := [text.strip() for text in row])]

    def _bytes(self, start: int, end: int) -> bytes:
        return os.pread(self._file, end - start, start)


class _Lines:
    """Counts the bytes of the lines that are taken."""

    def __init__(self, lines: Iterator[str], end: int):
        self._lines = lines
        self.end = end

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.end += len(line) if line.isascii() else len(line.encode())
        return line


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest())
