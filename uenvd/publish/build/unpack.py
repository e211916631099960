"""Source files -> a directory to build in: tarballs, zip files, Debian source packages with their patches."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from uenvd.errors import BuildFailed

_CHECKSUM: Final = re.compile(r"^ ([0-9a-f]{64}) \d+ (\S+)$", re.MULTILINE)
_ORIG: Final = re.compile(r".*\.orig\.tar\.(gz|bz2|xz)")
_DEBIAN: Final = re.compile(r".*\.debian\.tar\.(gz|bz2|xz)")


def unpack(source: str, files: Mapping[str, Path], target: Path) -> list[Path]:
    """Unpack a source to ``target``, which must not exist; return the patches that come with it, in order.

    Args:
        source: name of a tarball, a zip file or a ``.dsc``.
        files: name -> where it is.
        target: gets what is in the source's one top directory.

    Raises:
        BuildFailed: it is none of these, is damaged, or a file that the ``.dsc`` names is not pinned, or is another.

    """
    if not source.endswith(".dsc"):
        _unpack_one(files[source], source, target)
        return []
    text = files[source].read_text(errors="replace")
    section = re.split(r"^(?=\S)", text.partition("Checksums-Sha256:\n")[2], maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    parts = {name: digest for digest, name in _CHECKSUM.findall(section)}
    missing = sorted(name for name in parts if name not in files)
    orig = next((name for name in parts if _ORIG.fullmatch(name)), None)
    if missing or orig is None:
        raise BuildFailed(
            f"{source} consists of {', '.join(sorted(parts)) or 'nothing known'}, and "
            + (
                f"these are not in the lock file: {', '.join(missing)}"
                if missing
                else "there is no .orig.tar"
            ),
            hint="uenvd-publish lock RECIPE --source debian:NAME=VERSION  pins all of them",
        )
    _unpack_one(files[orig], orig, target)
    debian = next((name for name in parts if _DEBIAN.fullmatch(name)), None)
    if debian is None:
        return []
    _unpack_one(files[debian], debian, target / "debian", keep_top=True)
    series = target / "debian/patches/series"
    if not series.is_file():
        return []
    names = (re.sub(r"(^|\s)#.*", "", line).split() for line in series.read_text().splitlines())
    return [target / "debian/patches" / words[0] for words in names if words]


def _unpack_one(path: Path, name: str, target: Path, *, keep_top: bool = False) -> None:
    """Unpack an archive; unless ``keep_top`` its one top directory becomes ``target``."""
    holder = target.with_name(f".{target.name}-unpacking")
    holder.mkdir(parents=True)
    try:
        if name.endswith(".zip"):
            _unzip(path, holder)
        else:
            with tarfile.open(path) as archive:
                _untar(archive, holder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise BuildFailed(f"{name} cannot be unpacked: {error}") from error
    tops = list(holder.iterdir())
    if len(tops) == 1 and tops[0].is_dir():
        tops[0].rename(target)
        holder.rmdir()
    elif keep_top:
        raise BuildFailed(f"{name} is no archive of a directory debian")
    else:
        holder.rename(target)


def _untar(archive: tarfile.TarFile, holder: Path) -> None:
    """Extract files, directories and links, none of which leads out. Raises ValueError, OSError."""
    inside = holder.resolve()
    for member in archive:
        target = holder / member.name
        place = target.parent.resolve()
        if member.issym():
            place = (place / member.linkname).resolve()
        elif member.islnk():
            place = (holder / member.linkname).resolve()
        if member.name.startswith("/") or ".." in member.name.split("/") or not place.is_relative_to(inside):
            raise ValueError(f"{member.name!r} leads out of it")
        if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
            raise ValueError(f"{member.name!r} is no file, directory or link")
        member.mode = 0o755 if member.isdir() or member.mode & 0o111 else 0o644
        archive.extract(member, holder, set_attrs=not member.isdir())


def _unzip(path: Path, holder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            written = Path(archive.extract(entry, holder))
            mode = entry.external_attr >> 16
            if mode & 0o111 and written.is_file():
                written.chmod(0o755)


def settle_times(root: Path, date_s: int) -> None:
    """Give everything one time stamp, so that no patched file makes ``make`` call autoconf, and no date gets into the image."""
    for directory, _names, files in os.walk(root):
        for name in files:
            os.utime(Path(directory, name), (date_s, date_s), follow_symlinks=False)
