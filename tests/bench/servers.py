"""The servers that the benchmark compares, and what is asked of their processes: memory, CPU, replies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.fusetools import is_mounted, until

PROGRAM = Path(sys.executable).parent / "uenvd-fs"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_MOUNT_S = 30.0


@dataclass(frozen=True)
class Server:
    """A way to serve an image; ``{image}`` and ``{point}`` in its command are filled in."""

    name: str
    command: tuple[str, ...]
    stays: bool = True
    """Whether the command is the server, in the foreground; mount(8) ends at once."""

    def missing(self) -> str | None:
        """Return why this server cannot run here, None if it can."""
        transport = next((word for word in self.command if word.startswith("transport=")), None)
        if transport is not None and "transport=" not in _usage():
            return None if self.name == "pyfuse3" else "uenvd-fs has no such transport"
        return None

    def words(self, image: Path, point: Path) -> list[str]:
        """Return the command line."""
        words = [word.format(image=image, point=point) for word in self.command]
        if "transport=pyfuse3" in words and "transport=" not in _usage():
            at = words.index("transport=pyfuse3")
            del words[at - 1 : at + 1]
        return words


@cache
def _usage() -> str:
    done = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, check=True)
    return done.stdout


def _uenvd(name: str, *options: str) -> Server:
    words = tuple(word for option in ("allow_other", *options) for word in ("-o", option))
    return Server(name, (str(PROGRAM), "{image}", "{point}", "-f", *words))


SERVERS = {
    server.name: server
    for server in (
        Server("kernel", ("mount", "-t", "squashfs", "-o", "loop,ro", "{image}", "{point}"), stays=False),
        Server("squashfuse_ll", ("squashfuse_ll", "-f", "-o", "allow_other", "{image}", "{point}")),
        _uenvd("pyfuse3", "transport=pyfuse3"),
        _uenvd("channel-1", "transport=channel", "workers=1"),
        _uenvd("channel-2", "transport=channel", "workers=2"),
    )
}


@dataclass
class Mounted:
    """An image being served."""

    server: Server
    root: Path
    process: subprocess.Popen[bytes] | None

    def pids(self) -> list[int]:
        """Return the processes that serve: the one that was started and all below it. Empty for the kernel."""
        if self.process is None:
            return []
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    parents.setdefault(parent, []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:  # grows
            found.extend(parents.get(pid, ()))
        return found

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of all processes that serve; of children that ended as well."""
        total = 0.0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) * _TICK_S
        return total

    def pss_bytes(self) -> int:
        """Proportional set size of all processes that serve."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def replies(self) -> int:
        """Write calls of all processes that serve: each reply to the kernel is one."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/io").read_text().splitlines():
                if line.startswith("syscw:"):
                    total += int(line.split()[1])
        return total


@contextlib.contextmanager
def mounted(server: Server, image: Path) -> Iterator[Mounted]:
    """Serve the image, which is in no cache when the mount is there; undone at the end, whatever happened."""
    forget(image)
    point = Path(tempfile.mkdtemp(prefix="uenvd-bench-mount-", dir="/var/tmp"))
    point.chmod(0o755)
    process = None
    try:
        command = server.words(image, point)
        if server.stays:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        else:
            subprocess.run(command, check=True)
        until(lambda: is_mounted(point) or (process and process.poll() is not None), "the mount", _MOUNT_S)
        if process is not None and process.poll() is not None:
            raise SystemExit(f"bench: {server.name} ended: {' '.join(command)}")
        os.stat(point)  # answered: it serves
        yield Mounted(server, point, process)
    finally:
        _unmount(point, process)
        point.rmdir()


def _unmount(point: Path, process: subprocess.Popen[bytes] | None) -> None:
    while is_mounted(point):
        # Not lazily: the next server must not share the machine with the end of this one.
        done = subprocess.run(["umount", point], capture_output=True, check=False)
        if done.returncode != 0:
            time.sleep(0.05)
            subprocess.run(["umount", "--lazy", point], check=False)
    if process is None:
        return
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait(20)


def forget(image: Path) -> None:
    """Drop the image file from the page cache. What the kernel kept of its files went with the last mount."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_share(image: Path) -> float:
    """Return which part of the image file, 0..1, lies in the page cache: sampled, without reading it in."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        places = range(0, image.stat().st_size, 1 << 20)
        there = 0
        for place in places:
            with contextlib.suppress(BlockingIOError):
                there += os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT)
        return there / max(len(places), 1)
    finally:
        os.close(descriptor)
