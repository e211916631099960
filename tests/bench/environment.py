"""The image that the benchmark serves: a relocated Python with scientific packages, C headers, and a view, a forest of symbolic links.

Built once for each set of ingredients and kept in ``/var/tmp/uenvd-bench-cache`` (or ``UENVD_BENCH_CACHE``). Root of the tree:
``bin/python3``, ``lib/python3.11``, ``include``, ``view``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "environment.txt"
HEADER_PACKAGES = (
    "libc6-dev",
    "linux-libc-dev",
    "libstdc++-12-dev",
    "libgcc-12-dev",
    "libpython3.11-dev",
)
LAYOUT = 1
"""Raised when this module makes another tree of the same ingredients."""
SMALL_BYTES = 64 << 10
LARGE_BYTES = 1 << 20


def cache() -> Path:
    """Return the directory that holds what is built once."""
    directory = Path(os.environ.get("UENVD_BENCH_CACHE", "/var/tmp/uenvd-bench-cache"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def build_image(options: tuple[str, ...] = ()) -> Path:
    """Return the image, built if it is not there: squashed with zstd and the ``options`` of mksquashfs. Takes minutes the first time."""
    tree = build_tree()
    key = hashlib.sha256(f"{tree.name} {options}".encode()).hexdigest()[:12]
    image = cache() / f"image-{key}.squashfs"
    if not image.exists():
        print(f"bench: squashing {image}", file=sys.stderr)
        partial = image.with_suffix(f".{os.getpid()}")
        command = ["mksquashfs", tree, partial, "-comp", "zstd", "-all-root", "-quiet", "-no-progress"]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, env=environment)
        partial.rename(image)
    return image


def build_tree() -> Path:
    """Return the unpacked environment, built if it is not there."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + f"{HEADER_PACKAGES}{LAYOUT}".encode()).hexdigest()[:12]
    tree = cache() / f"tree-{key}"
    if not tree.exists():
        print(f"bench: building {tree}", file=sys.stderr)
        partial = cache() / f"tree-{key}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        _add_python(partial)
        _add_headers(partial)
        _add_view(partial)
        partial.rename(tree)
    return tree


def _add_python(tree: Path) -> None:
    library = tree / "lib/python3.11"
    (tree / "bin").mkdir(parents=True)
    shutil.copy2("/usr/bin/python3.11", tree / "bin/python3")
    ignored = shutil.ignore_patterns("__pycache__", "config-*", "dist-packages", "EXTERNALLY-MANAGED")
    shutil.copytree(sysconfig.get_path("stdlib"), library, symlinks=True, ignore=ignored)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *(
                "--no-deps",
                "--no-compile",
                "--only-binary",
                ":all:",
                "--target",
                library / "site-packages",
                "-r",
                REQUIREMENTS,
            ),
        ],
        check=True,
    )
    # Relative paths and hashes in place of times: the byte code is valid wherever the image is mounted.
    subprocess.run(
        [
            *(tree / "bin/python3", "-m", "compileall", "-qq", "-j", "0", "-s", tree, library),
            *("--invalidation-mode", "unchecked-hash"),
        ],
        check=False,  # packages bring tests with files that are not meant to compile
        env=python_environment(tree),
        stdout=subprocess.DEVNULL,
    )


def _add_headers(tree: Path) -> None:
    listed = subprocess.run(["dpkg", "-L", *HEADER_PACKAGES], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        source = Path(line)
        if "include" not in source.parts or not source.is_file():
            continue
        below = source.relative_to("/usr").as_posix()
        target = tree / (f"include/{below}" if below.startswith("lib/") else below)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _add_view(tree: Path) -> None:
    """Link every file below the packages into one tree, as the views of an environment do."""
    packages = tree / "lib/python3.11/site-packages"
    for directory, _names, files in os.walk(packages):
        here = tree / "view" / Path(directory).relative_to(packages)
        chosen = [name for name in files if name.endswith((".py", ".so", ".h"))]
        if chosen:
            here.mkdir(parents=True)
        for name in chosen:
            (here / name).symlink_to(os.path.relpath(Path(directory, name), here))


def python_environment(root: Path) -> dict[str, str]:
    """Return the environment in which ``bin/python3`` of the tree below ``root`` takes everything from there."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "PYTHONHOME": str(root),
        "PYTHONPATH": str(root / "lib/python3.11/site-packages"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@dataclass
class Contents:
    """What a tree holds, by use; paths are relative, in the order of a walk."""

    small: list[str]
    """Files of 1..64 KiB."""
    large: list[str]
    """Files of 1 MiB and more."""
    files: list[str]
    links: list[str]
    directories: list[str]
    inodes: int
    size_bytes: int

    @property
    def has_python(self) -> bool:
        """Whether it is the benchmark's own environment."""
        return "bin/python3" in self.files

    @property
    def has_headers(self) -> bool:
        """Whether the compile row has its headers."""
        return "include/stdio.h" in self.files


def survey(root: Path) -> Contents:
    """List what is below a directory."""
    found = Contents([], [], [], [], ["."], 1, 0)
    stack = ["."]
    while stack:
        directory = stack.pop()
        below = []
        for entry in sorted(os.scandir(root / directory), key=lambda entry: entry.name):
            path = os.path.normpath(f"{directory}/{entry.name}")
            status = entry.stat(follow_symlinks=False)
            found.inodes += 1
            if stat.S_ISDIR(status.st_mode):
                below.append(path)
            elif stat.S_ISLNK(status.st_mode):
                found.links.append(path)
            elif stat.S_ISREG(status.st_mode):
                found.files.append(path)
                found.size_bytes += status.st_size
                if 0 < status.st_size <= SMALL_BYTES:
                    found.small.append(path)
                elif status.st_size >= LARGE_BYTES:
                    found.large.append(path)
        found.directories.extend(below)
        stack.extend(reversed(below))
    return found
