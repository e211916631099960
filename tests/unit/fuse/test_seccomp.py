"""The filter: what it refuses, what it lets through, and that its tables are the kernel's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from uenvd.fuse import seccomp

ATTEMPTS = """
import ctypes, errno, json, os, socket, sys, threading
from uenvd.fuse.confine import _prctl
from uenvd.fuse.seccomp import restrict
base = sys.argv[1]
kept = open(base + '/file', 'w+')
_prctl(38, 1)
assert restrict()
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *args):
    try: function(*args)
    except OSError as error: return errno.errorcode[error.errno]
    return 'done'
def call(number, *args):
    if libc.syscall(number, *args) < 0: raise OSError(ctypes.get_errno(), 'syscall')
thread = threading.Thread(target=lambda: print('a thread', file=sys.stderr)); thread.start(); thread.join()
print(json.dumps({
    'refused': {
        'read-write': attempt(os.open, base + '/file', os.O_RDWR),
        'write': attempt(os.open, base + '/file', os.O_WRONLY),
        'create': attempt(os.open, base + '/new', os.O_CREAT),
        'truncate on open': attempt(os.open, base + '/file', os.O_TRUNC),
        'truncate': attempt(os.ftruncate, kept.fileno(), 0),
        'unlink': attempt(os.unlink, base + '/file'), 'rename': attempt(os.rename, base + '/file', base + '/x'),
        'link': attempt(os.link, base + '/file', base + '/x'), 'symlink': attempt(os.symlink, 'a', base + '/x'),
        'mkdir': attempt(os.mkdir, base + '/d'), 'chmod': attempt(os.chmod, base + '/file', 0), 'utime': attempt(os.utime, base),
        'chown': attempt(os.chown, base, 0, 0), 'setxattr': attempt(os.setxattr, base, 'user.x', b''),
        'mkfifo': attempt(os.mkfifo, base + '/x'),
        'socket': attempt(socket.socket, socket.AF_UNIX), 'internet': attempt(socket.socket, socket.AF_INET),
        'exec': attempt(os.execv, '/bin/true', ['true']), 'fork': attempt(os.fork), 'kill': attempt(os.kill, os.getpid(), 0),
        'killpg': attempt(os.killpg, os.getpgid(0), 0), 'pidfd': attempt(os.pidfd_open, os.getpid()),
        'unshare': attempt(call, 272 if os.uname().machine == 'x86_64' else 97, 0x10000000),
    },
    'allowed': {
        'open': attempt(os.open, base + '/file', os.O_RDONLY), 'stat': attempt(os.stat, base), 'list': attempt(os.listdir, base),
        'socketpair': attempt(socket.socketpair), 'pipe': attempt(os.pipe), 'write': attempt(os.write, kept.fileno(), b'x'),
    },
}))
"""


@pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64"), reason="there is no filter for this processor"
)
def test_what_is_refused_and_allowed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {name: result for name, result in told["refused"].items() if result != "EPERM"} == {}
    assert set(told["allowed"].values()) == {"done"}
    assert done.stderr == "a thread\n"
    assert os.listdir(tmp_path) == ["file"]


def test_other_processors_have_no_filter() -> None:
    assert seccomp.program("s390x") == b""


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_program_is_well_formed(machine: str) -> None:
    code = seccomp.program(machine)
    assert len(code) % 8 == 0
    assert 100 < len(code) // 8 < 4096
    for index in range(0, len(code), 8):
        kind, yes, no = code[index] | code[index + 1] << 8, code[index + 2], code[index + 3]
        if kind & 7 == 5:
            assert index // 8 + 1 + max(yes, no) < len(code) // 8, "jumps stay inside"
    assert code[-8:-6] == b"\x06\x00", "the end is a return"


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_numbers_are_the_kernels(header: str, column: int) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header} on this machine")
    known: dict[str, int] = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)\n", Path(header).read_text()):
        known.setdefault(name, int(number))
    tables = [
        seccomp._OFTEN,
        seccomp._REFUSED,
        seccomp._MISSING,
        seccomp._FOR_THREADS_ONLY,
        {name: pair for name, (pair, _argument) in seccomp._FOR_READING_ONLY.items()},
    ]
    for table in tables:
        for name, pair in table.items():
            assert pair[column] == known.get(name), name
