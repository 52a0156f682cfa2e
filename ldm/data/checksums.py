"""Checksums of the files that this project writes, in a trailer that readers of `.npy` and HDF5 files do not look at.

The trailer is JSON, `{"size": …, "block": …, "crc32": […]}` for the bytes before it, and then 24 bytes: the length of
the JSON, its own CRC-32 and `MAGIC`. Files without one are older, or somebody else's.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ldm.util import UserError

BLOCK = 4 << 20  # two of them, compared at every start, take some 10 ms
MAGIC = b"EncDiffCRC32"
END = struct.Struct(f"<QI{len(MAGIC)}s")


@dataclass(frozen=True)
class Checksums:
    """A trailer's content.

    Args:
        size: bytes before the trailer.
        block: bytes per checksum; the last block may be shorter.
        crc32: one per block.
    """

    size: int
    block: int
    crc32: list[int]


def _blocks(file: IO[bytes], size: int, block: int) -> Iterator[int]:
    """CRC-32 of every block of the first `size` bytes."""
    file.seek(0)
    for start in range(0, size, block):
        yield zlib.crc32(file.read(min(block, size - start)))


def add_checksums(path: Path) -> None:
    """Append the trailer to a complete file."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        record = {"size": size, "block": BLOCK, "crc32": list(_blocks(file, size, BLOCK))}
        text = json.dumps(record).encode()
        file.seek(size)
        file.write(text + END.pack(len(text), zlib.crc32(text), MAGIC))


def read_checksums(file: IO[bytes]) -> Checksums | None:
    """The trailer of an open file; None if it has none.

    Raises:
        ValueError: the trailer is damaged, or is not behind the bytes that it belongs to.
    """
    length = file.seek(0, os.SEEK_END)
    if length < END.size:
        return None
    file.seek(length - END.size)
    count, checksum, magic = END.unpack(file.read(END.size))
    if magic != MAGIC:
        return None
    start = length - END.size - count
    if start >= 0:
        file.seek(start)
        text = file.read(count)
        if zlib.crc32(text) == checksum:
            found = Checksums(**json.loads(text))
            if found.size == start:
                return found
    raise ValueError("its checksums at the end of the file are damaged")


def check_content(file: IO[bytes], path: Path, advice: str, full: bool = False) -> int:
    """Compare the first and the last block of an open file with its checksums, if it has any.

    Args:
        file: open for reading.
        path: its name, for the error.
        advice: what to do if it is damaged, for the error.
        full: compare all blocks.

    Returns:
        The number of bytes without the trailer.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found = read_checksums(file)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from error
    if found is None:
        return file.seek(0, os.SEEK_END)
    last = len(found.crc32) - 1
    for number in range(last + 1) if full else sorted({0, last}) if last >= 0 else ():
        start = number * found.block
        file.seek(start)
        end = min(start + found.block, found.size)
        if zlib.crc32(file.read(end - start)) != found.crc32[number]:
            raise UserError(f"{path} is damaged (bytes {start} to {end - 1} differ from their checksum): {advice}")
    return found.size
