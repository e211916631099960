"""A tool chain of pinned Debian packages, unpacked to a root of its own: compilers, shell, make. Nothing of the machine is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from uenvd import mounts
from uenvd.errors import BuildFailed
from uenvd.publish.build.audit import BUILD_DIRECTORY
from uenvd.publish.build.relocate import Run

_MERGED: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Directories of the root that are links into /usr on every Debian since 12."""
_CHOICES: Final = (
    ("awk", ("mawk", "gawk", "original-awk")),
    ("sh", ("dash", "bash")),
    ("pkg-config", ("pkgconf",)),
    ("python3", ("python3.13", "python3.12", "python3.11")),
)
"""Names that packages give themselves only when they are installed, which they are not here."""
COMPILERS: Final = (
    ("gcc", ("cc", "c99", "c89")),
    ("g++", ("c++",)),
    ("gfortran", ("f77", "f95")),
    ("clang", ()),
    ("clang++", ()),
    ("flang", ()),
)  # fmt: skip
"""Compilers that know -ffile-prefix-map, and names that lead to them where nothing else has the name."""
RUNTIME: Final = re.compile(r"lib(gcc_s|stdc\+\+|gfortran|quadmath|gomp|atomic)\.so\.\d+")
_RUNTIME_NAMES: Final = (
    "libgcc_s.so.1", "libstdc++.so.6", "libgfortran.so.5", "libquadmath.so.0", "libgomp.so.1", "libatomic.so.1",
)  # fmt: skip


def unpack(debs: Sequence[str], root: Path, prefix: Path, run: Run) -> None:
    """Unpack the packages and show what a build needs of the rest: devices, processes, its directory, the prefix.

    Raises `BuildFailed`, `OSError`.
    """
    root.mkdir()
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda deb: run("sh", "-c", _EXTRACT, "extract", deb, str(root)), debs))
    for name, candidates in _CHOICES:
        link = root / "usr/bin" / name
        found = next((one for one in candidates if (root / "usr/bin" / one).exists()), None)
        if found is not None and not os.path.lexists(link):
            link.symlink_to(found)
    if not (root / "usr/bin/sh").exists():
        raise BuildFailed(
            "the recipe's tool chain has no shell",
            hint="uenvd-publish lock RECIPE --toolchain --add dash ... pins it with all that it needs",
        )
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text(f"build:x:{os.getuid()}:{os.getgid()}::/nonexistent:/bin/sh\n")
    for source, target in (
        (BUILD_DIRECTORY, BUILD_DIRECTORY), ("/dev", "/dev"), ("/proc", "/proc"), (str(prefix), str(prefix)),
    ):  # fmt: skip
        (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        mounts.bind_recursive(source, f"{root}{target}")
    (root / "tmp").mkdir(exist_ok=True)


_EXTRACT: Final = 'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink --no-same-owner'
"""dpkg-deb -x would replace the links of the merged root by directories."""


def library_directories(root: Path) -> list[Path]:
    """Return where the unpacked packages have shared libraries."""
    return [place for place in sorted((root / "usr/lib").glob("*-linux-gnu*")) if place.is_dir()]


def wrap_compilers(root: Path, path: str, target: Path) -> None:
    """Write programs that call the compilers so that no path of the build comes into what they make.

    Told by a wrapper, not by CFLAGS: many programs hold the flags that they were compiled with.

    Args:
        root: where the compilers are.
        path: PATH there.
        target: directory of the programs.

    """
    target.mkdir()
    for name, aliases in COMPILERS:
        found = _which(root, path, name)
        if found is None:
            continue
        text = f'#!/bin/sh\nexec {found} -ffile-prefix-map={BUILD_DIRECTORY}/source/= "$@"\n'
        for wrapper in (name, *(alias for alias in aliases)):
            (target / wrapper).write_text(text)
            (target / wrapper).chmod(0o755)


def _which(root: Path, path: str, name: str) -> str | None:
    for place in path.split(":"):
        candidate = root / place.lstrip("/") / name
        if place and os.access(candidate, os.X_OK):
            return f"{place}/{name}"
    return None


def runtime_of_machine(directory: Path, run: Run) -> Path:
    """Return a directory that has the libraries of the machine's own compilers, so that programs do not depend on it."""
    directory.mkdir()
    for name in _RUNTIME_NAMES:
        for compiler in ("gcc", "g++", "gfortran"):
            if _which(Path("/"), os.environ.get("PATH", os.defpath), compiler) is None:
                continue
            found = Path(run(compiler, f"-print-file-name={name}").strip())
            if found.is_absolute() and found.exists():
                (directory / name).symlink_to(found)
                break
    return directory
