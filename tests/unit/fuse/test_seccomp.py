"""The filter: what it refuses and lets through, by real attempts; that it is whole, on other processors too; and when it cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyseccomp
import pytest

from uenvd.fuse import seccomp

ATTEMPTS = """
import ctypes, errno, json, os, pyseccomp, socket, sys, threading
from uenvd.fuse.confine import confine
from uenvd.fuse.seccomp import restrict
base, how = sys.argv[1:]
file = base + '/file'
kept = os.open(file, os.O_RDWR | os.O_CREAT)
if how == 'confined': confine(keep=frozenset({kept}))
else: assert restrict()
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *args):
    try: function(*args)
    except OSError as error: return errno.errorcode[error.errno]
    return 'done'
def call(name, *args, bits=0):
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    if number < 0: return 'EPERM'  # this processor has no such call
    if libc.syscall(ctypes.c_long(number | bits), *args) >= 0: return 'done'
    return errno.errorcode[ctypes.get_errno()]
told = []
thread = threading.Thread(target=lambda: told.append('a thread')); thread.start(); thread.join()
name = file.encode()
refused = {
    'exec': attempt(os.execv, '/bin/true', ['true']), 'spawn': attempt(os.posix_spawn, '/bin/true', ['true'], {}),
    'fork': attempt(os.fork), 'vfork': call('vfork'), 'clone': call('clone', 17, 0, 0, 0, 0),
    'kill': attempt(os.kill, os.getpid(), 0), 'killpg': attempt(os.killpg, os.getpgid(0), 0),
    'pidfd': attempt(os.pidfd_open, os.getpid()), 'ptrace': call('ptrace', 0, 0, 0, 0),
    'unix': attempt(socket.socket, socket.AF_UNIX), 'internet': attempt(socket.socket, socket.AF_INET),
    'netlink': attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
    'temporary': attempt(os.open, base, os.O_TMPFILE | os.O_WRONLY), 'ftruncate': attempt(os.ftruncate, kept, 0),
    'truncate': attempt(os.truncate, file, 0), 'unlink': attempt(os.unlink, file), 'rename': attempt(os.rename, file, base + '/x'),
    'link': attempt(os.link, file, base + '/x'), 'symlink': attempt(os.symlink, 'a', base + '/x'),
    'mkdir': attempt(os.mkdir, base + '/d'), 'mkfifo': attempt(os.mkfifo, base + '/x'), 'chmod': attempt(os.chmod, file, 0),
    'utime': attempt(os.utime, base), 'chown': attempt(os.chown, base, -1, -1), 'setxattr': attempt(os.setxattr, base, 'user.x', b''),
    'mount': call('mount', b'none', base.encode(), b'tmpfs', 0, 0), 'umount': call('umount2', b'/proc', 2),
    'fsopen': call('fsopen', b'tmpfs', 0), 'open_tree': call('open_tree', -1, b'/', 1), 'chroot': attempt(os.chroot, '/'),
    'unshare user': call('unshare', 0x10000000), 'unshare mounts': call('unshare', 0x20000), 'setns': call('setns', 0, 0),
    'bpf': call('bpf', 0, 0, 0), 'io_uring': call('io_uring_setup', 1, 0), 'keyctl': call('keyctl', 0, -3, 0),
}
for flag in ('O_WRONLY', 'O_RDWR', 'O_CREAT', 'O_TRUNC', 'O_APPEND'):
    flags = getattr(os, flag) | os.O_CLOEXEC
    refused['openat ' + flag] = attempt(os.open, file, flags)
    refused['open ' + flag] = call('open', name, flags)
if os.uname().machine == 'x86_64': refused['x32'] = call('execve', b'/bin/true', 0, 0, bits=0x40000000)
print(json.dumps({
    'refused': refused,
    'missing': [call('clone3', 0, 0), call('openat2', -100, name, 0, 0)],
    'allowed': {
        'thread': 'done' if told else 'none', 'open': attempt(os.open, file, os.O_RDONLY | os.O_NONBLOCK), 'read': attempt(os.pread, kept, 1, 0),
        'write': attempt(os.write, kept, b'x'), 'stat': attempt(os.stat, base), 'list': attempt(os.listdir, base),
        'socketpair': attempt(socket.socketpair), 'pipe': attempt(os.pipe),
    },
}))
"""


@pytest.mark.parametrize("how", ["filter alone", "confined"])
def test_what_is_refused_and_allowed(tmp_path: Path, how: str) -> None:
    """With the filter alone a root has all other rights: what is refused then is refused by it."""
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert {name: result for name, result in told["refused"].items() if result != "EPERM"} == {}
    assert told["missing"] == ["ENOSYS", "ENOSYS"]
    assert {name: result for name, result in told["allowed"].items() if result != "done"} == {}
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "x"


class ForAarch64(pyseccomp.SyscallFilter):  # type: ignore[misc]
    """libseccomp makes filters for other processors, too."""

    def __init__(self, action: int) -> None:
        super().__init__(action)
        if pyseccomp.system_arch() != pyseccomp.Arch.AARCH64:
            self.add_arch(pyseccomp.Arch.AARCH64)
            self.remove_arch(pyseccomp.Arch.NATIVE)


def test_filter_of_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyseccomp, "SyscallFilter", ForAarch64)
    with tempfile.TemporaryFile("w+") as file:
        seccomp._filter().export_pfc(file)
        file.seek(0)
        text = file.read()
    assert "# filter for arch aarch64" in text
    found = {name: int(number) for name, number in re.findall(r'syscall "(\w+)" \((\d+)\)', text)}
    wanted = {
        "execve": 221,
        "clone": 220,
        "clone3": 435,
        "openat": 56,
        "socket": 198,
        "mount": 40,
        "unshare": 97,
    }
    assert wanted.items() <= found.items()
    every = {name for names in seccomp._REFUSED.values() for name in names.split()}
    assert found.keys() == every | {"clone", "clone3", "openat2", "open", "openat"}


def test_libseccomp_knows_every_name(caplog: pytest.LogCaptureFixture) -> None:
    seccomp._filter()
    assert caplog.messages == []


def test_name_that_libseccomp_does_not_know_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(seccomp._REFUSED, "of tomorrow", "nonsuch mount")
    seccomp._filter()
    assert caplog.messages == ["not refused, because libseccomp is too old to know them: nonsuch"]


def test_kernel_without_filters_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_filter: pyseccomp.SyscallFilter) -> None:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(pyseccomp.SyscallFilter, "load", fail)
    assert not seccomp.restrict()
    assert caplog.messages == ["system calls are not restricted: libseccomp: Invalid argument"]
