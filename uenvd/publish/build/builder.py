"""Recipe -> image file: fetches the inputs, starts the build in its private place, audits what came out."""

from __future__ import annotations

import datetime
import fcntl
import getpass
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from uenvd import __version__
from uenvd.errors import AuditFailed, BuildFailed, InternalError, ResourceMissing, UsageError, by_code
from uenvd.publish.build.audit import BUILD_DIRECTORY, Rules, summary
from uenvd.publish.build.imagefile import audit_image
from uenvd.publish.build.inputs import Inputs, default_cache, fetch, sha256_of
from uenvd.publish.recipe import Recipe

MIN_MEMORY_BYTES: Final = 512 << 20
_MEMORY_SHARE: Final = 0.8
_SHORTEST_PATH: Final = 9
"""Shorter paths of this machine are not searched for in the image: /tmp is in every program."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a build made."""

    image: Path
    """The squashfs file: the same bytes for the same recipe, whoever builds it, when and where."""
    meta_dir: Path
    """To be attached to the image: its ``meta/`` (env.json, recipe, extra), when, where and by whom it was built, and the log."""
    digest: str
    """``sha256:...`` of the file."""
    log: Path
    seconds: float = field(compare=False)
    reused: bool = field(default=False, compare=False)
    """Whether it was there already, made by the same builder from the same recipe."""


def build(
    recipe: Recipe,
    out_dir: Path,
    *,
    cache: Path | None = None,
    say: Say = lambda _text: None,
    environment: Mapping[str, str] | None = None,
    again: bool = False,
) -> Built:
    """Build an image, unless it is there; nothing is left in ``out_dir`` but the log when it fails.

    Args:
        recipe: of the builder ``python``.
        out_dir: made if missing; gets ``NAME-VERSION.squashfs``, ``NAME-VERSION.meta/`` and ``NAME-VERSION.log``.
        cache: where downloads are kept; None: `default_cache`.
        say: gets a line for each step.
        environment: more variables for the programs of the build. They can change the image.
        again: build also when ``out_dir`` has the image of this very recipe.

    Raises:
        UsageError: the recipe is for another builder.
        BuildFailed: with the last words of the program that failed, and the log's name.
        AuditFailed: with the findings.
        ResourceMissing: no user namespaces, memory or programs.
        DigestMismatch: an input is not what the recipe pins.

    """
    if recipe.builder != "python":
        raise UsageError(
            f"{recipe.label} is a recipe for {recipe.format}, and this machine builds only recipes of the builder python",
            hint="build it with Stackinator, and publish the image with: uenvd-publish push",
        )
    began = time.time()
    started_s = time.monotonic()
    cache = (cache or default_cache()).absolute()
    out_dir = out_dir.absolute()
    for path in (out_dir, cache, recipe.directory):
        if path.is_relative_to(recipe.mount):
            raise UsageError(
                f"{path} is below the mount point {recipe.mount}, which is hidden while the image is built"
            )
    stem = f"{recipe.name}-{recipe.version}"
    image, meta_dir, log = (out_dir / f"{stem}{suffix}" for suffix in (".squashfs", ".meta", ".log"))
    if not again and not environment:
        there = _there(recipe, image, meta_dir, log)
        if there is not None:
            return there
    size_bytes = _memory()
    inputs = fetch(recipe, cache, say)
    with _workspace(out_dir, stem, log) as (scratch, log_file):
        partial = scratch / "image.squashfs"
        facts = _build_inside(
            recipe, inputs, partial, scratch, size_bytes, log_file, say, dict(environment or {})
        )
        say("auditing")
        needles = [
            BUILD_DIRECTORY,
            *(str(path) for path in (out_dir, cache) if len(str(path)) >= _SHORTEST_PATH),
        ]
        findings = audit_image(
            partial,
            prefix=recipe.mount,
            rules=Rules(recipe.python.host_libraries if recipe.python else (), tuple(needles)),
        )
        if findings:
            raise AuditFailed(f"the image would depend on the machine that built it:\n{summary(findings)}")
        digest = f"sha256:{sha256_of(partial)}"
        staged = scratch / "meta"
        _unpack_meta(partial, staged)
        seconds = time.monotonic() - started_s
        (staged / "configure.json").write_text(
            json.dumps(_circumstances(recipe, inputs, digest, began, seconds, facts), indent=2) + "\n"
        )
        shutil.copyfile(log, staged / "build.log")
        partial.chmod(0o644)
        if meta_dir.exists():
            shutil.rmtree(meta_dir)
        staged.rename(meta_dir)
        partial.replace(image)
    return Built(image, meta_dir, digest, log, seconds)


