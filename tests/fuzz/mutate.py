"""Damage to files, a pure function of (seed, case number): flipped, cut, doubled and inserted bytes, false lengths.

A third of the cases go through a container first (a deflated data set, PNG chunks with their checksums), so that the
damage reaches the code behind zlib and CRC.
"""

import random
import struct
import zlib

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = 1200  # where most of a small file's structure is
EDGES = {1: (0, 1, 0x7F, 0x80, 0xFF), 2: (0, 1, 0x7FFF, 0x8000, 0xFFFF), 4: (0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)}
TEXT_TOKENS = (
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"../",
    b"nan",
    b"1e999",
    b"-1",
    b"[",
    b"['Mass'",
    b"\xff\xfe",
    b";",
    b"0",
)


def mutate(content: bytes, donor: bytes, rng: random.Random, *, is_text: bool) -> bytes:
    """Between one and eight damages to `content`; `donor` lends bytes."""
    if content.startswith(PNG_MAGIC) and rng.random() < 0.6:
        return _mutate_png(content, donor, rng)
    if b"1.2.840.10008.1.2.1.99" in content[:400] and rng.random() < 0.6:
        return _mutate_deflated(content, donor, rng)
    return _mutate_bytes(content, donor, rng, TEXT_TOKENS if is_text else ())


def _mutate_bytes(content: bytes, donor: bytes, rng: random.Random, tokens: tuple[bytes, ...] = ()) -> bytes:
    data = bytearray(content)
    near = rng.random() < 0.5  # all in the header, or anywhere
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        if not data:
            break
        at = rng.randrange(min(len(data), HEADER_BYTES) if near else len(data))
        kind = rng.choice(("flip", "flip", "edge", "edge", "cut", "drop", "double", "insert", "donate", "token"))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "edge":
            width = rng.choice((1, 2, 4))
            data[at : at + width] = rng.choice(EDGES[width]).to_bytes(width, rng.choice(("little", "big")))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + rng.randrange(1, 64)]
        elif kind == "double":
            data[at:at] = data[at : at + rng.randrange(1, 256)]
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 32))
        elif kind == "donate" and donor:
            start = rng.randrange(len(donor))
            piece = donor[start : start + rng.randrange(1, 128)]
            data[at : at + len(piece)] = piece
        elif kind == "token" and tokens:
            data[at:at] = rng.choice(tokens) * rng.choice((1, 1, 1, 500))
    return bytes(data)


def _mutate_deflated(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """Damages the data set inside the deflate stream."""
    start = 132 + 12 + struct.unpack_from("<I", content, 140)[0]  # after the group length element and its group
    inside = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[start:])
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return content[:start] + packer.compress(_mutate_bytes(inside, donor, rng)) + packer.flush()


def _mutate_png(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """Damages one chunk and repairs its checksum; pixel data are damaged before or after their compression."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    pick = rng.randrange(len(chunks))
    kind, body = chunks[pick]
    if kind == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(_mutate_bytes(zlib.decompress(body), donor, rng))
    else:
        body = _mutate_bytes(body or b"\0", donor, rng)
    chunks[pick] = kind, body
    if rng.random() < 0.2:
        chunks.insert(pick, (rng.choice((b"tEXt", b"zTXt", b"iCCP", b"PLTE", b"tRNS", b"IHDR", b"acTL", kind)), body))
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return PNG_MAGIC + b"".join(packed)
