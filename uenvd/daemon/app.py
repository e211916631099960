"""The daemon's life: what is set up in which order, the nursery, the end.

Order matters: the private mount namespace is entered while the process has one thread; READY is said only when the
socket answers. The end is a cancellation: workers and clones in use go on, everything else is given back.
"""

from __future__ import annotations

import gc
import logging
import os
import pwd
import resource
import signal
import socket
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Final

import trio

from uenvd.cache.leases import node_name
from uenvd.cache.store import Store
from uenvd.config import Config
from uenvd.daemon import adoption, disk, exporter
from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.control import ControlServer
from uenvd.daemon.lazies import Lazies
from uenvd.daemon.mounter import Mounter
from uenvd.daemon.notify import Inherited, Notifier, inherited
from uenvd.daemon.peer import Identity
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.rundir import ImageDirectory
from uenvd.daemon.servedimages import ServedImages
from uenvd.daemon.servers import Servers
from uenvd.daemon.service import Service
from uenvd.daemon.upkeep import Upkeep, pull_again
from uenvd.errors import ConfigError, InUse, ResourceMissing, StorageError
from uenvd.mounts import PrivateMounts
from uenvd.oci.credentials import forbid_core_dumps
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote

log = logging.getLogger(__name__)

_BACKLOG: Final = 128
SWITCH_S: Final = 0.0005
PREPARE_S: Final = 12.0
"""How long the start waits for a directory of the cache."""


def run(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises errors of the tree when it cannot begin."""
    if os.geteuid() != 0:
        raise ResourceMissing(
            "uenvd has to run as root", hint="without it, uenvctl run ./image.squashfs works for everybody"
        )
    worker = _worker_identity(config.worker_user)
    forbid_core_dumps(private=True)
    _raise_descriptor_limit()
    config.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    passed = inherited()
    listener = passed.listener or _listen(config.socket)
    with listener:
        private = PrivateMounts.create(config.run_dir / "mnt")
        try:
            trio.run(_serve, config, listener, passed, private, worker, strict_exception_groups=True)
        finally:
            private.close()


async def _serve(
    config: Config, listener: socket.socket, passed: Inherited, private: PrivateMounts, worker: Identity
) -> None:
    store = Store.from_config(config.cache, node_name(config.run_dir))
    await _prepare(store)
    remote = open_remote(
        parse_registry(config.registry.url),
        auth_file=config.registry.auth_file,
        ca_file=config.registry.ca_file,
        timeout_read_s=config.registry.timeout_s,
        token_file=config.registry.token_file,
        username=config.registry.username,
        mirrors=[parse_registry(url) for url in config.registry.mirrors],
        mirrors_resolve=config.registry.mirrors_resolve,
    )
    notifier = Notifier()
    mounter = Mounter(private)
    directory = ImageDirectory(config.run_dir / "images")
    try:
        await mounter.start()
        async with trio.open_nursery() as nursery:
            pulls = Pulls(nursery, store, config.pull)
            lazies = Lazies(nursery, store, pulls, remote, config.pull)
            servers = Servers(
                nursery,
                config.serving,
                directory=directory,
                mounter=mounter,
                notifier=notifier,
                open_blob=lazies.open,
            )
            served = ServedImages(
                nursery,
                store=store,
                pulls=pulls,
                lazies=lazies,
                mounter=mounter,
                servers=servers,
                worker_identity=worker,
                worker_cache_bytes=config.worker_cache_bytes,
                linger_s=config.linger_s,
            )
            nursery.start_soon(_stop_on_signal, nursery.cancel_scope, notifier, served)
            for adopted in await adoption.find(directory, passed.stored, resend=config.serving.resend):
                await served.adopt(adopted)
            catalogue = Catalogue(config, remote, store)
            service = Service(config, catalogue=catalogue, store=store, pulls=pulls, served=served)
            server = ControlServer(
                service.handle, connections_per_user=config.limits.connections, at_once=service.at_once
            )
            service.connections = lambda: server.connections
            await nursery.start(server.serve, listener)
            nursery.start_soon(service.observer.journal.run)
            repull = partial(pull_again, store, pulls, remote)
            nursery.start_soon(Upkeep(store, config.cache, served, repull=repull).run)
            if config.metrics_port is not None:
                port = await nursery.start(exporter.serve, config.metrics_port, service.observer.text)
                log.info("metrics: http://127.0.0.1:%d/metrics", port)
            nursery.start_soon(notifier.watchdog)
            log.info("serving system %s from %s on %s", config.system, remote.address, config.socket)
            settle()
            notifier.ready(f"serving {config.system} from {remote.address}")
    finally:
        mounter.close()
        directory.close()
        remote.close()
        log.info("stopped")


async def _prepare(store: Store) -> None:
    """Make the directories of the cache ready. Raises `StorageError`, but not for one that does not answer: that is done when it does."""
    for directory in store.writable:
        with trio.move_on_after(PREPARE_S) as waiting:
            await trio.to_thread.run_sync(store.prepare, directory, abandon_on_cancel=True)
        if waiting.cancelled_caught:
            log.error(
                "%s: the file system has not answered for %g s; uenvd begins without it",
                directory.root,
                PREPARE_S,
            )
    try:
        freed_bytes = await disk.call(store.collect)
    except StorageError as error:
        log.warning("%s", error)
    else:
        if freed_bytes:
            log.info("removed %d bytes that no image of the cache needs", freed_bytes)


async def _stop_on_signal(scope: trio.CancelScope, notifier: Notifier, served: ServedImages) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: stopping; running mounts go on", signal.Signals(number).name)
            notifier.stopping()
            served.prepare_stop()
            scope.cancel()
            return


def settle() -> None:
    """Prepare the interpreter for years of short requests beside threads that move gigabytes.

    What start-up has made is never looked at by the garbage collector again, whose full rounds stop a request for milliseconds. And a
    request that wakes up waits for a busy thread to let go of the interpreter no longer than `SWITCH_S`, a tenth of Python's default.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)


def _worker_identity(name: str) -> Identity:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            f"worker.user: there is no user {name!r}",
            hint="systemd-sysusers makes it from sysusers.d/uenvd.conf",
        ) from None
    if entry.pw_uid == 0:
        raise ConfigError("worker.user: workers parse untrusted images and may not be root")
    return Identity(entry.pw_uid, entry.pw_gid, ())


def _raise_descriptor_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(path: Path) -> socket.socket:
    """Bind the control socket, replacing one that a dead daemon left. Raises `InUse`, `ConfigError`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
                else:
                    raise InUse(
                        f"another uenvd serves {path}",
                        hint="stop it first, or configure another control.socket",
                    )
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"control.socket: cannot listen on {path}: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener
