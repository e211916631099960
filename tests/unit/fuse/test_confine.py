"""What a worker can no longer do after `confine`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.fusetools import NOBODY, SOMEBODY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="starts processes as root and as other users")

REPORT = """
import json, os, resource, signal, sys
from uenvd.fuse.confine import capability_sets, confine
from uenvd.fuse.seccomp import Policy, restrict
a, b = os.pipe()
confine(policy=None, **eval(sys.argv[1]))
caps, cwd = capability_sets(), os.getcwd()
restrict(Policy.SUPERVISOR)  # the one under which /proc can be read
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def attempt(function, *args):
    try: function(*args)
    except OSError as error: return error.errno
    return 0
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print(json.dumps({
    "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
    "caps": caps, "bounding": int(status["CapBnd"], 16), "ambient": int(status["CapAmb"], 16),
    "nnp": status["NoNewPrivs"].strip(), "filter": status["Seccomp"].strip(), "cwd": cwd, "sid": os.getsid(0) == os.getpid(),
    "core": resource.getrlimit(resource.RLIMIT_CORE), "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    "space": resource.getrlimit(resource.RLIMIT_AS)[1],
    "ignored": [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)],
    "open": [is_open(fd) for fd in (0, 1, 2, a, b)],
    "setuid": attempt(os.setuid, 0), "mem": attempt(open, "/proc/self/mem"), "chroot": attempt(os.chroot, "/"),
}))
"""


WITHOUT_LIBSECCOMP = "import ctypes.util\nctypes.util.find_library = {'c': 'libc.so.6'}.get\n"
WITHOUT_PYSECCOMP = "import sys\nsys.modules['pyseccomp'] = None\n"


def confined(arguments: str, *, prelude: str = "", log: str = "", **popen: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", prelude + REPORT, arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        **popen,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == log
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_doors(told: dict[str, Any]) -> None:
    assert told["caps"] == [0, 0, 0]
    assert told["ambient"] == 0
    assert told["nnp"] == "1"
    assert told["cwd"] == "/"
    assert told["core"] == [0, 0]
    assert told["files"] <= 1024
    assert told["space"] > 0
    assert told["ignored"] == [True] * 4
    assert told["open"] == [True, True, True, False, False]
    assert told["setuid"] == told["chroot"] == 1


def test_from_root_to_an_unprivileged_user() -> None:
    told = confined(f"dict(uid={NOBODY}, gid={SOMEBODY}, groups=(7, 8))")
    assert told["ids"] == [[NOBODY] * 3, [SOMEBODY] * 3, [7, 8]]
    assert told["bounding"] == 0
    assert told["sid"]
    assert told["filter"] == "2"
    check_doors(told)


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [
        (WITHOUT_LIBSECCOMP, "Unable to find libseccomp"),
        (WITHOUT_PYSECCOMP, "import of pyseccomp halted; None in sys.modules"),
    ],
)
def test_without_libseccomp_all_but_the_filter(prelude: str, reason: str) -> None:
    log = f"system calls are not restricted: {reason}\n"
    told = confined(f"dict(uid={NOBODY}, gid={SOMEBODY}, groups=(7, 8))", prelude=prelude, log=log)
    assert told["filter"] == "0"
    assert told["ids"] == [[NOBODY] * 3, [SOMEBODY] * 3, [7, 8]]
    assert told["bounding"] == 0
    assert told["sid"]
    check_doors(told)


def test_root_that_stays_root_has_no_capabilities() -> None:
    told = confined("dict()")
    assert told["bounding"] == 0
    assert told["caps"] == [0, 0, 0]
    assert told["chroot"] == 1


def test_an_ordinary_user_shuts_the_same_doors() -> None:
    told = confined("dict()", user=NOBODY, group=NOBODY, extra_groups=[])
    assert told["ids"][0] == [NOBODY] * 3
    check_doors(told)


def test_an_ordinary_user_may_name_himself() -> None:
    told = confined(f"dict(uid={NOBODY}, gid={NOBODY})", user=NOBODY, group=NOBODY, extra_groups=[])
    check_doors(told)


def test_what_is_kept_stays_open() -> None:
    assert confined("dict(keep=frozenset({b}))")["open"] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (f"dict(uid={SOMEBODY}, gid={SOMEBODY})", "dropping privileges: Operation not permitted"),
        (f"dict(uid={SOMEBODY})", "uid but no gid"),
        ("dict(mount_namespace_fd=a)", "entering the mount namespace: Invalid argument"),
    ],
)
def test_failure_is_an_error_not_a_half_confined_worker(arguments: str, reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT, arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    assert done.returncode == 1
    assert "WorkerFailed" in done.stderr
    assert reason in done.stderr
