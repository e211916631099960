"""A package of C and Fortran that compiles in a second, as a tarball, and recipes of the builder source for it."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
FITS = CHECKOUT / "recipes/fits/2026.11"

_FILES = {
    "configure": """#!/bin/sh
for word in "$@"; do case $word in --prefix=*) prefix=${word#--prefix=};; esac; done
printf 'prefix = %s\\n' "$prefix" > config.mk
sed "s|@prefix@|$prefix|" tiny.pc.in > tiny.pc
""",
    "Makefile": """include config.mk
all: libtiny.so.1 libtiny.a tiny
libtiny.so.1: tiny.c tinyf.f90
\t$(CC) -g -O2 -fPIC -c $(CURDIR)/tiny.c
\tgfortran -g -O2 -fPIC -c tinyf.f90
\t$(CC) -shared -Wl,-soname,libtiny.so.1 -o $@ tiny.o tinyf.o -lgfortran
libtiny.a: libtiny.so.1
\tar rc $@ tiny.o tinyf.o
tiny: main.c libtiny.so.1
\t$(CC) -g -O2 -o $@ main.c libtiny.so.1
check: all
\tLD_LIBRARY_PATH=. ./tiny
install: all
\tmkdir -p $(prefix)/bin $(prefix)/lib/pkgconfig $(prefix)/include
\tcp tiny $(prefix)/bin
\tcp libtiny.so.1 libtiny.a $(prefix)/lib
\tln -sf libtiny.so.1 $(prefix)/lib/libtiny.so
\tcp tiny.pc $(prefix)/lib/pkgconfig
\tcp tiny.h tinyf.mod $(prefix)/include
\techo "dependency_libs=' -L/uenvd-build'" > $(prefix)/lib/libtiny.la
""",
    "tiny.h": "int tiny(void); const char *tiny_source(void); int tiny_fortran(void);\n",
    "tiny.c": '#include "tiny.h"\nint tiny(void) { return 42; }\nconst char *tiny_source(void) { return __FILE__; }\n',
    "tinyf.f90": """module tinyf
  use iso_c_binding
contains
  integer(c_int) function tiny_fortran() bind(c)
    character(8) :: text
    write (text, '(I0)') 7
    read (text, *) tiny_fortran
  end function
end module
""",
    "main.c": """#include <stdio.h>
#include "tiny.h"
int main(void) { printf("%d %d %s\\n", tiny(), tiny_fortran(), tiny_source()); return 0; }
""",
    "tiny.pc.in": "prefix=@prefix@\nName: tiny\nDescription: for tests\nVersion: 1.0\nLibs: -L${prefix}/lib -ltiny\nCflags: -I${prefix}/include\n",
}


def make_tarball(path: Path, files: Mapping[str, str] | None = None, top: str = "tiny-1.0") -> str:
    """Write the source; return its SHA-256."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, text in {**_FILES, **(files or {})}.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size, entry.mode = len(text.encode()), 0o755 if name == "configure" else 0o644
            archive.addfile(entry, io.BytesIO(text.encode()))
    path.write_bytes(gzip.compress(raw.getvalue(), mtime=0))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_source_recipe(
    base: Path, tarball: Path, *, mount: str = "/user-environment", package: str = "", chain: str = "host", hook: str = ""
) -> Path:  # fmt: skip
    """Write the recipe tiny/1.0 of the builder source; return its directory. ``package`` has further lines of the package."""
    recipe = base / "tiny" / "1.0"
    recipe.mkdir(parents=True)
    (recipe / "config.yaml").write_text(
        f"name: tiny\nstore: {mount}\nbuilder: source\nsource:\n  date: 2026-11-01\n  toolchain: {chain}\n  memory: 512M\n"
    )
    lines = package or "build: configure\n      check: [check]"
    (recipe / "environments.yaml").write_text(
        "tiny:\n  packages:\n    - name: tiny\n      version: 1.0\n      source: "
        + tarball.name
        + "\n      "
        + lines
        + "\n"
        "  views:\n    default:\n    develop:\n      uenv:\n        prefix_paths:\n          CPATH: [include]\n"
        "          LIBRARY_PATH: [lib]\n          PKG_CONFIG_PATH: [lib/pkgconfig]\n        env_vars:\n          set:\n"
        "            - LD_RUN_PATH: $@view_path@/lib\n"
    )
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    (recipe / "sources.lock").write_text(f"{tarball.name} sha256:{digest} file://{tarball}\n")
    if hook:
        (recipe / "post-install").write_text(f"#!/bin/sh\nset -eu\n{hook}\n")
    return recipe


def small_chain() -> str:
    """Return a lock of a shell and the usual tools, of the packages that the recipe fits pins."""
    names = {
        "dash", "coreutils", "libc6", "libgcc-s1", "gcc-12-base", "libacl1", "libattr1", "libgmp10", "libselinux1", "libpcre2-8-0",
    }  # fmt: skip
    lines = (FITS / "toolchain.lock").read_text().splitlines()
    found = [line for line in lines if line.partition("=")[0] in names]
    assert len(found) == len(names)
    return "\n".join(found) + "\n"
