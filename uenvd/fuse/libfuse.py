"""An image served through libfuse: one session a process, and what a supervised process of that kind does from its setup to its end."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import socket
from contextlib import suppress
from functools import partial
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
    """Wait for the setup, confine, report, serve (`uenvd.handover`). Returns the exit status."""
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
        serve_session(terminate_on_signal=False)
    except Exception:  # noqa: BLE001 - the boundary
        _log.exception("%s: the worker ends", name)
        return 1
    return 0


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


def serve_session(*, terminate_on_signal: bool) -> None:
    """Serve the session of this process until its end; ``terminate_on_signal``: or until SIGINT, SIGTERM, SIGHUP."""
    trio.run(partial(serve, terminate_on_signal=terminate_on_signal))


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
