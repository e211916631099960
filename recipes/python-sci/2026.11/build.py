#!/usr/bin/python3
"""Build the squashfs image of python-sci/2026.11: a relocated CPython, numpy, scipy, mpi4py and MPICH.

    build.py --output FILE [--cache DIR]

Needs Debian 12 on x86_64 with python3.11, python3-venv, patchelf and squashfs-tools, no privileges, and the network once:
wheels are kept in ``DIR/wheels``. The same inputs give the same image, bit for bit.

Layout of the image (mounted at `PREFIX`)::

    python-3.11/       Debian's interpreter and standard library, with the libraries that they need beyond glibc
    env/default/       a virtual environment of that interpreter: the packages, MPICH below lib, bin, include
    env/develop/       only activate.sh; the view adds search paths of env/default
    meta/env.json      the views
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parent
PREFIX = "/user-environment"
INTERPRETER = "python-3.11"
EPOCH_S = 1793491200
"""Every time stamp in the image: 2026-11-01T00:00:00Z."""

DEBIAN_PACKAGES = ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib")
HOST_LIBRARIES = re.compile(r"^(ld-linux-.*|lib(c|m|dl|rt|pthread|util|resolv)\.so\.\d+)$")
"""glibc: bound to the host's kernel and loader, and the one thing that every host has."""
LEFT_OUT = re.compile(r"/(nis|_dbm)\.cpython-|/sitecustomize\.py$|/EXTERNALLY-MANAGED$|/config-3\.11")
"""Parts of the standard library that pull in host services (NIS, Berkeley DB) or Debian's own hooks."""
OPTIONAL_LIBRARIES = re.compile(r"^lib(ibverbs|rdmacm|mlx5|efa|psm2|psm_infinipath|numa|nl-3|nl-route-3)\.so")
"""Drivers of fabrics: the host's when it has such a fabric; MPICH loads what uses them only then."""


class BuildError(Exception):
    """The image cannot be built; the message says why and what to do."""


def run(*command: str | Path, **environment: str | None) -> str:
    """Run a program and return its output; a variable given as None is removed from its environment."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    try:
        done = subprocess.run(
            [str(word) for word in command],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=variables,
        )
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is missing: make setup installs what this needs") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(map(str, command))} failed:\n{error.stdout}{error.stderr}") from error
    return done.stdout


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_elf(path: Path) -> bool:
    """Tell whether a regular file is an ELF object."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def dynamic_section(path: Path) -> tuple[list[str], list[str], bool]:
    """Return the NEEDED sonames and the run path of an ELF object, and whether that is a RUNPATH.

    With a RUNPATH an object no longer profits from the RPATH of those that load it.
    """
    text = run("readelf", "--wide", "--dynamic", path)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    paths = [
        entry for found in re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", text) for entry in found.split(":")
    ]
    return needed, paths, "(RUNPATH)" in text


def fetch_wheels(cache: Path) -> list[Path]:
    """Return the pinned wheels, downloading those that the cache lacks. Raises `BuildError`."""
    requirements = RECIPE / "requirements.txt"
    wanted = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", requirements.read_text()))
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)

    def present() -> dict[str, Path]:
        return {digest: path for path in wheels.glob("*.whl") if (digest := sha256(path)) in wanted}

    found = present()
    if found.keys() != wanted:
        print("  downloading wheels (once)", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            python = make_build_venv(Path(work) / "venv")
            run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
                "--dest", wheels, "--requirement", requirements)  # fmt: skip
        found = present()
    if found.keys() != wanted:
        raise BuildError(f"wheels are missing in {wheels}: {', '.join(sorted(wanted - found.keys()))}")
    return sorted(found.values())


def make_build_venv(path: Path) -> Path:
    """Make a virtual environment that provides pip; return its interpreter."""
    run("/usr/bin/python3.11", "-m", "venv", path)
    return path / "bin" / "python3"


