"""Bounded decompression: one function per compressor, ``inflate(data, limit_bytes) -> bytes``.

Each refuses output beyond ``limit_bytes`` without ever allocating much more than that, input that ends early, and bytes after the end
of the compressed stream. Sizes that the stream declares are checked, never trusted.

Concurrency: every function may be called from many threads at once; the libraries release the GIL while they work.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from uenvd.errors import FormatError
from uenvd.squashfs import lzo
from uenvd.squashfs.base import damaged
from uenvd.squashfs.superblock import MAX_BLOCK_BYTES, METADATA_BLOCK_BYTES, Compressor

Inflate = Callable[[bytes, int], bytes]
"""``inflate(data, limit_bytes)``: decompress to at most ``limit_bytes``. Raises `FormatError`."""

_XZ_OVERHEAD_BYTES = 1 << 20
"""What liblzma needs beside the dictionary; under 100 KiB for one LZMA2 stream with branch filters."""


def _too_long(limit_bytes: int) -> FormatError:
    return damaged(f"a block unpacks to more than {limit_bytes} bytes")


def _gzip() -> Inflate:
    import zlib

    def inflate(data: bytes, limit_bytes: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            # One byte more than allowed, so that zlib goes on to the end marker and the checksum of a block of exactly the limit.
            out = stream.decompress(data, limit_bytes + 1)
        except zlib.error as error:
            raise damaged(f"gzip: {error}") from None
        if len(out) > limit_bytes:
            raise _too_long(limit_bytes)
        if not stream.eof or stream.unused_data:
            raise damaged("gzip: the stream does not end with its block")
        return out

    return inflate


def _xz(dictionary_bytes: int) -> Inflate:
    import lzma

    memory_limit_bytes = dictionary_bytes + _XZ_OVERHEAD_BYTES

    def inflate(data: bytes, limit_bytes: int) -> bytes:
        try:
            stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memory_limit_bytes)
            out = stream.decompress(data, limit_bytes + 1)
        except (lzma.LZMAError, EOFError) as error:
            raise damaged(f"xz: {error}") from None
        if len(out) > limit_bytes:
            raise _too_long(limit_bytes)
        if not stream.eof or stream.unused_data:
            raise damaged("xz: the stream does not end with its block")
        return out

    return inflate


_LZMA_HEADER = struct.Struct("<BIQ")
_LZMA_SIZE_UNKNOWN = 0xFFFF_FFFF_FFFF_FFFF


def _lzma() -> Inflate:
    """LZMA of old: each block is a file of the ``.lzma`` format, whose header states the size. With or without end marker: both occur."""
    import lzma

    memory_limit_bytes = MAX_BLOCK_BYTES + _XZ_OVERHEAD_BYTES

    def inflate(data: bytes, limit_bytes: int) -> bytes:
        if len(data) < _LZMA_HEADER.size:
            raise damaged("lzma: the header is cut off")
        properties, dictionary_bytes, size_bytes = _LZMA_HEADER.unpack_from(data)
        if size_bytes > limit_bytes:
            raise _too_long(limit_bytes)
        reason = "the stream does not end with its block"
        # liblzma before 5.2.6 takes a marker only where no size is stated.
        for stated_bytes in (size_bytes, _LZMA_SIZE_UNKNOWN):
            header = _LZMA_HEADER.pack(properties, dictionary_bytes, stated_bytes)
            try:
                stream = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memory_limit_bytes)
                out = stream.decompress(header + data[_LZMA_HEADER.size :], size_bytes + 1)
            except (lzma.LZMAError, EOFError) as error:
                reason = str(error)
                continue
            if stream.eof and not stream.unused_data and len(out) == size_bytes:
                return out
        raise damaged(f"lzma: {reason}")

    return inflate


_LZO_SLACK_BYTES = 8 << 20
"""What a block may take beyond its limit before the library's output is thrown away. Blocks of 128 KiB hardly ever come near."""


