"""The pinned inputs of a build: Debian packages, wheels and source files, from the cache or fetched into it.

Everything is identified by its SHA-256 in the recipe's lock files; a file of the cache is hashed before each use. The network is needed
only for what the cache lacks.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from uenvd.errors import BuildFailed, DigestMismatch
from uenvd.publish.build.downloads import NotThere, fetch_from, places_of_deb, places_of_source
from uenvd.publish.recipe import Recipe
from uenvd.publish.recipe.lockfile import Package, SourceFile, requirement_hashes

DEBIAN_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "ppc64le": "ppc64el",
    "s390x": "s390x",
    "riscv64": "riscv64",
}
"""Machine (``uname -m``) -> Debian's name."""
FETCH_S: Final = 900.0
Say = Callable[[str], None]


def default_cache() -> Path:
    """Return where downloads are kept: ``$UENVD_CACHE_DIR``, else below the user's cache directory."""
    stated = os.environ.get("UENVD_CACHE_DIR")
    if stated:
        return Path(stated)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uenvd-publish"


def check_machine(recipe: Recipe, packages: Sequence[Package]) -> None:
    """See that packages are for this machine. Raises `BuildFailed`."""
    machine = DEBIAN_ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    for package in packages:
        if package.architecture not in {"all", machine}:
            raise BuildFailed(
                f"the recipe {recipe.label} is for Debian's {package.architecture}, and this machine is {machine}",
                hint=f"build it on such a machine, or write another lock file: uenvd-publish lock {recipe.directory}",
            )


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_packages(
    packages: Sequence[Package], cache: Path, say: Say, recipe: Path | None = None
) -> tuple[Path, ...]:
    """Return the ``.deb`` files: from the cache, else from the machine's own apt, else from the archive of all that Debian published.

    ``recipe`` is for the advice in messages. Raises `BuildFailed`, `DigestMismatch`.
    """
    directory = cache / "debs"
    missing = [
        package
        for package in packages
        if not (directory / package.file_name).is_file()
        or sha256_of(directory / package.file_name) != package.sha256
    ]
    if missing:
        say(f"fetching {len(missing)} Debian packages (once)")
        with scratch_directory(cache) as scratch:
            reason = download_with_apt(missing, scratch)
            lost = [package for package in missing if not (scratch / package.file_name).is_file()]
            if lost:
                _from_archive(lost, scratch, reason, say, recipe)
            for package in missing:
                keep_file(scratch / package.file_name, package.sha256, directory)
    return tuple(directory / package.file_name for package in packages)


def download_with_apt(packages: Sequence[Package], directory: Path) -> str:
    """Let apt download packages of exactly these versions, those that it has; return what it says of the others, else nothing.

    apt fetches all or nothing, so when something is not offered the rest is asked for one by one.
    """
    wanted = [
        f"{package.name}={package.version}"
        if package.architecture == "all"
        else f"{package.name}:{package.architecture}={package.version}"
        for package in packages
    ]
    reason = _apt_download(wanted, directory)
    if not reason or len(wanted) == 1:
        return reason
    reasons = [
        _apt_download([one], directory)
        for one, package in zip(wanted, packages, strict=True)
        if not (directory / package.file_name).is_file()
    ]
    return "\n".join(dict.fromkeys(line for text in reasons for line in text.splitlines()))


def _apt_download(wanted: Sequence[str], directory: Path) -> str:
    # Its sandbox user cannot enter our directory, and it would warn of that.
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *wanted]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            timeout=FETCH_S, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except FileNotFoundError:
        return "there is no apt-get here"
    except subprocess.TimeoutExpired:
        return f"apt-get did not end within {FETCH_S:.0f} s"
    return (
        "" if done.returncode == 0 else done.stderr.strip() or f"apt-get ended with status {done.returncode}"
    )


def _from_archive(
    packages: Sequence[Package], directory: Path, apt: str, say: Say, recipe: Path | None
) -> None:
    """Fetch packages that no mirror has any more. Raises `BuildFailed` that names those that cannot be had."""
    say(f"{len(packages)} of them are no longer offered: asking the archive of all that Debian published")
    lost: list[str] = []
    for package in packages:
        try:
            fetch_from(places_of_deb(package), directory / package.file_name, package.sha256)
        except NotThere as error:
            lost.append(f"  {package.name} {package.version}: {str(error).strip()}")
            if len(lost) == 1 and "timed out" in str(error):
                break
    if lost:
        said = "\n".join(f"  apt: {line}" for line in apt.splitlines()[:6])
        names = ", ".join(f"{package.name}={package.version}" for package in packages)
        raise BuildFailed(
            f"packages that the recipe pins cannot be had from apt or from the archive ({names}):\n{said}\n"
            + "\n".join(lost[:6]),
            hint="bring a cache that has them (--cache DIR), let this machine reach the archive, or pin what is offered now: "
            f"apt-get update && uenvd-publish lock {recipe or 'RECIPE'}",
        )


