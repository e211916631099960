"""What the builders share inside the sandbox: running programs, hooks, metadata, squashing. See `uenvd.publish.build.inside`."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from uenvd.errors import BuildFailed, ResourceMissing
from uenvd.publish.build import metadata
from uenvd.publish.build.audit import BUILD_DIRECTORY, Rules
from uenvd.publish.build.relocate import objects
from uenvd.publish.build.sandbox import die_with_parent
from uenvd.publish.recipe import Recipe

ZSTD_LEVEL: Final = 9
PROGRAM_S: Final = 3600.0
_TAIL_LINES: Final = 14
_LINE_BYTES: Final = 1 << 16
_POLL_S: Final = 0.2
"""How soon the end of a program is seen whose children keep its output open."""
BASE_ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": f"{BUILD_DIRECTORY}/home",
    "TMPDIR": f"{BUILD_DIRECTORY}/temporary",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
}
"""What the programs of a build see: nothing of who builds, where and when."""


class Order(NamedTuple):
    """What is to be built; the paths are the machine's."""

    recipe: str
    version: str
    """Of the image."""
    image: str
    """Where to write the image."""
    new_root: str
    """An empty directory."""
    size_bytes: int
    debs: list[str]
    wheels: dict[str, list[str]]
    sources: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, str]
    """More variables for the programs of the build."""


class Workshop:
    """One build: where it is, and what runs in it."""

    def __init__(self, order: Order, recipe: Recipe) -> None:
        self.order = order
        self.recipe = recipe
        self.prefix = Path(recipe.mount)
        self.workspace = Path(BUILD_DIRECTORY)
        self.rules = Rules(recipe.host_libraries)
        self.environment = {**BASE_ENVIRONMENT, "SOURCE_DATE_EPOCH": str(recipe.date_s), **order.environment}
        self.root: Path | None = None
        """Of the programs, where they have one of their own."""
        for name in ("home", "temporary"):
            (self.workspace / name).mkdir()

    def run(self, *command: str, **variables: str) -> str:
        """Run a program of the machine; its output goes to the log, stdout is returned. Raises `BuildFailed`, `ResourceMissing`."""
        print(f"+ {shlex.join(command)[:300]}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, errors="replace",
                env={**self.environment, **variables}, timeout=PROGRAM_S, preexec_fn=die_with_parent,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ResourceMissing(
                f"{command[0]} is missing", hint="the builder needs dpkg, patchelf and squashfs-tools"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise BuildFailed(f"{command[0]} did not end within {PROGRAM_S:.0f} s") from error
        sys.stderr.write(done.stdout[-100_000:] + done.stderr[-100_000:])
        if done.returncode != 0:
            raise _failed(command, done.returncode, (done.stdout + done.stderr).strip().splitlines())
        return done.stdout

    def follow(
        self, command: Sequence[str], *, cwd: Path, variables: Mapping[str, str] | None = None, limit_s: float = PROGRAM_S
    ) -> None:  # fmt: skip
        """Run a long program of the build in its root; each line goes to the log as it comes. Raises `BuildFailed`, `ResourceMissing`."""
        print(f"+ {shlex.join(command)[:1000]}", file=sys.stderr, flush=True)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**self.environment, **(variables or {})}, preexec_fn=self._into(cwd),
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ResourceMissing(
                f"{command[0]} is missing", hint="is it in the tool chain, or on this machine?"
            ) from error
        last: deque[str] = deque(maxlen=_TAIL_LINES)
        try:
            self._relay(process, last, time.monotonic() + limit_s)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise BuildFailed(f"{command[0]} did not end within {limit_s:.0f} s") from None
        finally:
            process.kill()
            assert process.stdout is not None
            process.stdout.close()
            process.wait()
        if process.returncode != 0:
            raise _failed(command, process.returncode, list(last))

    @staticmethod
    def _relay(process: subprocess.Popen[bytes], last: deque[str], ends_s: float) -> None:
        """Copy what a program says to the log until it ends; keep its last lines. Raises TimeoutError."""
        assert process.stdout is not None
        pending = b""
        while process.poll() is None or _ready(process.stdout, 0.0):
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            if not _ready(process.stdout, min(left_s, _POLL_S)):
                continue
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                process.wait(left_s)
                break
            sys.stderr.buffer.write(piece)
            sys.stderr.flush()
            *lines, pending = (pending + piece).split(b"\n")
            last.extend(line.decode(errors="replace") for line in lines)
            pending = pending[-_LINE_BYTES:]
        if pending:
            last.append(pending.decode(errors="replace"))

    def _into(self, cwd: Path) -> Callable[[], None]:
        root = self.root

        def enter() -> None:
            die_with_parent()
            if root is not None:
                os.chroot(root)
            os.chdir(cwd)

        return enter

    def hook(self, **variables: str) -> None:
        """Run the recipe's ``post-install``, if it has one, where the build's other programs run."""
        script = self.recipe.directory / "post-install"
        if not script.is_file():
            return
        step("running post-install")
        copy = self.workspace / "post-install"
        shutil.copyfile(script, copy)
        copy.chmod(0o755)
        root = metadata.view_root(self.recipe, self.recipe.environments[0])
        variables |= {"UENV_MOUNT": str(self.prefix), "UENV_ROOT": root}
        self.follow([str(copy)], cwd=self.workspace, variables=variables)

    def describe(self) -> None:
        """Write ``meta/``."""
        found = list(objects(self.prefix).values())
        provided = {path.name for path in self.prefix.rglob("*.so*")}
        host = metadata.host_json(self.recipe, found, provided, self.rules)
        metadata.write(self.recipe, self.recipe.directory, self.prefix, host)

    def squash(self) -> None:
        """Write the image."""
        step("squashing")
        self.run("chmod", "-R", "u+rwX,go=rX", str(self.prefix))
        date = str(self.recipe.date_s)
        # Without fragments two versions of an image share nearly all their blocks. The variable: mksquashfs refuses it together with
        # explicit times.
        self.environment.pop("SOURCE_DATE_EPOCH", None)
        self.run(
            "mksquashfs", str(self.prefix), self.order.image, "-quiet", "-no-progress", "-comp", "zstd",
            "-Xcompression-level", str(ZSTD_LEVEL), "-b", "131072", "-no-fragments", "-no-xattrs", "-all-root",
            "-all-time", date, "-mkfs-time", date, "-noappend",
        )  # fmt: skip


def _failed(command: Sequence[str], status: int, lines: Sequence[str]) -> BuildFailed:
    words = shlex.join(command)
    last = "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])
    return BuildFailed(
        f"{words if len(words) < 200 else words[:200] + ' ...'} failed with status {status}:\n{last}"
    )


def _ready(stream: IO[bytes], wait_s: float) -> bool:
    return bool(select.select([stream], [], [], wait_s)[0])


def step(text: str) -> None:
    """Tell the parent, and the log, what begins."""
    print(f"== {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
    tell({"step": text})


def tell(message: dict[str, Any]) -> None:
    """Send the parent a line."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