def _lzo() -> Inflate:
    import lzallright

    decompress = lzallright.LZOCompressor.decompress
    error_class: type[Exception] = lzallright.LZOError

    def inflate(data: bytes, limit_bytes: int) -> bytes:
        # The library knows no limit.
        if lzo.bound_bytes(data) > limit_bytes + _LZO_SLACK_BYTES and lzo.exceeds(data, limit_bytes):
            raise _too_long(limit_bytes)
        try:
            out: bytes = decompress(data, limit_bytes)
        except error_class as error:
            # An error of bytes after the end holds the output, too.
            reason = str(error.args[0]).rpartition(".")[2] if error.args else "error"
            raise damaged(f"lzo: {reason}") from None
        if len(out) > limit_bytes:
            raise _too_long(limit_bytes)
        return out

    return inflate


def _lz4() -> Inflate:
    import lz4.block

    decompress = lz4.block.decompress
    error_class: type[Exception] = lz4.block.LZ4BlockError

    def inflate(data: bytes, limit_bytes: int) -> bytes:
        try:
            out: bytes = decompress(data, uncompressed_size=limit_bytes)
        except error_class as error:
            raise damaged(f"lz4: {error}") from None
        return out

    return inflate


def _zstd() -> Inflate:
    import zstandard

    thread = threading.local()

    def inflate(data: bytes, limit_bytes: int) -> bytes:
        try:
            # The library allocates what the frame declares, so this comes first. -1: the frame does not say.
            if zstandard.frame_content_size(data) > limit_bytes:
                raise _too_long(limit_bytes)
            decompressor: zstandard.ZstdDecompressor | None = getattr(thread, "decompressor", None)
            if decompressor is None:
                decompressor = thread.decompressor = zstandard.ZstdDecompressor()
            return decompressor.decompress(data, max_output_size=limit_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise damaged(f"zstd: {error}") from None

    return inflate


def options_size_bytes(compressor: Compressor) -> int:
    """Return the size of the compressor options block without its header; 0 where there never is one."""
    sizes = {Compressor.GZIP: 8, Compressor.LZO: 8, Compressor.XZ: 8, Compressor.LZ4: 8, Compressor.ZSTD: 4}
    return sizes.get(compressor, 0)


def inflater(compressor: Compressor, block_size_bytes: int, options: bytes | None) -> Inflate:
    """Return the decompression function of an image.

    Args:
        compressor: from the superblock.
        block_size_bytes: of the image; bounds the dictionary of xz.
        options: the compressor options block of the image, `options_size_bytes` long, None when it has none. gzip: u32 level,
            u16 window (8..15), u16 strategies. lzo: u32 algorithm, u32 level. xz: u32 dictionary size, u32 filters. lz4: u32 version
            (1), u32 flags. zstd: u32 level. lzma never has any.

    Raises: `FormatError` when the options are invalid or their format is not supported.
    """
    match compressor:
        case Compressor.GZIP:
            if options is not None:
                _level, window, _strategies = struct.unpack("<IHH", options)
                if not 8 <= window <= 15:
                    raise damaged(f"gzip window of {window} bits")
            return _gzip()
        case Compressor.XZ:
            dictionary_bytes = block_size_bytes
            if options is not None:
                dictionary_bytes, _filters = struct.unpack("<II", options)
                if not METADATA_BLOCK_BYTES <= dictionary_bytes <= MAX_BLOCK_BYTES:
                    raise damaged(f"xz dictionary of {dictionary_bytes} bytes")
            return _xz(max(dictionary_bytes, METADATA_BLOCK_BYTES))
        case Compressor.LZ4:
            if options is None:
                raise damaged("lz4 without compressor options")
            version, _flags = struct.unpack("<II", options)
            if version != 1:
                raise FormatError(f"lz4 format {version} is not supported, only 1")
            return _lz4()
        case Compressor.ZSTD:
            return _zstd()
        case Compressor.LZO:
            return _lzo()
        case Compressor.LZMA:
            return _lzma()