def fetch_sources(files: Sequence[SourceFile], cache: Path, say: Say) -> dict[str, Path]:
    """Return the source files by name, from the cache or fetched into it. Raises `BuildFailed`, `DigestMismatch`."""
    directory = cache / "sources"
    found: dict[str, Path] = {}
    for one in files:
        # Two recipes may pin different bytes under one name.
        kept = directory / f"{one.sha256[:16]}-{one.file}"
        if not kept.is_file() or sha256_of(kept) != one.sha256:
            say(f"fetching {one.file} (once)")
            with scratch_directory(cache) as scratch:
                partial = scratch / kept.name
                try:
                    fetch_from(places_of_source(one), partial, one.sha256)
                except NotThere as error:
                    raise BuildFailed(
                        f"the source {one.file} cannot be had:\n{error}",
                        hint="is the network there? add a place to the lock file, or bring a cache that has it: --cache DIR",
                    ) from error
                keep_file(partial, one.sha256, directory)
        found[one.file] = kept
    return found


def fetch_wheels(requirements: Path, cache: Path, debs: Sequence[Path], say: Say) -> tuple[Path, ...]:
    """Return the wheels of a requirements file, fetched with pip where they are missing.

    pip runs on the interpreter of the image, so that it chooses what fits that one; no other Python takes part.
    """
    wanted = requirement_hashes(requirements)
    directory = cache / "wheels"
    found = _present(wanted, directory)
    missing = [name for name in wanted if name not in found]
    if missing:
        say(f"fetching {len(missing)} wheels (once): {', '.join(missing)}")
        with scratch_directory(cache) as scratch:
            _pip_download(requirements, debs, scratch)
            for wheel in sorted((scratch / "wheels").glob("*.whl")):
                digest = sha256_of(wheel)
                if any(digest in digests for digests in wanted.values()):
                    keep_file(wheel, digest, directory)
        found = _present(wanted, directory)
        missing = [name for name in wanted if name not in found]
        if missing:
            raise BuildFailed(f"pip did not deliver: {', '.join(missing)}")
    return tuple(found[name] for name in sorted(found))


def _present(wanted: dict[str, frozenset[str]], directory: Path) -> dict[str, Path]:
    digests = {sha256_of(path): path for path in sorted(directory.glob("*.whl"))} if wanted else {}
    return {
        name: digests[digest]
        for name, allowed in wanted.items()
        for digest in sorted(allowed)
        if digest in digests
    }


def _pip_download(requirements: Path, debs: Sequence[Path], scratch: Path) -> None:
    root = scratch / "debian"
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True, capture_output=True)
    python = next(iter(sorted((root / "usr/bin").glob("python3.*"))), None)
    pip = next(iter(sorted((root / "usr/share/python-wheels").glob("pip-*.whl"))), None)
    if python is None or pip is None:
        raise BuildFailed(
            "the recipe's Debian packages have no python3.N, or no pip",
            hint="the lock file needs python3.N-minimal, libpython3.N-stdlib, python3.N-venv and python3-pip-whl",
        )
    libraries = ":".join(
        str(path) for place in ("usr/lib", "lib") for path in sorted(root.glob(f"{place}/*-linux-gnu*"))
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"LD_LIBRARY_PATH": libraries, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    command = [
        str(python), "-s", f"{pip}/pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
        "--dest", str(scratch / "wheels"), "--requirement", str(requirements),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=FETCH_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"pip did not end within {FETCH_S:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")]
        reason = "\n".join(f"  {line}" for line in lines[-12:])
        if "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr:
            raise DigestMismatch(f"a wheel is not the one that {requirements} pins:\n{reason}")
        raise BuildFailed(
            f"pip cannot fetch the wheels of {requirements}:\n{reason}",
            hint="is the network there, or a complete cache?",
        )


def keep_file(file: Path, sha256: str, directory: Path) -> None:
    """Move a checked file into the cache. Raises `DigestMismatch`."""
    if not file.is_file():
        raise BuildFailed(f"apt did not deliver {file.name}")
    found = sha256_of(file)
    if found != sha256:
        raise DigestMismatch(
            f"{file.name} is not what the recipe pins: sha256 {found}, expected {sha256}",
            hint="the source serves other bytes under the same name and version; look at both before you change the lock file",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.replace(directory / file.name)
    except OSError as error:
        raise _unwritable(directory, error) from error


@contextmanager
def scratch_directory(cache: Path) -> Iterator[Path]:
    """Give a directory on the cache's own file system, so that files can be moved."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix="fetch-", dir=cache)
    except OSError as error:
        raise _unwritable(cache, error) from error
    with holder as name:
        yield Path(name)


def _unwritable(directory: Path, error: OSError) -> BuildFailed:
    return BuildFailed(
        f"something is missing in the cache {directory}, and it cannot be put there: {error.strerror}",
        hint="name a cache directory of your own: --cache DIR",
    )
