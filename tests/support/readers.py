"""Readers of a mount who check every byte, for as long as a test does harm to who serves it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.fusetools import NOBODY

_READ = """
import errno, hashlib, json, os, random, select, sys, time
from uenvd import mounts
fd, target, count, sums = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
ids = os.getuid(), os.getgid()
mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)
mounts.map_self(*ids)
mounts.make_rslave()
mounts.move_mount(fd, target)
os.close(fd)
def read(number, out):
    dice, reads, wrong, errors, stall = random.Random(number), 0, 0, [], 0.0
    while not select.select([0], [], [], 0)[0]:
        name = dice.choice(list(sums))
        began = time.monotonic()
        try:
            descriptor = os.open(f'{target}/{name}', os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                digest = hashlib.sha256()
                while piece := os.read(descriptor, 1 << 17): digest.update(piece)
            finally: os.close(descriptor)
            wrong += digest.hexdigest() != sums[name]
            os.stat(f'{target}/no-{number}-{reads}', follow_symlinks=False)
        except FileNotFoundError as error:
            if f'no-{number}-' not in error.filename: errors.append(str(error))
        except OSError as error: errors.append(str(error))
        reads += 1
        stall = max(stall, time.monotonic() - began)
    os.write(out, (json.dumps({'reads': reads, 'wrong': wrong, 'errors': errors[:3], 'failed': len(errors), 'stall_s': stall}) + '\\n').encode())
into, out = os.pipe()
for number in range(count):
    if os.fork() == 0:
        try: read(number, out)
        finally: os._exit(0)
os.close(out)
print('reading', flush=True)
sys.stdin.readline()
for _ in range(count): os.wait()
sys.stdout.write(os.fdopen(into).read())
"""


@dataclass
class Told:
    """What the readers have to say."""

    reads: int
    wrong: int
    failed: int
    errors: list[str]
    stall_s: float
    """The longest time in which one of them got through one file."""


class Readers:
    """Reads until `stop`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def stop(self) -> Told:
        """End them and hear; fails when one of them does not end (is stuck in the kernel)."""
        output, _errors = self._process.communicate("\n", timeout=30)
        lines = [json.loads(line) for line in output.splitlines()]
        return Told(
            sum(line["reads"] for line in lines),
            sum(line["wrong"] for line in lines),
            sum(line["failed"] for line in lines),
            [error for line in lines for error in line["errors"]],
            max(line["stall_s"] for line in lines),
        )


@contextmanager
def readers(mount_fd: int, target: str, sums: dict[str, str], count: int = 8) -> Iterator[Readers]:
    """Start processes that read random files of a mount, uncached, and compare their SHA-256 with ``sums`` (name -> hex digest)."""
    process = subprocess.Popen(
        [sys.executable, "-c", _READ, str(mount_fd), target, str(count), json.dumps(sums)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        pass_fds=[mount_fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        yield Readers(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()


def sums_of(tree: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a directory, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tree.iterdir() if path.is_file()
    }