def copy_interpreter(root: Path) -> None:
    """Copy Debian's CPython to ``root`` as ``bin`` and ``lib``."""
    for line in run("dpkg-query", "--listfiles", *DEBIAN_PACKAGES).splitlines():
        source = Path(line)
        inside = line.startswith("/usr/lib/python3.11/") or line == "/usr/bin/python3.11"
        if not inside or LEFT_OUT.search(line) or (source.is_dir() and not source.is_symlink()):
            continue
        target = root / source.relative_to("/usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    (root / "bin/python3").symlink_to("python3.11")


def install_packages(stage: Path, wheels: list[Path], work: Path) -> Path:
    """Make ``env/default``: a virtual environment of the copied interpreter with all wheels; return it."""
    env = stage / "env/default"
    (env / "bin").mkdir(parents=True)
    (env / "pyvenv.cfg").write_text(
        f"home = {PREFIX}/{INTERPRETER}/bin\ninclude-system-site-packages = false\nversion = 3.11\n"
    )
    for name in ("python", "python3", "python3.11"):
        (env / "bin" / name).symlink_to(f"../../../{INTERPRETER}/bin/python3.11")
    python = make_build_venv(work / "venv")
    root = work / "root"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--root", root,
        "--prefix", f"{PREFIX}/env/default", "--no-warn-script-location", *wheels)  # fmt: skip
    shutil.copytree(root / PREFIX.lstrip("/") / "env/default", env, symlinks=True, dirs_exist_ok=True)
    for script in (env / "bin").iterdir():
        text = script.read_bytes() if not script.is_symlink() else b""
        first, newline, rest = text.partition(b"\n")
        if first.startswith(b"#!" + os.fsencode(work)):
            script.write_bytes(f"#!{PREFIX}/env/default/bin/python3".encode() + newline + rest)
    site = env / "lib/python3.11/site-packages"
    for record in site.glob("*.dist-info/RECORD"):
        record.unlink()  # holds digests of the scripts as they were before; nothing can be uninstalled here anyway
    # One MPI is in the image. Under the plain name its binding is imported without mpi4py's search for MPI libraries, which
    # could find the host's.
    for foreign in site.glob("mpi4py/MPI.openmpi.*"):
        foreign.unlink()
    for binding in site.glob("mpi4py/MPI.mpich.*.so"):
        run("patchelf", "--set-rpath", "$ORIGIN/../../..", binding)
        binding.rename(binding.with_name(binding.name.replace(".mpich", "")))
    return env


def bundle_libraries(stage: Path) -> None:
    """Copy the libraries that objects in the tree need of the host, beyond glibc, and make run paths name nothing else.

    Raises `BuildError` when this machine lacks one of them.
    """
    host = dict(
        re.findall(r"^\s*(\S+) \(libc6,x86-64.*\) => (\S+)$", run("/sbin/ldconfig", "-p"), re.MULTILINE)
    )
    inside = {path.name for path in stage.rglob("*.so*")}
    directory = stage / INTERPRETER / "lib"
    bundled: set[str] = set()
    objects = [path for path in stage.rglob("*") if is_elf(path)]
    for path in objects:  # grows while it is walked
        needed, paths, runpath = dynamic_section(path)
        for soname in needed:
            if soname in inside or HOST_LIBRARIES.match(soname) or OPTIONAL_LIBRARIES.match(soname):
                continue
            if soname not in host:
                raise BuildError(f"{path} needs {soname}, which this machine does not have")
            shutil.copy(host[soname], directory / soname)
            inside.add(soname)
            bundled.add(soname)
            objects.append(directory / soname)
        relative = [entry for entry in paths if entry.startswith("$ORIGIN")]
        if not bundled.isdisjoint(needed):
            relative.append(f"$ORIGIN/{os.path.relpath(directory, path.parent)}")
        if relative != paths:
            kind = [] if runpath else ["--force-rpath"]
            run("patchelf", *kind, "--set-rpath", ":".join(relative), path)


def activation_script(view: dict[str, Any]) -> str:
    """Return the shell form of a view, for users of stock tools."""
    values = view["env"]["values"]
    lines = [f"# {view['description']}"]
    for name, operations in values["list"].items():
        added = ":".join(entry for operation in operations for entry in operation["value"])
        lines.append(f"export {name}={added}${{{name}:+:${name}}}")
    for name, value in values["scalar"].items():
        lines.append(f"unset {name}" if value is None else f"export {name}={value}")
    return "\n".join(lines) + "\n"


def write_metadata(stage: Path) -> None:
    """Write ``meta/env.json`` and the activation script of each view."""
    meta = json.loads((RECIPE / "env.json").read_text())
    (stage / "meta").mkdir()
    (stage / "meta/env.json").write_text(json.dumps(meta, indent=2) + "\n")
    for view in meta["views"].values():
        script = stage / Path(view["activate"]).relative_to(PREFIX)
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(activation_script(view))


