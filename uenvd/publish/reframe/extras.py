"""What an image brings for its tests: its environments and its test files, read out of the squashfs file without mounting it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from uenvd.errors import FormatError, UsageError
from uenvd.publish.reframe.environments import (
    IMAGE_FILE,
    MAX_FILE_BYTES,
    TESTS_DIRECTORY,
    TestEnvironment,
    parse_environments,
)
from uenvd.publish.smoke import SMOKE_FILE, SmokeTests, parse_smoke
from uenvd.squashfs import Image, Inode, Kind
from uenvd.views import MAX_FILE_BYTES as MAX_META_BYTES
from uenvd.views import ImageMeta, read_image_meta

MAX_FILES: Final = 2000
MAX_TOTAL_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Extras:
    """What is in the image."""

    meta: ImageMeta | None
    environments: tuple[TestEnvironment, ...] | None
    """None if the image has no ``meta/extra/reframe.yaml``."""
    smoke: SmokeTests
    """What ``meta/extra/smoke.yaml`` adds to the built-in tests."""
    tests: Path | None
    """Where the test files of ``meta/extra/reframe`` were copied; None if there are none."""


def read_extras(image: Path, directory: Path, name: str) -> Extras:
    """Read an image's metadata and environments, and copy its test files to ``directory``, which is made.

    Raises `FormatError` for what is no squashfs image, `ConfigError` for a malformed reframe.yaml or smoke.yaml, `UsageError` for unreadable
    files and for test directories beyond the bounds.
    """
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{image} cannot be read: {error.strerror}") from error
    try:
        squashfs = Image(
            lambda pos_bytes, size_bytes: os.pread(fd, size_bytes, pos_bytes), os.fstat(fd).st_size
        )
        return Extras(
            read_image_meta(lambda path: _small_file(squashfs, path, MAX_META_BYTES)),
            _environments(squashfs, name),
            _smoke(squashfs, name),
            _Copy(squashfs).run(directory),
        )
    except OSError as error:
        raise UsageError(f"the tests in {image} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _small_file(image: Image, path: bytes, limit_bytes: int) -> bytes | None:
    inode = image.find(path)
    if inode is None or inode.kind is not Kind.FILE or inode.size_bytes > limit_bytes:
        return None
    return image.read_file(inode, limit_bytes)


def _environments(image: Image, name: str) -> tuple[TestEnvironment, ...] | None:
    inode = image.find(IMAGE_FILE.encode())
    if inode is None:
        return None
    data = image.read_file(inode, MAX_FILE_BYTES)
    return parse_environments(data.decode(errors="replace"), f"{name}: {IMAGE_FILE}")


def _smoke(image: Image, name: str) -> SmokeTests:
    inode = image.find(SMOKE_FILE.encode())
    if inode is None:
        return SmokeTests()
    data = image.read_file(inode, MAX_FILE_BYTES)
    return parse_smoke(data.decode(errors="replace"), f"{name}: {SMOKE_FILE}")


class _Copy:
    """Copies a directory out of an image: regular files, directories, and links that stay in it."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._files = 0
        self._bytes = 0

    def run(self, target: Path) -> Path | None:
        source = self._image.find(TESTS_DIRECTORY.encode())
        if source is None or source.kind is not Kind.DIRECTORY:
            return None
        self._directory(source, target, 0)
        return target

    def _directory(self, source: Inode, target: Path, depth: int) -> None:
        if depth > 32:
            raise FormatError(f"{TESTS_DIRECTORY} in the image is nested too deeply")
        target.mkdir(parents=True)
        for entry in self._image.entries(source):
            self._files += 1
            if self._files > MAX_FILES:
                raise UsageError(f"{TESTS_DIRECTORY} in the image holds more than {MAX_FILES} files")
            inode = self._image.child(entry)
            place = target / os.fsdecode(entry.name)
            if inode.kind is Kind.DIRECTORY:
                self._directory(inode, place, depth + 1)
            elif inode.kind is Kind.FILE:
                self._file(inode, place)
            elif inode.kind is Kind.SYMLINK:
                self._link(inode, place, depth)
            else:
                raise UsageError(
                    f"{place.name} in {TESTS_DIRECTORY} of the image is neither file nor directory"
                )

    def _file(self, inode: Inode, place: Path) -> None:
        self._bytes += inode.size_bytes
        if self._bytes > MAX_TOTAL_BYTES:
            raise UsageError(f"{TESTS_DIRECTORY} in the image holds more than {MAX_TOTAL_BYTES >> 20} MiB")
        place.write_bytes(self._image.read_file(inode, MAX_TOTAL_BYTES))
        place.chmod(0o755 if inode.mode & 0o111 else 0o644)

    def _link(self, inode: Inode, place: Path, depth: int) -> None:
        aim = PurePosixPath(os.fsdecode(self._image.symlink_target(inode)))
        level = depth
        for part in aim.parts:
            level += -1 if part == ".." else 1
            if level < 0:
                break
        if aim.is_absolute() or level < 0:
            raise UsageError(f"{place.name} in {TESTS_DIRECTORY} of the image is a link out of it ({aim})")
        place.symlink_to(aim)
