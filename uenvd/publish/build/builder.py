"""Recipe -> image file: fetches the inputs, starts the build in its private place, audits what came out."""

from __future__ import annotations

import datetime
import fcntl
import getpass
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from uenvd.errors import AuditFailed, BuildFailed, InternalError, UsageError, by_code
from uenvd.publish.build.audit import BUILD_DIRECTORY, Rules, summary
from uenvd.publish.build.imagefile import audit_image
from uenvd.publish.build.inputlock import changes, inputs_of, read_lock
from uenvd.publish.build.inputs import default_cache, sha256_of
from uenvd.publish.build.kinds import Builder, Inputs, Say, Site, builder_of, identity
from uenvd.publish.build.memory import check_room
from uenvd.publish.recipe import Recipe

_SHORTEST_PATH: Final = 9
"""Shorter paths of this machine are not searched for in the image: /tmp is in every program."""
LOCK: Final = "inputs.json"
"""In the metadata directory: every input of the build, with its hash."""
FINDINGS: Final = "audit.json"
"""In the metadata directory of a builder that is not strict: what the audit found."""


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
    """Whether it was there already, made by the same builder from the same inputs."""
    findings: int = field(default=0, compare=False)
    """Of the audit, where they do not stop the build."""

    @property
    def lock(self) -> Path:
        """Return where every input is, with its hash."""
        return self.meta_dir / LOCK


def build(
    recipe: Recipe,
    out_dir: Path,
    *,
    cache: Path | None = None,
    say: Say = lambda _text: None,
    environment: Mapping[str, str] | None = None,
    again: bool = False,
    site: Site | None = None,
) -> Built:
    """Build an image, unless it is there; nothing is left in ``out_dir`` but the log when it fails.

    Args:
        recipe: of any builder.
        out_dir: made if missing; gets ``NAME-VERSION.squashfs``, ``NAME-VERSION.meta/`` and ``NAME-VERSION.log``.
        cache: where downloads are kept; None: `default_cache`.
        say: gets a line for each step.
        environment: more variables for the programs of the build. They can change the image.
        again: build also when ``out_dir`` has the image of these very inputs.
        site: what this machine has for builders; None: what the environment says (`Site.of`).

    Raises:
        UsageError: a path is below the mount point, or something that the builder needs was not named.
        BuildFailed: with the last words of the program that failed, and the log's name.
        AuditFailed: with the findings.
        ResourceMissing: no user namespaces, memory or programs.
        StorageFull: no room for the image.
        DigestMismatch: an input is not what the recipe pins.

    """
    began = time.time()
    started_s = time.monotonic()
    builder = builder_of(recipe)
    site = Site.of(os.environ) if site is None else site
    cache = (cache or default_cache()).absolute()
    out_dir = out_dir.absolute()
    for path in (out_dir, cache, recipe.directory):
        if path.is_relative_to(recipe.mount):
            raise UsageError(
                f"{path} is below the mount point {recipe.mount}, which is hidden while the image is built"
            )
    stem = f"{recipe.name}-{recipe.version}"
    image, meta_dir, log = (out_dir / f"{stem}{suffix}" for suffix in (".squashfs", ".meta", ".log"))
    lock = inputs_of(recipe, builder, site, environment or {})
    if not again:
        there = _there(lock, image, meta_dir, log)
        if there is not None:
            return there
    with _workspace(out_dir, stem, log) as (scratch, log_file):
        inputs = builder.fetch(recipe, site, cache, say)
        size_bytes = check_room(builder.needs(recipe, inputs), out_dir, stated_bytes=site.memory_bytes)
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
            partial, prefix=recipe.mount, rules=Rules(recipe.host_libraries, tuple(needles))
        )
        if findings and builder.strict:
            raise AuditFailed(f"the image would depend on the machine that built it:\n{summary(findings)}")
        digest = f"sha256:{sha256_of(partial)}"
        staged = scratch / "meta"
        _unpack_meta(partial, staged)
        for name, text in facts.pop("stackinator", {}).items():
            (staged / f"stackinator-{name}").write_text(text)
        if findings:
            text = json.dumps([finding._asdict() for finding in findings], indent=2)
            (staged / FINDINGS).write_text(text + "\n")
        seconds = time.monotonic() - started_s
        (staged / "configure.json").write_text(
            json.dumps(_circumstances(recipe, builder, inputs, digest, began, seconds, facts), indent=2)
            + "\n"
        )
        (staged / LOCK).write_text(json.dumps({**lock, "image": digest}, indent=2) + "\n")
        shutil.copyfile(log, staged / "build.log")
        partial.chmod(0o644)
        if meta_dir.exists():
            shutil.rmtree(meta_dir)
        staged.rename(meta_dir)
        partial.replace(image)
    return Built(image, meta_dir, digest, log, seconds, findings=len(findings))


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


def _there(lock: Mapping[str, Any], image: Path, meta_dir: Path, log: Path) -> Built | None:
    """Return the image that an earlier build made, if it is still what that build made and would be made again now."""
    said = read_lock(meta_dir / LOCK)
    if said is None or not image.is_file() or changes(said, lock):
        return None
    if f"sha256:{sha256_of(image)}" != said.get("image"):
        return None
    try:
        findings = len(json.loads((meta_dir / FINDINGS).read_text()))
    except (OSError, ValueError, TypeError):
        findings = 0
    return Built(image, meta_dir, str(said["image"]), log, 0.0, reused=True, findings=findings)


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
        "version": recipe.version,
        "image": str(partial),
        "new_root": str(new_root),
        "size_bytes": size_bytes,
        "debs": [str(path) for path in inputs.debs],
        "wheels": {name: [str(path) for path in wheels] for name, wheels in inputs.wheels.items()},
        "sources": {name: str(path) for name, path in inputs.sources.items()},
        "settings": dict(inputs.settings),
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
    recipe: Recipe,
    builder: Builder,
    inputs: Inputs,
    digest: str,
    began: float,
    seconds: float,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Return what is true of this build only: when, where, who, with what."""
    return {
        "version": 1,
        "builder": identity(builder),
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
        "inputs": inputs.files(),
        **facts,
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
