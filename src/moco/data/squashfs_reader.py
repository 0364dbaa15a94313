"""Reads squashfs 4.0 images as they are: no mount, no FUSE, no privileges, in any number of processes at a time.

Opening and reading thousands of small files through FUSE takes ten times what decoding them takes, and a mount is not
permitted everywhere. Layout: the Linux kernel's Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h.
Nothing that an image declares is believed: every block has a bound, links are not followed.
Imports no torch: workers that decode images use it.
"""

from __future__ import annotations

import importlib
import io
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MAGIC = 0x73717368
SUPERBLOCK = struct.Struct("<5I6H8Q")
METADATA = 8192  # bytes of a metadata block, unpacked
METADATA_BLOCKS_KEPT = 4096
DATA_KEPT = 1 << 25  # bytes of unpacked data blocks: neighbours share them
LARGEST_FILE = 1 << 28  # bytes; no picture and no label tensor is as large, a bomb is
FOLDER, FILE, LINK = 1, 2, 3
EXTENDED = 7  # what an extended inode's type is above the basic one
STORED_METADATA, STORED_DATA = 1 << 15, 1 << 24  # bits that say: not compressed
NO_FRAGMENT = 0xFFFFFFFF
FRAGMENTS_PER_BLOCK = METADATA // 16


class DamagedImageError(OSError):
    """The image contradicts itself or ends too early."""


class UnknownCompressionError(OSError):
    """The image is packed by a method that this Python has no module for."""


Unpack = Callable[[bytes, int], bytes]


def _bounded(decompressor: Callable[[], object]) -> Unpack:
    """Return a function that unpacks at most `limit` bytes, whatever the packed ones claim."""

    def unpack(packed: bytes, limit: int) -> bytes:
        try:
            stream = decompressor()
            unpacked: bytes = stream.decompress(packed, limit + 1)  # type: ignore[attr-defined]
        except Exception as error:  # each module has its own
            raise DamagedImageError(f"damaged: a block cannot be unpacked: {error}") from None
        if len(unpacked) > limit or not stream.eof:  # type: ignore[attr-defined]
            raise DamagedImageError("damaged: a block does not end where it should")
        return unpacked

    return unpack


