"""The squashfs 4.0 on-disk format: bytes in, values out, no I/O. `Image` is the way in."""

from uenvd.squashfs.base import InodeRef, ReadAt
from uenvd.squashfs.data import Block, Span
from uenvd.squashfs.directory import DirEntry
from uenvd.squashfs.image import Image
from uenvd.squashfs.inode import BASIC_INODE, KINDS, Facts, Inode, Kind
from uenvd.squashfs.superblock import Compressor, Superblock

__all__ = [
    "BASIC_INODE",
    "KINDS",
    "Block",
    "Compressor",
    "DirEntry",
    "Facts",
    "Image",
    "Inode",
    "InodeRef",
    "Kind",
    "ReadAt",
    "Span",
    "Superblock",
]
