"""uenvd-fs: the process that serves one squashfs image.

``uenvd-fs IMAGE MOUNTPOINT [-f] [-o OPTION,...]`` mounts and serves an image by itself, as ``squashfuse_ll`` does; `uenvd.fuse.standalone`.

``--supervised FD`` is for a parent that made the mount (the daemon, or uenvctl); `uenvd.handover` is the contract. Such a process may be
started long before it is needed: it loads everything first and then waits for its setup. EOF in place of a setup ends it, status 0. It
confines itself before it looks at the image, reports once, and serves until the kernel says ENODEV: status 0.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from uenvd import mounts
from uenvd.errors import InternalError, StorageError, UenvError, WorkerFailed
from uenvd.fuse.bounds import data_limit_bytes
from uenvd.fuse.confine import acting_as, confine
from uenvd.fuse.faults import Faults
from uenvd.fuse.opening import LATE_MODULES, open_image, open_tree, read_meta
from uenvd.fuse.pyfuse3_ops import Operations, serve
from uenvd.fuse.seccomp import Policy, restrict
from uenvd.fuse.tree import Tree
from uenvd.handover import WorkerReport, WorkerSetup, receive_setup

_log = logging.getLogger("uenvd-fs")


def supervised(channel: socket.socket) -> int:
    """Wait for the setup, confine, report, serve. Returns the exit status."""
    for module in LATE_MODULES:
        with suppress(ImportError):  # images that need it say so; the others do not
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    if not channel.recv(1, socket.MSG_PEEK):
        return 0
    try:
        try:
            setup, descriptors = receive_setup(channel)
            tree, name = _prepare(channel, setup, descriptors)
            notes: list[str] = []
            report = WorkerReport(meta=read_meta(tree, notes), notes=tuple(notes))
            faults = Faults(name)
            fuse = descriptors["fuse"]
            session(Operations(tree, faults), f"/dev/fd/{fuse}", {"default_permissions"}, fuse)
        except UenvError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read the image: {error.strerror}") from error
        except Exception as error:
            _log.exception("the worker cannot start")
            raise InternalError(f"the worker cannot start: {type(error).__name__}: {error}") from error
    except UenvError as error:
        _report(channel, WorkerReport(error=error))
        return 1
    _report(channel, report)
    try:
        trio.run(_serve_supervised)
    except Exception:  # noqa: BLE001 - the boundary
        _log.exception("%s: the worker ends", name)
        return 1
    return 0


async def _serve_supervised() -> None:
    await serve(terminate_on_signal=False)


def _prepare(channel: socket.socket, setup: WorkerSetup, descriptors: dict[str, int]) -> tuple[Tree, str]:
    if "fuse" not in descriptors or ("image" in descriptors) == (setup.path is not None):
        raise WorkerFailed(
            "the worker's setup must hold the fuse descriptor, and either the image or its path"
        )
    namespace = descriptors.pop("mntns", None)
    path = None if setup.path is None else os.path.abspath(setup.path)  # noqa: PTH100 - the directory is left, links are not ours
    image = descriptors.get("image")
    if path is not None and setup.reader is not None:
        if namespace is not None:
            mounts.setns(namespace, mounts.CLONE_NEWNS)
            namespace = None
        with acting_as(*setup.reader):
            image = open_image(path)
        descriptors["image"] = image
    confine(
        mount_namespace_fd=namespace,
        uid=setup.uid,
        gid=setup.gid,
        groups=setup.groups,
        keep=frozenset({channel.fileno(), *descriptors.values()}),
        cache_bytes=setup.cache_bytes,
        data_bytes=data_limit_bytes(setup.cache_bytes, threads=True),
        policy=None,
    )
    if image is None:
        assert path is not None
        image = open_image(path)
    restrict(Policy.SESSION)  # from here on nothing is opened, and the image is looked at
    tree = open_tree(image, setup.name, mask_privileged=setup.mask_privileged, cache_bytes=setup.cache_bytes)
    return tree, setup.name


def session(operations: Operations, mountpoint: str, options: set[str], device_fd: int | None = None) -> None:
    """Begin the one libfuse session of this process. Raises `WorkerFailed`; libfuse has said why on stderr."""
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise WorkerFailed(f"libfuse cannot serve {mountpoint}: {error}") from error
    operations.watch(_device() if device_fd is None else device_fd)


def _device() -> int:
    """Return the descriptor of ``/dev/fuse`` that libfuse opened, which it does not tell. Raises `WorkerFailed`."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(link.readlink()) == "/dev/fuse":
                return int(link.name)
    raise WorkerFailed("libfuse has opened no /dev/fuse")


def _report(channel: socket.socket, report: WorkerReport) -> None:
    """Send the report; a parent that is gone is no reason not to serve: its mount may be in use."""
    try:
        channel.send(report.encode())
    except OSError as error:
        _log.warning("nobody takes the worker's report: %s", error.strerror)


def main(argv: list[str] | None = None) -> int:
    """Console script."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        if len(arguments) == 2 and arguments[0] == "--supervised" and arguments[1].isdecimal():
            with socket.socket(fileno=int(arguments[1])) as channel:
                return supervised(channel)
        from uenvd.fuse.standalone import run  # a supervised worker does without

        return run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
