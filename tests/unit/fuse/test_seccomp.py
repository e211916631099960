"""The filter: what it refuses and lets through, by real attempts; that it is whole, on other processors too; and when it cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyseccomp
import pytest

from uenvd.fuse import seccomp
from uenvd.fuse.seccomp import Policy

ATTEMPTS = """
import ctypes, errno, json, mmap, os, pyseccomp, socket, sys, threading
from uenvd.fuse.confine import confine
from uenvd.fuse.seccomp import Policy, restrict
base, how, policy = sys.argv[1], sys.argv[2], Policy(sys.argv[3])
file = base + '/file'
kept = os.open(file, os.O_RDWR | os.O_CREAT)
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *args):
    try: function(*args)
    except OSError as error: return errno.errorcode[error.errno]
    return 'done'
def number_of(name): return pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
numbers = {name: number_of(name) for name in '''vfork clone ptrace mount umount2 fsopen open_tree unshare setns bpf io_uring_setup keyctl
    open execve clone3 openat2 statx pidfd_getfd process_vm_readv kcmp userfaultfd perf_event_open mmap add_key'''.split()}
def call(name, *args, bits=0):
    number = numbers[name]
    if number < 0: return 'EPERM'  # this processor has no such call
    if libc.syscall(ctypes.c_long(number | bits), *args) >= 0: return 'done'
    return errno.errorcode[ctypes.get_errno()]
def fork():
    if os.fork() == 0: os._exit(0)
    os.wait()
if how == 'confined': confine(keep=frozenset({kept}), policy=policy)
else: assert restrict(policy)
told = []
thread = threading.Thread(target=lambda: told.append('a thread')); thread.start(); thread.join()
name = file.encode()
results = {
    'exec': attempt(os.execv, '/bin/true', ['true']), 'spawn': attempt(os.posix_spawn, '/bin/true', ['true'], {}),
    'fork': attempt(fork), 'vfork': call('vfork'), 'a namespace by clone': call('clone', 0x10000000 | 17, 0, 0, 0, 0),
    'own processors': attempt(os.sched_setaffinity, 0, os.sched_getaffinity(0)),
    'processors of others': attempt(os.sched_setaffinity, os.getppid(), os.sched_getaffinity(0)),
    'kill': attempt(os.kill, os.getpid(), 0), 'killpg': attempt(os.killpg, os.getpgid(0), 0),
    'pidfd': attempt(os.pidfd_open, os.getpid()), 'ptrace': call('ptrace', 0, 0, 0, 0), 'pidfd_getfd': call('pidfd_getfd', 0, 0, 0),
    'memory of others': call('process_vm_readv', 1, 0, 0, 0, 0, 0), 'kcmp': call('kcmp', 1, 1, 0, 0, 0),
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
    'add_key': call('add_key', 0, 0, 0, 0, 0),
    'userfaultfd': call('userfaultfd', 0), 'perf': call('perf_event_open', 0, 0, 0, 0, 0),
    'code': attempt(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)), 'cwd': attempt(os.getcwd), 'chdir': attempt(os.chdir, '/'),
    'thread': 'done' if told else 'none', 'open': attempt(os.open, file, os.O_RDONLY | os.O_NONBLOCK), 'read': attempt(os.pread, kept, 1, 0),
    'write': attempt(os.write, kept, b'x'), 'stat': attempt(os.stat, base), 'list': attempt(os.listdir, base),
    'socketpair': attempt(socket.socketpair), 'pipe': attempt(os.pipe), 'fstat': attempt(os.fstat, kept), 'memory': attempt(mmap.mmap, -1, 4096),
}
for flag in ('O_WRONLY', 'O_RDWR', 'O_CREAT', 'O_TRUNC', 'O_APPEND'):
    flags = getattr(os, flag) | os.O_CLOEXEC
    results['openat ' + flag] = attempt(os.open, file, flags)
    results['open ' + flag] = call('open', name, flags)
