"""A file server and nodes that are its clients, each with a kernel client of its own: for tests of a shared cache on a real network file system.

All on one machine, which is thrown away afterwards: the guest that ``scripts/netfs.py`` starts. The server is the kernel's NFS server on an
ext4 image. A `Node` is a process in its own network, mount, pid and UTS namespace, with a boot id of its own: the kernel keeps the NFS clients
of two network namespaces apart as it does those of two machines (connections, leases, delegations, attributes, names, pages), and what is said
of "this boot" is not true of the others. A node runs functions for a test, each in a thread; functions and results travel pickled, so both
belong to test modules.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

EXPORT: Final = Path("/srv/uenvd-netfs")
SHARED: Final = Path("/shared")
"""Where each node mounts the export."""
USER: Final = 4711
"""Who the cache belongs to; the server takes root for nobody."""
USER_NAME: Final = "uenvd-netfs"
_BRIDGE: Final = "uenvd0"
SERVER: Final = "10.99.0.1"
_NEW: Final = 0x00020000 | 0x04000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID, CLONE_NEWNET: include/uapi/linux/sched.h."""
_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str | Path) -> str:
    """Run a command that has to succeed; return what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


class Server:
    """The kernel's NFS server: versions 3 and 4, root squashed, on an ext4 of ``size_mib``."""

    def __init__(self, size_mib: int = 160) -> None:
        self._image = Path(tempfile.gettempdir()) / "uenvd-netfs.img"
        with self._image.open("wb") as file:
            file.truncate(size_mib << 20)
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", "-O", "^has_journal", self._image)
        EXPORT.mkdir(parents=True, exist_ok=True)
        run("mount", "-o", "loop", self._image, EXPORT)
        EXPORT.chmod(0o755)
        run("ip", "link", "add", _BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{SERVER}/24", "dev", _BRIDGE)
        run("ip", "link", "set", _BRIDGE, "up")
        for path in (
            "/run/rpcbind",
            "/var/lib/nfs/rpc_pipefs",
            "/var/lib/nfs/v4recovery",
            "/run/sendsigs.omit.d",
        ):
            Path(path).mkdir(parents=True, exist_ok=True)
        Path("/var/lib/nfs/etab").touch()
        Path("/var/lib/nfs/rmtab").touch()
        with suppress(AssertionError):
            run("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        # How long a server that was started again waits for the clients of the former one: as short as it lets itself be told.
        for name in ("nfsv4gracetime", "nfsv4leasetime"):
            Path(f"/proc/fs/nfsd/{name}").write_text("10\n")
        run("rpcbind", "-w")
        run("rpc.mountd")
        self.start()

    def export(self, *options: str) -> None:
        """Export the directory anew, with further options."""
        words = ",".join(("rw", "root_squash", "no_subtree_check", "insecure", "fsid=0", *options))
        run("exportfs", "-o", words, f"10.99.0.0/24:{EXPORT}")

    def start(self) -> None:
        """Answer (again)."""
        self.export()
        run("rpc.nfsd", "4")

    def stop(self) -> None:
        """Stop answering, as a server does that is started anew: clients wait (hard mounts)."""
        run("rpc.nfsd", "0")

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        run("exportfs", "-ua")
        run("umount", "-l", EXPORT)
        run("ip", "link", "del", _BRIDGE)
        self._image.unlink()


class RemoteError(AssertionError):
    """A function on a node ended with an exception that cannot be sent: its traceback."""


class Node:
    """A client of the server; see the module. ``options`` are those of mount(8) for NFS."""

    def __init__(self, number: int, options: str) -> None:
        self.name = f"node{number}"
        self._waiting: dict[int, Answer] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._near, far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._outer = os.fork()
        if self._outer == 0:
            self._near.close()
            _be_node(self.name, far)
        far.close()
        pid = int(self._near.recv(64))
        self.link = f"u{number}"
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        run("ip", "link", "set", self.link, "master", _BRIDGE, "up")
        self._near.send(b"net")
        threading.Thread(target=self._receive, daemon=True).start()
        self.do(_settle, f"10.99.0.{10 + number}", options)

    def connected(self, up: bool) -> None:
        """Pull the network cable, or put it in again."""
        run("ip", "link", "set", self.link, "up" if up else "down")

    def begin(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Answer:
        """Start a function on the node."""
        answer = Answer()
        with self._lock:
            self._number += 1
            self._waiting[self._number] = answer
            self._near.send(pickle.dumps((self._number, function, args, kwargs)))
        return answer

    def do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function on the node and return its result; its exception is raised here. 60 s."""
        result: T = self.begin(function, *args, **kwargs).result()
        return result

    def _receive(self) -> None:
        while message := self._near.recv(4 << 20):
            number, good, value = pickle.loads(message)
            with self._lock:
                answer = self._waiting.pop(number)
            answer.good, answer.value = good, value
            answer.done.set()

    def close(self) -> None:
        """End its processes, its mounts and its network."""
        with suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)
        # The first process of a pid namespace takes all others with it; the mount and network namespaces end with them.
        os.waitpid(self._outer, 0)
        self._near.close()
        subprocess.run(["ip", "link", "del", self.link], check=False, capture_output=True)


class Answer:
    """The result of a function that runs on a node."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.good = False
        self.value: Any = None

    def result(self, patience_s: float = 60.0) -> Any:
        """Return it, or raise what the function raised."""
        assert self.done.wait(patience_s), f"no answer of the node within {patience_s:g} s"
        if not self.good:
            raise self.value
        return self.value


@contextmanager
def nodes(count: int, options: str) -> Iterator[list[Node]]:
    """So many nodes with the export mounted at `SHARED`."""
    made: list[Node] = []
    try:
        for number in range(count):
            made.append(Node(number, options))
        yield made
    finally:
        for node in made:
            node.close()


def _settle(address: str, options: str) -> None:
    run("ip", "link", "set", "lo", "up")
    run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    SHARED.mkdir(exist_ok=True)
    source = f"{SERVER}:/" if "vers=4" in options else f"{SERVER}:{EXPORT}"
    end_s = time.monotonic() + 60.0
    while True:  # a server that was just started may still be waiting for former clients
        try:
            run("mount", "-t", "nfs", "-o", options, source, SHARED)
        except AssertionError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.2)
        else:
            return


def _be_node(name: str, far: socket.socket) -> None:
    status = 1
    try:
        if _libc.unshare(_NEW):
            raise OSError(ctypes.get_errno(), "unshare")
        inner = os.fork()
        if inner:
            far.close()
            os.waitpid(inner, 0)
            status = 0
        else:
            _first_process(name, far)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _first_process(name: str, far: socket.socket) -> None:
    """Be process 1 of the node: do what is asked, in threads, and collect the dead."""
    socket.sethostname(name)
    run("mount", "--make-rprivate", "/")
    far.send(os.readlink("/proc/self").encode())  # the number that the others know
    run("mount", "-t", "proc", "proc", "/proc")
    boot = Path(tempfile.gettempdir()) / f"uenvd-netfs-boot-{name}"
    boot.write_text(f"{secrets.token_hex(4)}-0000-4000-8000-{secrets.token_hex(6)}\n")
    run("mount", "--bind", boot, "/proc/sys/kernel/random/boot_id")
    boot.unlink()
    far.recv(16)
    lock = threading.Lock()

    def work(number: int, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        good, value = True, None
        try:
            value = function(*args, **kwargs)
        except BaseException as error:
            good, value = False, error
            error.add_note(traceback.format_exc())
        try:
            message = pickle.dumps((number, good, value))
            pickle.loads(message)
        except Exception:
            message = pickle.dumps((number, False, RemoteError(f"{value!r}")))
        with lock:
            far.send(message)

    while message := far.recv(4 << 20):
        threading.Thread(target=work, args=pickle.loads(message), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
