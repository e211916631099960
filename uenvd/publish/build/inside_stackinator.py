"""The builder ``stackinator``, inside the sandbox: the site's ``stack-config`` and the ``make`` that it prepares.

The sandbox is ours for every generation, in place of bubblewrap: the build directory is in memory, its ``store`` is the mount point, /tmp
and the home directory are empty, and all of it is gone with the last process. ``make`` is told that it is in a sandbox (``SANDBOX=``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from uenvd import mounts
from uenvd.errors import BuildFailed
from uenvd.publish.build.workshop import Workshop, step

NETWORK: Final = True
_CONFIGURE_S: Final = 1800.0
_MAKE_S: Final = 12 * 3600.0
_KNOWS_NO_BWRAP: Final = 5
"""The first Stackinator with --no-bwrap."""
_TELLS_JOBS: Final = 3
"""The recipe format from which on the Makefile wants NJOBS."""
_SECOND_TRY_SHARE: Final = 8
_TIME_SHOWS: Final = ("meta/configure.json",)
"""What is true of one build only: kept beside the image, not in it."""


def make(shop: Workshop) -> dict[str, Any]:
    """Build; return what Stackinator says of the build."""
    settings = shop.order.settings
    build, store = shop.workspace / "stack", shop.workspace / "stack/store"
    store.mkdir(parents=True)
    mounts.bind_recursive(shop.prefix, store)
    caller = shop.environment["PATH"]
    _configure(shop, build, settings)
    _hide(shop)
    shop.environment["PATH"] = f"{build}/spack/bin:{caller}"
    try:
        _make(shop, build, int(settings["format"]))
    finally:
        _show(shop)
    step("making it readable, and the same at any time")
    said = {}
    for name in _TIME_SHOWS:
        path = shop.prefix / name
        if path.is_file():
            said[Path(name).name] = path.read_text(errors="replace")
            path.unlink()
    if not (shop.prefix / "meta/env.json").is_file():
        raise BuildFailed(
            "Stackinator ended well, but left no meta/env.json in its store", hint="see the build log"
        )
    shop.squash()
    return {"stackinator": said}


def _configure(shop: Workshop, build: Path, settings: dict[str, Any]) -> None:
    step("stack-config")
    place = shop.workspace / "configure"
    place.mkdir()
    mirror = settings["mirror"]
    words = [
        str(settings["program"]),
        "--build",
        str(build),
        "--recipe",
        str(shop.recipe.directory),
        "--system",
        settings["system"],
    ]
    words += ["--mount", shop.recipe.mount]
    if mirror is not None:
        words += ["--mirror" if int(settings["format"]) > 1 else "--cache", mirror]
    if int(settings["major"]) >= _KNOWS_NO_BWRAP:
        words.append("--no-bwrap")
    # The tool's own interpreter may be anywhere.
    shop.follow(
        words, cwd=place, variables={"PATH": os.environ.get("PATH", os.defpath)}, limit_s=_CONFIGURE_S
    )


def _make(shop: Workshop, build: Path, number: int) -> None:
    """Run make; if that fails once more with few processes, which tells what fails, and with what is built kept for the next run."""
    step("make")
    jobs = len(os.sched_getaffinity(0))
    try:
        shop.follow(_words(number, jobs, "store.squashfs"), cwd=build, limit_s=_MAKE_S)
    except BuildFailed:
        step("make, once more with fewer processes")
    else:
        return
    try:
        shop.follow(
            _words(number, max(1, jobs // _SECOND_TRY_SHARE), "store.squashfs"), cwd=build, limit_s=_MAKE_S
        )
    except BuildFailed:
        if shop.order.settings["mirror"] is not None:
            step("keeping in the build cache what was built")
            try:
                shop.follow(_words(number, 1, "cache-force"), cwd=build, limit_s=_MAKE_S)
            except BuildFailed:
                step("the build cache could not be written")
        raise


def _words(number: int, jobs: int, target: str) -> list[str]:
    parallel = [f"NJOBS={jobs}"] if number >= _TELLS_JOBS else [f"-j{jobs}"]
    return ["make", "--keep-going", *parallel, "SANDBOX=", target]


def _hidden(shop: Workshop) -> list[Path]:
    """Return what the programs of the build do not see: the home directory of who builds, and /tmp."""
    homes = [Path(os.environ.get("HOME") or "/"), Path("/tmp")]  # noqa: S108  # hidden, not used
    keep = [shop.recipe.directory, Path(shop.order.settings["system"]), Path(shop.order.settings["program"])]
    return [
        place
        for place in homes
        if place.is_dir() and place != Path("/") and not any(path.is_relative_to(place) for path in keep)
    ]


def _hide(shop: Workshop) -> None:
    for place in _hidden(shop):
        mounts.mount_tmpfs(
            place, size_bytes=shop.order.size_bytes, mode=0o777, source="uenvd-hidden", executable=True
        )


def _show(shop: Workshop) -> None:
    for place in _hidden(shop):
        mounts.umount(place, detach=True)
