"""Reading LMDB files without LMDB, which maps them into memory and trusts every number in them: a damaged or truncated
file would end the process. Here, pages are read one by one, and each must be where and what the tree says.

The layout is that of version 1 on 64-bit little-endian machines: http://www.lmdb.tech/doc/, `mdb.c`.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = struct.Struct("<QHHHH")  # of a page: its number, unused, flags, end of the node list, start of the nodes
NODE = struct.Struct("<HHHH")  # of a node: two halves of a size or page number, flags or page number, size of the key
TREE = struct.Struct("<IHHQQQQQ")  # page size or unused, flags, depth, counts of 3 kinds of pages, entries, root
META = struct.Struct(
    f"<IIQQ{TREE.size}s{TREE.size}sQQ"
)  # magic, version, address, map size, 2 trees, last page, number
BRANCH, LEAF, OVERFLOW, META_PAGE = 1, 2, 4, 8
BIG, EMPTY = 1, 2**64 - 1  # a value on pages of its own; the root of an empty tree


@dataclass(frozen=True)
class Value:
    """Where in the file a value is."""

    offset: int
    size: int


class LMDBReader:
    """The main tree of an LMDB, for look-ups.

    Args:
        file: `data.mdb`, or the database where it is a single file, opened for reading.

    Raises:
        ValueError: not an LMDB, or a damaged one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.page_size = 4096
        self.page_size, *_ = self._meta(0)
        if self.page_size not in (1 << n for n in range(9, 17)):
            raise ValueError(f"its pages have {self.page_size} bytes")
        first, second = self._meta(0), self._meta(1)
        numbers = first[-1], second[-1]
        if abs(numbers[0] - numbers[1]) > 1 or (max(numbers) and (numbers[0] % 2, numbers[1] % 2) != (0, 1)):
            raise ValueError("its two headers do not belong together")
        _, flags, self.depth, self.root, self.last_page, _ = max(first, second, key=lambda meta: meta[-1])
        if self.depth > 32:
            raise ValueError(f"its tree has a depth of {self.depth}")
        if flags:
            raise ValueError("its keys are sorted in another way than those of images")

    def _read(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self.size:
            raise EOFError(f"it has {self.size} bytes, and a part at {offset} of {size}")
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) < size:
            raise EOFError("it became shorter while it was read")
        return data

    def _meta(self, number: int) -> tuple[int, int, int, int, int, int]:
        """Page size; the main tree's flags, depth and root; the last page; the number of the last change."""
        start = number * self.page_size
        page = HEADER.unpack(self._read(start, HEADER.size))
        magic, version, _, _, free, main, last_page, change = META.unpack(self._read(start + HEADER.size, META.size))
        if magic != MAGIC or version != VERSION or page[0] != number or not page[2] & META_PAGE:
            raise ValueError("it has no header of an LMDB of version 1 of a 64-bit little-endian machine")
        _, flags, depth, *_, root = TREE.unpack(main)
        return TREE.unpack(free)[0], flags, depth, root, last_page, change

    def _page(self, number: int, kind: int) -> bytes:
        """A page, or the header of an overflow page."""
        if not 2 <= number <= self.last_page:
            raise ValueError(f"a page has the number {number} of {self.last_page}")
        page = self._read(number * self.page_size, HEADER.size if kind == OVERFLOW else self.page_size)
        found, _, flags, *_ = HEADER.unpack_from(page)
        if found != number or flags & (BRANCH | LEAF | OVERFLOW | META_PAGE) != kind:
            raise ValueError(f"page {number} is another one")
        return page

    def _nodes(self, page: bytes) -> tuple[int, ...]:
        """Where the nodes of a page begin."""
        _, _, _, lower, upper = HEADER.unpack_from(page)
        count = (lower - HEADER.size) // 2
        if count < 1 or lower % 2 or not lower <= upper <= len(page):
            raise ValueError("the list of a page's nodes is damaged")
        places = struct.unpack_from(f"<{count}H", page, HEADER.size)
        if min(places) < upper or max(places) > len(page) - NODE.size:
            raise ValueError("the list of a page's nodes is damaged")
        return places

    @staticmethod
    def _key(page: bytes, place: int) -> bytes:
        size = NODE.unpack_from(page, place)[3]
        if place + NODE.size + size > len(page):
            raise ValueError("a key is longer than its page")
        return page[place + NODE.size : place + NODE.size + size]

    def find(self, key: bytes) -> Value | None:
        """Where the value of a key is; None if there is no such key.

        Raises:
            ValueError, EOFError: the pages on the way to it, or the value's own, are damaged or missing.
        """
        if self.root == EMPTY:
            return None
        number = self.root
        for level in range(self.depth, 0, -1):
            page = self._page(number, LEAF if level == 1 else BRANCH)
            nodes = self._nodes(page)
            low, high = (0, len(nodes)) if level == 1 else (1, len(nodes))  # a branch's first key is left out
            while low < high:  # the first node whose key is greater than `key`
                middle = (low + high) // 2
                low, high = (middle + 1, high) if self._key(page, nodes[middle]) <= key else (low, middle)
            if low == 0:
                return None
            place = nodes[low - 1]
            if level > 1:
                number = self._child(page, place)
        return self._value(page, number, place) if self._key(page, place) == key else None

    def items(self) -> Iterator[tuple[bytes, Value]]:
        """All keys, sorted, and where their values are. See `find` for the errors."""
        if self.root != EMPTY:
            yield from self._below(self.root, self.depth)

    def _below(self, number: int, level: int) -> Iterator[tuple[bytes, Value]]:
        page = self._page(number, LEAF if level == 1 else BRANCH)
        for place in self._nodes(page):
            if level > 1:
                yield from self._below(self._child(page, place), level - 1)
            else:
                yield self._key(page, place), self._value(page, number, place)

    @staticmethod
    def _child(page: bytes, place: int) -> int:
        """The page that a branch's node leads to."""
        low, high, highest, _ = NODE.unpack_from(page, place)
        return low | high << 16 | highest << 32

    def _value(self, page: bytes, number: int, place: int) -> Value:
        """Where the value of a node of leaf `number` is."""
        key = self._key(page, place)
        low, high, flags, _ = NODE.unpack_from(page, place)
        size, start = low | high << 16, place + NODE.size + len(key)
        if flags & ~BIG:
            raise ValueError(f"the value of {key!r} is of another kind than an image")
        if start + (8 if flags else size) > len(page):
            raise ValueError(f"the value of {key!r} is longer than its page")
        if not flags:
            return Value(number * self.page_size + start, size)
        return self._big(key, int.from_bytes(page[start : start + 8], "little"), size)

    def _big(self, key: bytes, number: int, size: int) -> Value:
        """A value on pages of its own."""
        pages = int.from_bytes(self._page(number, OVERFLOW)[12:16], "little")
        offset = number * self.page_size + HEADER.size
        if -(-(HEADER.size + size) // self.page_size) != pages or offset + size > self.size:
            raise EOFError(f"the value of {key!r} has {size} bytes, and {pages} pages from number {number}")
        return Value(offset, size)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if there is no such key. See `find` for the errors."""
        found = self.find(key)
        return None if found is None else self.read(found)

    def read(self, value: Value) -> bytes:
        """A value that was found."""
        return self._read(value.offset, value.size)
