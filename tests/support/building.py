"""A recipe that is quick to build: the interpreter of python-sci and one wheel of a module, made here."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from uenvd.errors import UenvError
from uenvd.publish.build.inputs import fetch_packages
from uenvd.publish.recipe.lockfile import read_interpreter_lock

CHECKOUT = Path(__file__).resolve().parents[2]
LOCK = CHECKOUT / "recipes/python-sci/2026.11/interpreter.lock"
DOWNLOADS = Path(os.environ.get("UENVD_CACHE_DIR", "/var/tmp/uenvd-demo-cache"))
"""Where the demo keeps its downloads, too."""

MODULE = 'def main():\n    print("tiny says", 6 * 7)\n'


class Wheel(NamedTuple):
    """A wheel and the line of a lock file that pins it."""

    path: Path
    requirement: str


def needed_packages() -> str:
    """Fetch the Debian packages that every build needs, once; return why they cannot be had, or nothing."""
    try:
        fetch_packages(read_interpreter_lock(LOCK), DOWNLOADS, lambda _text: None)
    except UenvError as error:
        return error.message
    return ""


def make_cache(directory: Path, *wheels: Wheel) -> Path:
    """Make a complete cache that everybody can read and nobody but root can write."""
    (directory / "wheels").mkdir(parents=True)
    (directory / "debs").mkdir()
    for package in read_interpreter_lock(LOCK):
        (directory / "debs" / package.file_name).symlink_to(DOWNLOADS / "debs" / package.file_name)
    for wheel in wheels:
        shutil.copy(wheel.path, directory / "wheels")
    return directory


def make_wheel(directory: Path, files: Mapping[str, bytes] | None = None) -> Wheel:
    """Make the wheel tiny 1.0: a module, a program ``tiny``, and further files."""
    contents = {
        "tiny.py": MODULE.encode(),
        **(files or {}),
        "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/entry_points.txt": b"[console_scripts]\ntiny = tiny:main\n",
    }
    record = ""
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    contents["tiny-1.0.dist-info/RECORD"] = (record + "tiny-1.0.dist-info/RECORD,,\n").encode()
    path = directory / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return Wheel(path, f"tiny==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")


def make_recipe(
    base: Path, wheel: Wheel, *, mount: str = "/user-environment", post_install: str = ""
) -> Path:
    """Write the recipe tiny/1.0; return its directory."""
    recipe = base / "tiny" / "1.0"
    recipe.mkdir(parents=True)
    (recipe / "config.yaml").write_text(
        textwrap.dedent(f"""\
            name: tiny
            description: for tests
            store: {mount}
            builder: python
            python:
              date: 2026-11-01
              leave-out: ["*/nis.cpython-*", "*/_dbm.cpython-*"]
              imports: [ssl, sqlite3, tiny]
            """)
    )
    (recipe / "environments.yaml").write_text(
        textwrap.dedent("""\
            tiny:
              specs: [tiny==1.0]
              views:
                default:
                  description: run it
                develop:
                  uenv:
                    prefix_paths:
                      CPATH: [include, nowhere]
                    env_vars:
                      set:
                        - TINY_ROOT: $@view_path@
                        - UNWANTED: null
            """)
    )
    shutil.copy(LOCK, recipe)
    (recipe / "requirements.lock").write_text(wheel.requirement)
    if post_install:
        (recipe / "post-install").write_text(f"#!/bin/sh\nset -eu\n{post_install}\n")
    return recipe


_LATER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#define SHIFT (400L * 86400)
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    if (!result && id == CLOCK_REALTIME) t->tv_sec += SHIFT;
    return result;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def library_that_lives_later(directory: Path) -> Path:
    """Compile a library for LD_PRELOAD that moves a program's clock 400 days on.

    Its name is one of glibc's: a build refuses every other library of the host that it meets.
    """
    source = directory / "later.c"
    source.write_text(_LATER)
    library = directory / "libmvec.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-o", library, source, "-ldl"], check=True, capture_output=True
    )
    return library
