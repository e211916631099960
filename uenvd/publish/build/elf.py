"""What the dynamic loader will do with an ELF object: bytes in, facts out, no I/O.

Sources: System V ABI (gabi, chapter 5), ld.so(8).
"""

from __future__ import annotations

import io
import re
from typing import Final, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.segments import InterpSegment

MAGIC: Final = b"\x7fELF"
LOADERS: Final = {
    "x86_64": "/lib64/ld-linux-x86-64.so.2",
    "aarch64": "/lib/ld-linux-aarch64.so.1",
    "ppc64le": "/lib64/ld64.so.2",
    "s390x": "/lib/ld64.so.1",
    "riscv64": "/lib/ld-linux-riscv64-lp64d.so.1",
}
"""Machine (as of ``uname -m``) -> the dynamic loader that every host of it has."""
_MACHINES: Final = {
    "EM_X86_64": "x86_64",
    "EM_AARCH64": "aarch64",
    "EM_PPC64": "ppc64le",
    "EM_S390": "s390x",
    "EM_RISCV": "riscv64",
}
_GLIBC = re.compile(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?")


class Elf(NamedTuple):
    """One object."""

    machine: str
    interpreter: str | None
    """PT_INTERP of a program."""
    soname: str | None
    needed: tuple[str, ...]
    run_path: tuple[str, ...]
    """Directories as they are written, of DT_RUNPATH or else DT_RPATH; an empty text is the working directory."""
    has_rpath: bool
    """Whether it is DT_RPATH, which also counts for what the object loads."""
    glibc: tuple[int, int] | None
    """The newest version of glibc's symbols that it uses."""


def parse(data: bytes) -> Elf | None:
    """Return the facts; None for bytes that are no ELF object. Raises ValueError for a damaged one."""
    if not data.startswith(MAGIC):
        return None
    try:
        return _parse(ELFFile(io.BytesIO(data)))
    except (
        ELFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        AssertionError,
        OverflowError,
    ) as error:
        # pyelftools meets damage with whatever its look-ups raise.
        raise ValueError(f"a damaged ELF file: {error}") from error


def _parse(file: ELFFile) -> Elf:
    interpreter, soname = None, None
    needed: list[str] = []
    paths: dict[str, list[str]] = {}
    for segment in file.iter_segments():
        if isinstance(segment, InterpSegment):
            interpreter = str(segment.get_interp_name())
        elif isinstance(segment, DynamicSegment):
            for tag in segment.iter_tags():
                name = tag.entry.d_tag
                if name == "DT_NEEDED":
                    needed.append(_text(tag, "needed"))
                elif name == "DT_SONAME":
                    soname = _text(tag, "soname")
                elif name in {"DT_RPATH", "DT_RUNPATH"}:
                    paths[name] = _text(tag, name[3:].lower()).split(":")
    machine = _MACHINES.get(file.header.e_machine, str(file.header.e_machine))
    run_path = paths.get("DT_RUNPATH", paths.get("DT_RPATH", []))
    return Elf(
        machine, interpreter, soname, tuple(needed), tuple(run_path), "DT_RUNPATH" not in paths and "DT_RPATH" in paths,
        _glibc(file),
    )  # fmt: skip


def _text(tag: object, name: str) -> str:
    """Return a string that pyelftools sets on a tag of this kind, under its name."""
    return str(getattr(tag, name))


def _glibc(file: ELFFile) -> tuple[int, int] | None:
    newest: tuple[int, int] | None = None
    section = file.get_section_by_name(".gnu.version_r")
    if isinstance(section, GNUVerNeedSection):
        for _library, versions in section.iter_versions():
            for version in versions:
                match = _GLIBC.fullmatch(str(version.name))
                if match:
                    found = (int(match[1]), int(match[2]))
                    newest = found if newest is None else max(newest, found)
    return newest
