"""The ``oras`` command for tests: that of the machine, or that of Debian's next release in a private directory.

Debian 12 has no ``oras``; the package of the release after it needs nothing but libc and runs there. It is fetched through the machine's own
apt sources with only the suite changed, into a private apt root: nothing is installed. Where that cannot be had, `oras_command` says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NEXT_SUITE = "trixie"
_PATIENCE_S = 60


def cache_directory() -> Path:
    """Return where the program is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uenvd-tests" / "oras"


def oras_command() -> tuple[Path | None, str]:
    """Return (the program, "") or (None, why there is none)."""
    there = shutil.which("oras")
    if there is not None:
        return Path(there), ""
    cached = cache_directory() / "usr/bin/oras"
    if not cached.exists():
        try:
            _fetch(cache_directory())
        except (OSError, subprocess.SubprocessError, LookupError) as error:
            said = getattr(error, "stderr", None) or b""
            detail = (
                said.decode(errors="replace").strip().splitlines()[-1:] if isinstance(said, bytes) else []
            )
            return (
                None,
                f"oras cannot be had from Debian {NEXT_SUITE}: {' '.join([str(error)[:200], *detail])}",
            )
    try:
        subprocess.run([cached, "version"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"oras of Debian {NEXT_SUITE} does not run here: {error}"
    return cached, ""


def _fetch(directory: Path) -> None:
    root = directory.with_name(f".oras-{os.getpid()}")
    try:
        for part in ("lists/partial", "archives/partial", "out"):
            (root / part).mkdir(parents=True)
        (root / "status").touch()
        (root / "sources.list").write_text(f"deb {_mirror()} {NEXT_SUITE} main\n")
        options = [
            f"-oDir::Etc::sourcelist={root}/sources.list",
            "-oDir::Etc::sourceparts=-",
            f"-oDir::State={root}",
            f"-oDir::State::status={root}/status",
            f"-oDir::State::lists={root}/lists",
            f"-oDir::Cache={root}",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=0",
            "-oAcquire::http::Timeout=10",
        ]
        subprocess.run(["apt-get", *options, "update"], check=True, capture_output=True, timeout=_PATIENCE_S)
        subprocess.run(
            ["apt-get", *options, "download", "oras"],
            check=True,
            capture_output=True,
            timeout=_PATIENCE_S,
            cwd=root,
        )
        package = next(root.glob("oras_*.deb"), None)
        if package is None:
            raise LookupError("apt-get download left no package")
        subprocess.run(["dpkg-deb", "-x", package, root / "out"], check=True, capture_output=True, timeout=30)
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        (root / "out").rename(directory)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _mirror() -> str:
    """Return the machine's own Debian mirror."""
    answer = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Identifier: Packages"],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    sites = [line for line in answer.stdout.splitlines() if line.rstrip("/").endswith("/debian")]
    if not sites:
        raise LookupError("apt knows no Debian mirror")
    return sites[0]