@contextmanager
def _workspace(out_dir: Path, stem: str, log: Path) -> Iterator[tuple[Path, TextIO]]:
    """Own the place of an image: its empty log, which is also the lock, and a directory that is removed in the end."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        log_file = log.open("a")
    except OSError as error:
        raise BuildFailed(
            f"cannot write to {out_dir}: {error.strerror}", hint="name another: --out DIR"
        ) from error
    with log_file:
        try:
            # Inherited by the build, so that it is held until that has ended, too.
            fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildFailed(
                f"another build of {stem} in {out_dir} is running",
                hint="wait for it, or name another: --out DIR",
            ) from None
        log_file.truncate(0)
        for left in out_dir.glob(f".build-{stem}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".build-{stem}-", dir=out_dir) as name:
            yield Path(name), log_file


def _there(recipe: Recipe, image: Path, meta_dir: Path, log: Path) -> Built | None:
    """Return the image that an earlier build made, if it is still what that build made and would be made again now."""
    try:
        said = json.loads((meta_dir / "configure.json").read_text())
        if (
            said["recipe"]["fingerprint"] != f"sha256:{recipe.fingerprint()}"
            or said["builder"] != _builder_name()
            or (said["recipe"]["name"], said["recipe"]["version"]) != (recipe.name, recipe.version)
            or f"sha256:{sha256_of(image)}" != said["image"]
        ):
            return None
        return Built(image, meta_dir, str(said["image"]), log, 0.0, reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _builder_name() -> str:
    """Return the name of this builder with a digest of its code, since a change of that changes images."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return f"uenvd {__version__} (python, {total.hexdigest()[:12]})"


def _memory() -> int:
    """Return how much memory a build may take. Raises `ResourceMissing`."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    available = min(available, _cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    if available < MIN_MEMORY_BYTES:
        raise ResourceMissing(
            f"images are built in memory, and {available >> 20} MiB are free: at least {MIN_MEMORY_BYTES >> 20} MiB are needed",
            hint="ask for more memory, where this is a job or a container",
        )
    return int(available * _MEMORY_SHARE)


def _cgroup_memory(root: Path, own: Path) -> int:
    """Return what the limits of this process's cgroup (version 2) and of those above it leave; without limits very much.

    What a build writes is charged there: a job or a container that exceeds its limit is killed.
    """
    left = 1 << 62
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return left
    place = root / name.strip("/")
    for group in (place, *place.parents):
        if not group.is_relative_to(root):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                left = min(left, int(limit) - int((group / "memory.current").read_text()))
        except (OSError, ValueError):
            continue
    return max(left, 0)


def _build_inside(
    recipe: Recipe,
    inputs: Inputs,
    partial: Path,
    scratch: Path,
    size_bytes: int,
    log: TextIO,
    say: Say,
    environment: dict[str, str],
) -> dict[str, Any]:
    """Run `inside` and relay what it says; return its facts."""
    new_root = scratch / "root"
    new_root.mkdir()
    order = {
        "recipe": str(recipe.directory),
        "image": str(partial),
        "new_root": str(new_root),
        "size_bytes": size_bytes,
        "debs": [str(path) for path in inputs.packages],
        "wheels": {name: [str(path) for path in wheels] for name, wheels in inputs.wheels.items()},
        "environment": environment,
    }
    outcome: dict[str, Any] = {}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "uenvd.publish.build.inside"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as pipe:
            json.dump(order, pipe)
        for line in process.stdout:
            message = json.loads(line)
            if "step" in message:
                say(str(message["step"]))
            else:
                outcome = message
    finally:
        if process.poll() is None and not outcome:
            process.kill()
        process.stdout.close()
        process.wait()
    if "done" in outcome:
        return dict(outcome["done"])
    if "error" not in outcome:
        killed = process.returncode == -signal.SIGKILL
        raise BuildFailed(
            f"the build {'was killed' if killed else f'ended with status {process.returncode}'} and said nothing; "
            f"see {log.name}",
            hint="was there not enough memory? images are built in it" if killed else "",
        )
    error = outcome["error"]
    kind = by_code(error["code"])
    message = error["message"] if kind is not InternalError else f"{error['message']} (log: {log.name})"
    if kind is BuildFailed:
        message += f"\nthe log is {log.name}"
    raise kind(message, hint=error["hint"] or None)


def _unpack_meta(image: Path, target: Path) -> None:
    command = ["unsquashfs", "-no-progress", "-quiet", "-no-xattrs", "-dest", str(target), str(image), "meta"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise BuildFailed(f"unsquashfs cannot read the image that was made: {done.stderr.strip()[-500:]}")
    for path in sorted((target / "meta").iterdir()):
        path.rename(target / path.name)
    (target / "meta").rmdir()


def _circumstances(
    recipe: Recipe, inputs: Inputs, digest: str, began: float, seconds: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """Return what is true of this build only: when, where, who, with what."""
    return {
        "version": 1,
        "builder": _builder_name(),
        "recipe": {
            "name": recipe.name,
            "version": recipe.version,
            "fingerprint": f"sha256:{recipe.fingerprint()}",
        },
        "mount": recipe.mount,
        "image": digest,
        "time": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "host": platform.node(),
        "user": _user(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "inputs": sorted(
            {path.name for path in (*inputs.packages, *(w for ws in inputs.wheels.values() for w in ws))}
        ),
        **facts,
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
