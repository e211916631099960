"""A build that is killed leaves no process and no image; the next one removes what it left. Two builds of one image do not mix."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.sources import make_source_recipe, make_tarball
from uenvd.errors import BuildFailed
from uenvd.publish.build import build
from uenvd.publish.recipe import load_recipe

PROGRAM = Path(sys.executable).parent / "uenvd-publish"
DEADLINE_S = 60.0


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A build that has come to its post-install, where it stays; and its output directory."""
    make_tarball(tmp_path / "tiny-1.0.tar.gz")
    # One that nobody waits for, in a session of its own, and the one that the build waits for.
    script = f"setsid sleep {marker(tmp_path)} & echo waiting >&2; exec sleep 600"
    recipe = make_source_recipe(tmp_path, tmp_path / "tiny-1.0.tar.gz", hook=script)
    cache = tmp_path / "cache"
    out = tmp_path / "out"
    process = subprocess.Popen(
        [PROGRAM, "build", recipe, "--out", out, "--cache", cache], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: "waiting\n" in read(out / "tiny-1.0.log") and is_running(marker(tmp_path)))
        yield process, out
    finally:
        process.kill()
        process.wait()


def marker(directory: Path) -> str:
    """Return a number of seconds that no other test sleeps."""
    return f"600.{int.from_bytes(hashlib.sha256(str(directory).encode()).digest()[:6])}"


def is_running(argument: str) -> bool:
    """Whether a process has this argument."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + DEADLINE_S
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_free(log: Path) -> bool:
    """Whether no process of a build holds the log any more."""
    with log.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_killed_build(running: tuple[subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    process, out = running
    recipe, cache = tmp_path / "tiny/1.0", tmp_path / "cache"
    with pytest.raises(BuildFailed, match=r"another build of tiny-1\.0 in .* is running"):
        build(load_recipe(recipe), out, cache=cache)
    process.kill()
    process.wait()
    wait_for(lambda: is_free(out / "tiny-1.0.log"))
    wait_for(lambda: not is_running(marker(tmp_path)))
    assert list(out.glob(".build-*"))
    assert not (out / "tiny-1.0.squashfs").exists()
    (recipe / "post-install").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(BuildFailed, match="status 3"):
        build(load_recipe(recipe), out, cache=cache)
    assert [path.name for path in out.iterdir()] == ["tiny-1.0.log"]