def unpacking(method: int) -> Unpack:
    """Return the function that unpacks blocks of a compression method.

    Raises UnknownCompressionError where this Python has no module for the method.
    """
    if method == 1:
        return _bounded(zlib.decompressobj)
    if method == 4:
        return _bounded(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
    if method == 6:
        try:
            return _bounded(importlib.import_module("compression.zstd").ZstdDecompressor)
        except ImportError:
            pass
    name = {2: "lzma", 3: "lzo", 5: "lz4", 6: "zstd"}.get(method, f"method {method}")
    raise UnknownCompressionError(f"compressed with {name}, which is not read directly (gzip and xz are)")


@dataclass(frozen=True)
class _File:
    """Where a file's bytes lie: full blocks from `start`, then a piece of a block that is shared with others."""

    start: int
    size: int
    blocks: tuple[int, ...]
    fragment: int
    offset: int


class SquashfsImage:
    """An open image. Entries are addressed by inode references, as the format has them.

    Raises DamagedImageError (an OSError) for whatever contradicts the format, on opening or when the place is read;
    UnknownCompressionError on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        head = self._bytes(0, SUPERBLOCK.size)
        (magic, _, _, self._block_size, self._fragments, method, block_log, _, _, major, minor, self.root,
         _, _, _, self._inodes, self._folders, self._fragment_table, _) = SUPERBLOCK.unpack(head)  # fmt: skip
        if magic != MAGIC or (major, minor) != (4, 0):
            raise DamagedImageError(f"not squashfs 4.0 (version {major}.{minor})")
        if not 12 <= block_log <= 20 or self._block_size != 1 << block_log:
            raise DamagedImageError(f"damaged: blocks of {self._block_size} bytes")
        self._unpack = unpacking(method)
        # metadata(place): an unpacked block, and where the next one begins.
        self.metadata = lru_cache(METADATA_BLOCKS_KEPT)(self._read_metadata)
        self._data = lru_cache(max(8, DATA_KEPT // self._block_size))(self._read_data)

    def close(self) -> None:
        """Close the file and empty the caches of blocks."""
        self._file.close()
        self.metadata.cache_clear()  # else they keep each other alive, as they hold this object
        self._data.cache_clear()

    def __enter__(self) -> SquashfsImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def listing(self, folder: int) -> dict[str, tuple[int, int]]:
        """Return name: (kind, inode reference) of what is in a folder.

        Kinds other than FOLDER and FILE are links, devices…
        """
        kind, inode = self._inode(folder)
        if kind == FOLDER:
            block, _, size, offset, _ = struct.unpack("<IIHHI", inode.take(16))
        elif kind == FOLDER + EXTENDED:
            _, size, block, _, _, offset, _ = struct.unpack("<IIIIHHI", inode.take(24))
        else:
            raise DamagedImageError("damaged: a folder is none")
        found: dict[str, tuple[int, int]] = {}
        entries, left = _Cursor(self, self._folders + block, offset), size - 3  # the format counts . and .. as 3
        while left > 0:
            count, start, _ = struct.unpack("<III", entries.take(12))
            left -= 12
            if count >= 256:
                raise DamagedImageError("damaged: a folder's index")
            for _ in range(count + 1):
                place, _, kind, length = struct.unpack("<HhHH", entries.take(8))
                name = os.fsdecode(entries.take(length + 1))
                if "/" in name or "\0" in name or name in (".", "..") or name in found:
                    raise DamagedImageError(f"damaged: an entry is called {name!r}")
                found[name] = (kind, start << 16 | place)
                left -= 8 + length + 1
        return found

    def read(self, file: int) -> bytes:
        """Return all bytes of a file."""
        found = self._locate(file)
        parts, place, left = [], found.start, found.size
        for block in found.blocks:
            length = min(left, self._block_size)
            parts.append(self._data(place, block, length) if block else bytes(length))  # 0: a hole
            place += block & (STORED_DATA - 1)
            left -= length
        if left:
            start, size = self._fragment(found.fragment)
            piece = self._data(start, size, None)[found.offset : found.offset + left]
            if len(piece) != left:
                raise DamagedImageError("damaged: a file's last piece is missing")
            parts.append(piece)
        return b"".join(parts)

    def _locate(self, reference: int) -> _File:
        kind, inode = self._inode(reference)
        if kind == FILE:
            start, fragment, offset, size = struct.unpack("<IIII", inode.take(16))
        elif kind == FILE + EXTENDED:
            start, size, _, _, fragment, offset, _ = struct.unpack("<QQQIIII", inode.take(40))
        else:
            raise DamagedImageError("not a regular file")
        if size > LARGEST_FILE:
            raise DamagedImageError(f"declares {size >> 20} MiB, which no image has")
        whole, rest = divmod(size, self._block_size)
        count = whole + (1 if rest and fragment == NO_FRAGMENT else 0)
        blocks = struct.unpack(f"<{count}I", inode.take(4 * count))
        return _File(start, size, blocks, fragment, offset)

    def _fragment(self, number: int) -> tuple[int, int]:
        if number >= self._fragments:
            raise DamagedImageError("damaged: a file's last piece lies nowhere")
        index, entry = divmod(number, FRAGMENTS_PER_BLOCK)
        (place,) = struct.unpack("<Q", self._bytes(self._fragment_table + 8 * index, 8))
        start, size, _ = struct.unpack("<QII", _Cursor(self, place, 16 * entry).take(16))
        return start, size

    def _inode(self, reference: int) -> tuple[int, _Cursor]:
        """Return the inode's kind, and a cursor behind the head that all kinds share."""
        cursor = _Cursor(self, self._inodes + (reference >> 16), reference & 0xFFFF)
        (kind,) = struct.unpack("<H", cursor.take(16)[:2])
        return kind, cursor

    def _read_metadata(self, place: int) -> tuple[bytes, int]:
        (head,) = struct.unpack("<H", self._bytes(place, 2))
        size = head & (STORED_METADATA - 1)
        if not 0 < size <= METADATA:
            raise DamagedImageError("damaged: the size of a metadata block")
        block = self._bytes(place + 2, size)
        return block if head & STORED_METADATA else self._unpack(block, METADATA), place + 2 + size

    def _read_data(self, place: int, head: int, length: int | None) -> bytes:
        """Return an unpacked data block.

        length: bytes that it must have; None for those of shared blocks, which may be shorter than a whole one.
        """
        size = head & (STORED_DATA - 1)
        if not 0 < size <= self._block_size:
            raise DamagedImageError("damaged: the size of a data block")
        block = self._bytes(place, size)
        if not head & STORED_DATA:
            block = self._unpack(block, self._block_size)
        if length is not None and len(block) != length:
            raise DamagedImageError(f"damaged: a block of {len(block)} bytes in place of {length}")
        return block

    def _bytes(self, place: int, size: int) -> bytes:
        if place >= 1 << 63:
            raise DamagedImageError("damaged: a place beyond any file's end")
        found = os.pread(self._file.fileno(), size, place)
        if len(found) != size:
            raise DamagedImageError("ends too early, as after a copy that was broken off")
        return found


class _Cursor:
    """Reads on through metadata blocks."""

    def __init__(self, image: SquashfsImage, place: int, offset: int) -> None:
        self._image, self._place, self._offset = image, place, offset

    def take(self, size: int) -> bytes:
        parts = []
        while size:
            block, following = self._image.metadata(self._place)
            part = block[self._offset : self._offset + size]
            if not part and self._offset > len(block):
                raise DamagedImageError("damaged: a reference into nothing")
            parts.append(part)
            size -= len(part)
            self._offset += len(part)
            if size:
                self._place, self._offset = following, 0
        return b"".join(parts)


class SquashfsPath:
    """An entry of an image, with what pathlib calls its methods; one that does not exist can be named as well."""

    def __init__(self, image: SquashfsImage, name: str = "", kind: int = FOLDER, inode: int | None = None) -> None:
        self.image, self._name, self._kind = image, name, kind
        self.inode = image.root if inode is None and not name else inode
        self._listing: dict[str, tuple[int, int]] | None = None

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self._name.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.image.path}/{self._name}".rstrip("/")

    def __truediv__(self, name: str) -> SquashfsPath:
        kind, inode = self._entries().get(name) or (0, None)
        return SquashfsPath(self.image, f"{self._name}/{name}".lstrip("/"), kind, inode)

    def is_dir(self) -> bool:
        """Return whether this is a folder. Raises DamagedImageError for a link."""
        self._refuse_link()
        return self._kind == FOLDER and self.inode is not None

    def is_file(self) -> bool:
        """Return whether this is a regular file. Raises DamagedImageError for a link."""
        self._refuse_link()
        return self._kind == FILE

    def _refuse_link(self) -> None:
        if self._kind == LINK:
            raise DamagedImageError(f"{self._name} is a link, which is not followed")

    def iterdir(self) -> Iterator[SquashfsPath]:
        """Return an iterator over the entries of this folder."""
        return (self / name for name in self._entries())

    def read_bytes(self) -> bytes:
        """Return all bytes of the file. Raises FileNotFoundError where it does not exist."""
        if self.inode is None:
            raise FileNotFoundError(str(self))
        return self.image.read(self.inode)

    def read_text(self, encoding: str) -> str:
        """Return the file's text, decoded from this encoding."""
        return self.read_bytes().decode(encoding)

    def open(self, _mode: str = "rb") -> io.BytesIO:
        """Return the file's content as a binary stream in memory."""
        return io.BytesIO(self.read_bytes())

    def _entries(self) -> dict[str, tuple[int, int]]:
        if self._listing is None:
            self._listing = self.image.listing(self.inode) if self.is_dir() and self.inode is not None else {}
        return self._listing
