"""The directory ``meta`` of an image as an attachment (``uenv/meta``): packing it as oras does, and finding one file in it again.

The reader runs in the daemon and gets bytes from whoever may write to the registry: it is bounded, follows no link, understands only
what it needs of the format, and parses nothing twice. Source: POSIX.1-2017, pax, "ustar Interchange Format".
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from uenvd.errors import ManifestError, UsageError
from uenvd.oci.manifest import digest_of
from uenvd.views import MAX_FILE_BYTES, ImageMeta, read_image_meta

UNPACK: Final = "io.deis.oras.content.unpack"
"""oras unpacks an archive only where this annotation says "true"; it gives the digest of the plain archive in the other."""
UNPACKED_DIGEST: Final = "io.deis.oras.content.digest"
MAX_PACKED_BYTES: Final = 8 << 20
MAX_UNPACKED_BYTES: Final = 64 << 20
MAX_TREE_BYTES: Final = 512 << 20
_BLOCK: Final = 512
_MAX_ENTRIES: Final = 50_000
_STEP_BYTES: Final = 1 << 20


def pack_directory(directory: Path, title: str) -> tuple[bytes, str]:
    """Return (gzipped tar archive of ``directory`` under the name ``title``, digest of the plain archive).

    Sorted, owned by root, without times: equal trees give equal bytes. Raises `UsageError`.
    """
    plain = io.BytesIO()
    try:
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path in [directory, *_tree(directory)]:
                relative = path.relative_to(directory)
                archive_name = title if path == directory else f"{title}/{relative}"
                _add(archive, path, archive_name)
                if plain.tell() > MAX_TREE_BYTES:
                    raise UsageError(
                        f"{directory} has more than {MAX_TREE_BYTES >> 20} MiB: too much for an attachment"
                    )
            end = plain.tell()
    except OSError as error:
        raise UsageError(f"{error.filename or directory} cannot be read: {error.strerror}") from error
    # oras hashes up to the end marker; tarfile pads the archive beyond it.
    data = plain.getvalue()[:end] + bytes(2 * _BLOCK)
    return gzip.compress(data, mtime=0), digest_of(data)


def _tree(directory: Path) -> Iterator[Path]:
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory")
    for path in sorted(directory.iterdir(), key=lambda path: os.fsencode(path.name)):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _tree(path)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    found = path.lstat()
    entry = tarfile.TarInfo(name)
    entry.mode = 0o755 if found.st_mode & 0o111 else 0o644
    if stat.S_ISDIR(found.st_mode):
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(entry)
    elif stat.S_ISLNK(found.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, str(path.readlink())
        archive.addfile(entry)
    elif stat.S_ISREG(found.st_mode):
        data = path.read_bytes()
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    else:
        raise UsageError(f"{path} is no file, directory or symbolic link")


def read_packed_meta(packed: bytes) -> ImageMeta | None:
    """Read ``meta/env.json`` out of a gzipped tar archive of the directory ``meta``; None where it holds none.

    Raises `ManifestError` for what is no such archive, or unpacks to more than 64 MiB before the file is found.
    """

    def read(name: bytes) -> bytes | None:
        return find_packed(packed, name.decode(errors="replace")) if name == b"meta/env.json" else None

    return read_image_meta(read)


def packed_texts(packed: bytes, directory: str, limit_bytes: int) -> dict[str, str]:
    """Return the UTF-8 files of a gzipped tar archive whose names begin with ``directory``, named without it.

    What would make them more than ``limit_bytes`` together, other kinds of files and binary ones are left out. Raises `ManifestError`.
    """
    stream = _Unpacked(packed)
    texts: dict[str, str] = {}
    for _ in range(_MAX_ENTRIES):
        header = stream.take(_BLOCK)
        if len(header) < _BLOCK or not any(header):
            break
        size, name = _size(header), _name(header)
        padded = -(-size // _BLOCK) * _BLOCK
        inside = name.startswith(directory) and name.isprintable() and ".." not in name.split("/")
        if header[156:157] not in {b"0", b"\0"} or not inside or size > limit_bytes:
            stream.skip(padded)
            continue
        data = stream.take(padded)[:size]
        limit_bytes -= size
        try:
            texts[name.removeprefix(directory)] = data.decode()
        except UnicodeDecodeError:
            continue
    return texts


def find_packed(packed: bytes, name: str) -> bytes | None:
    """Return one regular file of at most 1 MiB of a gzipped tar archive; None where it is not there. Raises `ManifestError`."""
    stream = _Unpacked(packed)
    for _ in range(_MAX_ENTRIES):
        header = stream.take(_BLOCK)
        if len(header) < _BLOCK or not any(header):
            return None
        size = _size(header)
        padded = -(-size // _BLOCK) * _BLOCK
        if header[156:157] in {b"0", b"\0"} and _name(header) == name:
            if size > MAX_FILE_BYTES:
                raise ManifestError(
                    f"{name} in the attached metadata has {size} bytes, more than {MAX_FILE_BYTES}"
                )
            data = stream.take(size)
            return data if len(data) == size else None
        stream.skip(padded)
    return None


def _size(header: bytes) -> int:
    try:
        size = int(header[124:136].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        size = -1
    if not 0 <= size <= MAX_UNPACKED_BYTES:
        raise ManifestError("the attached metadata is no tar archive that can be read")
    return size


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace").removeprefix("./")


class _Unpacked:
    """The bytes of a gzip stream, taken piece by piece and bounded."""

    def __init__(self, packed: bytes) -> None:
        self._inflater = zlib.decompressobj(wbits=31)
        self._rest = packed
        self._have = bytearray()
        self._total = 0

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end."""
        while len(self._have) < size and self._more():
            pass
        piece = bytes(self._have[:size])
        del self._have[:size]
        return piece

    def skip(self, size: int) -> None:
        while size > 0 and (self._have or self._more()):
            step = min(size, len(self._have))
            del self._have[:step]
            size -= step

    def _more(self) -> bool:
        if self._inflater.eof or not self._rest:
            return False
        try:
            piece = self._inflater.decompress(self._rest, _STEP_BYTES)
        except zlib.error as error:
            raise ManifestError("the attached metadata is no gzip archive") from error
        self._rest = self._inflater.unconsumed_tail
        self._total += len(piece)
        if self._total > MAX_UNPACKED_BYTES:
            raise ManifestError(f"the attached metadata unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
        self._have += piece
        return bool(piece)
