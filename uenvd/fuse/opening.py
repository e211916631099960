"""From an image file to a tree and what the image says of itself; errors name the file."""

from __future__ import annotations

import errno
import os
import stat

from uenvd.errors import AccessDenied, FormatError, StorageError, UsageError, WorkerFailed
from uenvd.fuse.protocol import Source
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.tree import ROOT_INO, Tree
from uenvd.squashfs import Kind
from uenvd.views import MAX_FILE_BYTES, ImageMeta, read_image_meta

LATE_MODULES = ("zlib", "lzma", "zstandard", "lz4.block", "lzallright", "uenvd.views_sh")
"""Loaded on demand elsewhere; before a process is confined, because it can open no file then."""


def open_image(path: str) -> int:
    """Open an image file; return its descriptor. Raises `UsageError`, `AccessDenied`, `StorageError` with the reason."""
    try:
        # O_NONBLOCK: a FIFO must not hold us up; it means nothing for a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        message = f"cannot open {path}: {error.strerror}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise UsageError(message, hint="check the path of the image") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AccessDenied(
                message, hint=f"it has to be readable for the user with uid {os.geteuid()}"
            ) from error
        raise StorageError(message) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path} is not a regular file", hint="give the path of a squashfs image")
    return descriptor


def identity_of(descriptor: int) -> tuple[int, ...]:
    """Return what tells this state of an open file from all others: device, inode, size in bytes, mtime and ctime in ns. Raises `OSError`."""
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def open_again(path: str, expected: tuple[int, ...]) -> int:
    """Open an image file that was served before and is in use: the same one, in the state that it had (`identity_of`), or none.

    Raises as `open_image` does, and `WorkerFailed`.
    """
    descriptor = open_image(path)
    if identity_of(descriptor) != expected:
        os.close(descriptor)
        raise WorkerFailed(
            f"{path} is not the file any more that was mounted, or was changed",
            hint="end the sessions that use it, and begin them anew",
        )
    return descriptor


def open_tree(
    image_fd: int,
    name: str,
    *,
    mask_privileged: bool,
    cache_bytes: int,
    offset_bytes: int = 0,
    shared: SharedBlocks | None = None,
    source: Source | None = None,
) -> Tree:
    """Make the tree of an image. Raises `FormatError` or `StorageError` that names it."""
    try:
        tree = Tree(
            image_fd,
            mask_privileged=mask_privileged,
            cache_bytes=cache_bytes,
            offset_bytes=offset_bytes,
            shared=shared,
            source=source,
        )
        tree.prefetch_metadata()
        if tree.inode(ROOT_INO).kind is not Kind.DIRECTORY:
            raise FormatError("damaged squashfs image: its root is no directory")
    except FormatError as error:
        raise FormatError(f"{name}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise StorageError(f"cannot read {name}: {error.strerror}") from error
    return tree


def read_meta(tree: Tree, notes: list[str]) -> ImageMeta | None:
    """Read the image's description of itself; damage in it costs the description, not the image, and is noted."""

    def read_file(path: bytes) -> bytes | None:
        inode = tree.image.find(path)
        if inode is None or inode.kind is not Kind.FILE:
            return None
        if inode.size_bytes > MAX_FILE_BYTES:
            notes.append(
                f"{os.fsdecode(path)} in the image is too large to be read ({inode.size_bytes} bytes)"
            )
            return None
        return tree.image.read_file(inode, MAX_FILE_BYTES)

    return read_image_meta(read_file)