def audit(stage: Path) -> Iterator[str]:
    """Yield what in the tree depends on the host beyond glibc and fabrics: libraries, scripts, links."""
    libraries = {path.name for path in stage.rglob("*.so*")}
    for path in stage.rglob("*"):
        name = path.relative_to(stage)
        if path.is_symlink():
            target = str(path.readlink())
            if target.startswith("/") and not target.startswith(PREFIX + "/"):
                yield f"{name}: link to {target}"
        elif is_elf(path):
            needed, paths, _ = dynamic_section(path)
            yield from (f"{name}: run path {entry}" for entry in paths if not entry.startswith("$ORIGIN"))
            for soname in needed:
                if not (
                    soname in libraries or HOST_LIBRARIES.match(soname) or OPTIONAL_LIBRARIES.match(soname)
                ):
                    yield f"{name}: needs {soname} of the host"
        elif path.is_file() and path.parent.name == "bin":
            first = path.read_bytes().partition(b"\n")[0].decode(errors="replace")
            if not re.match(rf"#! ?({PREFIX}/|/bin/|/usr/bin/env )", first):
                yield f"{name}: starts with {first[:60]}"


SMOKE_TEST = """
import importlib, json, os, sys
prefix, site, modules = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.path.append(site)
for module in modules:
    importlib.import_module(module)
mapped = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}
print(json.dumps(sorted(path for path in mapped if not path.startswith(prefix))))
"""
MODULES = (
    *("bz2", "ctypes", "curses", "lzma", "readline", "sqlite3", "ssl", "uuid", "zlib"),
    *(
        "mpi4py.MPI",
        "numpy",
        "numpy.fft",
        "numpy.linalg",
        "numpy.random",
        "scipy.fft",
        "scipy.integrate",
        "scipy.interpolate",
    ),
    *(
        "scipy.io",
        "scipy.linalg",
        "scipy.ndimage",
        "scipy.optimize",
        "scipy.signal",
        "scipy.sparse.linalg",
        "scipy.spatial",
    ),
    *("scipy.special", "scipy.stats"),
)


def check_in_use(stage: Path) -> None:
    """Load everything with the interpreter of the tree and look at what was mapped. Raises `BuildError`."""
    site = stage / "env/default/lib/python3.11/site-packages"
    python = stage / INTERPRETER / "bin/python3.11"
    mapped = json.loads(run(python, "-I", "-S", "-B", "-c", SMOKE_TEST, stage, site, *MODULES))
    foreign = [path for path in mapped if ".so" in path and not HOST_LIBRARIES.match(Path(path).name)]
    if foreign:
        raise BuildError("the image would use libraries of its host:\n  " + "\n  ".join(foreign))


def compile_bytecode(stage: Path) -> None:
    """Compile all modules; their byte code is never checked against the source, as nothing changes in an image."""
    compileall.compile_dir(
        stage,
        quiet=2,
        workers=0,
        stripdir=str(stage),
        prependdir=PREFIX,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def squash(stage: Path, output: Path) -> None:
    """Write the image; whole or not at all."""
    run("chmod", "-R", "u+rwX,go=rX", stage)
    partial = output.with_suffix(".part")
    partial.unlink(missing_ok=True)
    # Without fragments two versions of an image share nearly all their blocks. SOURCE_DATE_EPOCH: mksquashfs refuses it
    # together with explicit times.
    run("mksquashfs", stage, partial, "-quiet", "-no-progress", "-comp", "zstd", "-Xcompression-level", "9",
        "-no-fragments", "-no-xattrs", "-all-root", "-all-time", str(EPOCH_S), "-mkfs-time", str(EPOCH_S),
        "-noappend", SOURCE_DATE_EPOCH=None)  # fmt: skip
    partial.replace(output)


def build(output: Path, cache: Path) -> None:
    """Build the image from the pinned inputs. Raises `BuildError`."""
    os.umask(0o022)
    cache.mkdir(parents=True, exist_ok=True)
    wheels = fetch_wheels(cache)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as scratch:
        work = Path(scratch)
        stage = work / "stage"
        copy_interpreter(stage / INTERPRETER)
        install_packages(stage, wheels, work)
        bundle_libraries(stage)
        write_metadata(stage)
        problems = list(audit(stage))
        if problems:
            raise BuildError("the image would depend on its host:\n  " + "\n  ".join(problems))
        check_in_use(stage)
        compile_bytecode(stage)
        squash(stage, output)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description="Build the squashfs image of python-sci/2026.11.")
    parser.add_argument("--output", type=Path, required=True, help="the image to write")
    parser.add_argument(
        "--cache", type=Path, default=Path("/var/tmp/uenvd-demo-cache"), help="downloads (%(default)s)"
    )
    options = parser.parse_args()
    started_s = time.monotonic()
    try:
        if os.uname().machine != "x86_64" or sys.version_info[:2] != (3, 11):
            raise BuildError(
                "this recipe is for x86_64 and Debian 12's Python 3.11 (run it with /usr/bin/python3)"
            )
        build(options.output.absolute(), options.cache.absolute())
    except (BuildError, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    size_mb = options.output.stat().st_size / 1e6
    print(f"{options.output}: {size_mb:.1f} MB in {time.monotonic() - started_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
