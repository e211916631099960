"""Debian's CPython below the prefix: unpacked from pinned packages, with a pip that is its own."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from uenvd.errors import BuildFailed
from uenvd.publish.build import venv_hook
from uenvd.publish.build.relocate import Run

LEFT_OUT: Final = (
    "*/sitecustomize.py",
    "*/EXTERNALLY-MANAGED",
    "*/__pycache__",
    "*/config-3.*",
    "*/LICENSE.txt",
    "*/dist-packages",
)
"""Hooks of Debian's own, byte code with time stamps, what is for building CPython itself, and links to the documentation."""
_LOCK_HINT = "the lock file needs python3.N-minimal, libpython3.N-minimal, libpython3.N-stdlib, python3.N-venv and python3-pip-whl"
_HOOKED: Final = """

# Added by uenvd-publish: see _on_image.py.
from ._on_image import on_image  # noqa: E402
EnvBuilder.create = on_image(EnvBuilder.create)
"""


class Interpreter(NamedTuple):
    """What was unpacked."""

    version: str
    """``3.11``."""
    root: Path
    """Has ``bin``, ``lib`` and ``share``; below the prefix."""
    program: Path
    pip: Path
    """pip's wheel, which Python can run as it is."""
    library_directories: tuple[Path, ...]
    """Directories of the unpacked packages that have shared libraries; outside the image."""


def unpack(
    debs: Sequence[str], workspace: Path, prefix: Path, leave_out: Sequence[str], run: Run
) -> Interpreter:
    """Unpack the packages and copy the interpreter to ``PREFIX/python-3.N``. Raises `BuildFailed`."""
    debian = workspace / "debian"
    debian.mkdir()
    for deb in debs:
        run("dpkg-deb", "--extract", deb, str(debian))
    programs = sorted(
        path for path in (debian / "usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name)
    )
    if len(programs) != 1:
        raise BuildFailed(
            f"the recipe's Debian packages have {len(programs)} interpreters, not one", hint=_LOCK_HINT
        )
    name = programs[0].name
    version = name.removeprefix("python")
    root = prefix / f"python-{version}"
    _copy(programs[0], root / "bin" / name)
    (root / "bin/python3").symlink_to(name)
    library = debian / "usr/lib" / name
    unwanted = (*LEFT_OUT, *leave_out)
    for source in sorted(library.rglob("*")):
        relative = source.relative_to(library)
        if _matches(relative, unwanted) or (source.is_dir() and not source.is_symlink()):
            continue
        _copy(source, root / "lib" / name / relative)
    wheels = sorted((debian / "usr/share/python-wheels").glob("*.whl"))
    pip = next(
        (root / "share/python-wheels" / path.name for path in wheels if path.name.startswith("pip-")), None
    )
    if pip is None or not (root / "lib" / name / "ensurepip").is_dir():
        raise BuildFailed("the recipe's Debian packages have no pip or no ensurepip", hint=_LOCK_HINT)
    for wheel in wheels:
        _copy(wheel, root / "share/python-wheels" / wheel.name)
    # Debian's ensurepip takes its wheels from where the host's packages put them.
    for settings in (root / "lib" / name).glob("_sysconfigdata_*.py"):
        text = settings.read_text()
        settings.write_text(text.replace("/usr/share/python-wheels", f"{root}/share/python-wheels"))
    _fix_first_lines(root)
    _hook_venv(root / "lib" / name / "venv")
    libraries = tuple(
        place
        for top in ("usr/lib", "lib")
        for place in sorted((debian / top).glob("*-linux-gnu*"))
        if place.is_dir()
    )
    return Interpreter(version, root, root / "bin" / name, pip, libraries)


def _fix_first_lines(root: Path) -> None:
    """Let executable modules of the standard library start with this interpreter; some are written for another place."""
    for path in sorted((root / "lib").rglob("*.py")):
        if not path.is_symlink() and path.stat().st_mode & 0o111:
            first, newline, rest = path.read_bytes().partition(b"\n")
            if re.match(rb"#!.*python", first):
                path.write_bytes(b"#!" + bytes(root / "bin/python3") + newline + rest)


def _hook_venv(package: Path) -> None:
    """Let ``python -m venv`` do what `venv_hook` says."""
    made_by = package / "__init__.py"
    if made_by.is_file():
        shutil.copyfile(venv_hook.__file__, package / "_on_image.py")
        with made_by.open("a") as file:
            file.write(_HOOKED)


def _matches(relative: Path, patterns: Sequence[str]) -> bool:
    """Whether a file, or a directory above it, matches."""
    candidates = [relative, *relative.parents]
    return any(
        fnmatch.fnmatchcase(
            f"/{candidate.as_posix()}", f"/{pattern.lstrip('/')}" if not pattern.startswith("*") else pattern
        )
        for candidate in candidates
        for pattern in patterns
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)