if os.uname().machine == 'x86_64': results['x32'] = call('execve', b'/bin/true', 0, 0, bits=0x40000000)
print(json.dumps({'results': results, 'absent': [call('clone3', 0, 0), call('openat2', -100, name, 0, 0), call('statx', 0, b'', 0, 0, 0)]}))
"""
ALLOWED = {
    Policy.WORKER: {"thread", "read", "write", "fstat", "memory", "own processors"},
    Policy.SESSION: {"thread", "read", "write", "fstat", "memory", "stat", "socketpair", "pipe"},
    Policy.SUPERVISOR: {
        *("thread", "read", "write", "fstat", "memory", "stat", "socketpair", "pipe"),
        *("fork", "pidfd", "open", "list", "own processors"),
    },
}


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("how", ["filter alone", "confined"])
def test_what_is_refused_and_allowed(tmp_path: Path, how: str, policy: Policy) -> None:
    """With the filter alone a root has all other rights: what is refused then is refused by it."""
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path), how, policy.value],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    results = told["results"]
    assert {name for name, result in results.items() if result == "done"} == ALLOWED[policy]
    assert {result for name, result in results.items() if name not in ALLOWED[policy]} == {"EPERM"}
    assert told["absent"] == ["ENOSYS"] * 3
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("policy", list(Policy))
def test_unknown_call_can_be_made_deadly_for_tests(policy: Policy) -> None:
    code = f"import os\nfrom uenvd.fuse.seccomp import Policy, restrict\nrestrict({policy})\nos.getcwd()\n"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=30, env={**os.environ, "UENVD_SECCOMP": "kill"}
    )
    assert done.returncode == -signal.SIGSYS


def test_filter_of_a_supervisor_includes_that_of_its_workers() -> None:
    """Both hold in a worker."""
    assert set(seccomp._ALLOWED[Policy.WORKER].split()) <= set(seccomp._ALLOWED[Policy.SUPERVISOR].split())


class ForAarch64(pyseccomp.SyscallFilter):  # type: ignore[misc]
    """libseccomp makes filters for other processors, too."""

    def __init__(self, action: int) -> None:
        super().__init__(action)
        if pyseccomp.system_arch() != pyseccomp.Arch.AARCH64:
            self.add_arch(pyseccomp.Arch.AARCH64)
            self.remove_arch(pyseccomp.Arch.NATIVE)


@pytest.mark.parametrize("policy", list(Policy))
def test_filter_of_another_processor(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    monkeypatch.setattr(pyseccomp, "SyscallFilter", ForAarch64)
    with tempfile.TemporaryFile("w+") as file:
        seccomp._filter(policy).export_pfc(file)
        file.seek(0)
        text = file.read()
    assert "# filter for arch aarch64" in text
    found = {name: int(number) for name, number in re.findall(r'syscall "(\w+)" \((\d+)\)', text)}
    assert {
        "readv": 65,
        "writev": 66,
        "pread64": 67,
        "clone": 220,
        "mmap": 222,
        "clone3": 435,
    }.items() <= found.items()
    assert ("openat" in found) == (policy is Policy.SUPERVISOR)


@pytest.mark.parametrize("policy", list(Policy))
def test_libseccomp_knows_every_name(caplog: pytest.LogCaptureFixture, policy: Policy) -> None:
    seccomp._filter(policy)
    assert caplog.messages == []


def test_name_that_libseccomp_does_not_know_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(seccomp._ALLOWED, Policy.WORKER, "read nonsuch write")
    seccomp._filter(Policy.WORKER)
    assert caplog.messages == ["not allowed, because libseccomp is too old to know them: nonsuch"]


def test_kernel_without_filters_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_filter: pyseccomp.SyscallFilter) -> None:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(pyseccomp.SyscallFilter, "load", fail)
    assert not seccomp.restrict()
    assert caplog.messages == ["system calls are not restricted: libseccomp: Invalid argument"]
