"""What each request of the control socket does (docs/protocol.md).

Concurrency: a handler runs in its connection's task. A `Lease` hangs on the connection that asked for it and is given
back, without a checkpoint, when that connection ends.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import trio

from uenvd import __version__, mounts, protocol
from uenvd.cache.store import Level, Store
from uenvd.config import Config
from uenvd.daemon import disk, known, requests
from uenvd.daemon.access import Access
from uenvd.daemon.cached import Cached, records, user_of
from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.control import Answer, Connection
from uenvd.daemon.journal import Journal
from uenvd.daemon.leases import Lease, Leases
from uenvd.daemon.observe import Observer
from uenvd.daemon.promises import Promises
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image, Question
from uenvd.daemon.requests import Wanted
from uenvd.daemon.served import Served, ServedImages
from uenvd.errors import (
    LimitExceeded,
    MountConflict,
    SessionError,
    StorageError,
    UsageError,
)
from uenvd.label import parse_namespaced_label
from uenvd.protocol import Request
from uenvd.views import ImageMeta, ops_to_wire

log = logging.getLogger(__name__)

_MOUNT_BUDGET_S: Final = 2.0
_SLOW_BUDGET_S: Final = 30.0
_SHOWN_DEPRECATIONS: Final = 5


class Service:
    """The operations. One object a daemon."""

    def __init__(
        self, config: Config, *, catalogue: Catalogue, store: Store, pulls: Pulls, served: ServedImages
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._store = store
        self._pulls = pulls
        self._served = served
        self._leases = Leases(served, catalogue.remote, config.limits)
        self._promises = Promises(config.run_dir / "promises.jsonl")
        self._pulls_of: Counter[int] = Counter()
        self._access = Access(config.access)
        self._cached = Cached(config, store, served, self._access)
        self.connections: Callable[[], int] = lambda: 0
        self.observer = Observer(
            store=store, served=served, leases=self._leases, journal=Journal(config.state_dir)
        )
        self.observer.watch_connections(lambda: self.connections())

    async def handle(self, connection: Connection, request: Request) -> Answer:
        """Carry one request out. Raises errors of the tree, which become its final frame."""
        match request.op:
            case "resolve":
                return await self._resolve(connection, request)
            case "mount":
                return await self._mount(connection, request)
            case "wait":
                return await self._wait(connection, request)
            case "trace":
                return self._trace(connection, request)
            case "idmap":
                return await self._idmap(connection)
            case "pull":
                return await self._pull(connection, request)
            case "find":
                return await self._find(connection, request)
            case "images":
                return await self._cached.images(connection, request)
            case "inspect":
                return await self._inspect(connection, request)
            case "recipe":
                return await self._recipe(connection, request)
            case "status":
                return await self._status(connection)
            case "metrics":
                return await self.observer.metrics()
            case "job":
                return await self.observer.job(connection, request)
            case "evict":
                return await self._cached.evict(connection, request)
            case _:
                return await self._cached.pin(connection, request)

    # --- labels -----------------------------------------------------------------------------------------------------

    async def _resolve(self, connection: Connection, request: Request) -> Answer:
        question = await self._question(connection, request)
        job = request.job[0] if request.job is not None and connection.peer.is_root else None
        text = self._promises.recall(job, request.uenv, request.cwd) or request.uenv
        images = await requests.look_up(self._catalogue, text, request.cwd, question)
        views = requests.wanted_views(request.view)
        metas = [wanted.meta for wanted in images]
        if all(wanted.mount is not None for wanted in images):
            requests.mount_points(images, metas, None)
        if all(meta is not None for meta in metas):
            requests.environment(images, metas, views)
        resolved = ",".join(str(wanted.pinned) for wanted in images)
        if self._promises.keep(job, request.uenv, request.cwd, resolved):
            with suppress(
                StorageError
            ):  # the job gets its answer, remembered only as long as this daemon runs
                await disk.call(self._promises.save)
        if request.submit:
            for wanted in images:
                if wanted.image is not None:
                    self._pulls.prefetch(self._catalogue.remote, wanted.image)
        return Answer(
            protocol.success(
                resolved=resolved,
                images=[await self._describe(wanted) for wanted in images],
                notes=question.notes,
            )
        )

    async def _describe(self, wanted: Wanted) -> dict[str, Any]:
        image = wanted.image
        return {
            "label": wanted.label,
            "digest": wanted.digest,
            "mount": wanted.mount,
            "size_bytes": image.layer.size_bytes if image else None,
            "cached": await self._is_cached(image) if image else True,
            "views": [view.name for view in wanted.meta.views] if wanted.meta else None,
            "default_view": wanted.meta.default_view if wanted.meta else None,
        }

    async def _is_cached(self, image: Image) -> bool:
        return await disk.call(self._store.has, image.layer.digest)

    async def _find(self, connection: Connection, request: Request) -> Answer:
        question = await self._question(connection, request, _SLOW_BUDGET_S)
        question.remembered_only = request.remembered
        wanted = parse_namespaced_label(request.uenv)
        listed = await self._catalogue.listing(wanted, question)
        for one in [one for one in listed if one.deprecated][:_SHOWN_DEPRECATIONS]:
            question.note(f"{one.found.label._replace(namespace=None)} is deprecated: {one.deprecated}")
        age_s = question.oldest_s
        return Answer(
            protocol.success(records=await records(self._store, listed), notes=question.notes, age_s=age_s)
        )

    async def _inspect(self, connection: Connection, request: Request) -> Answer:
        question = await self._question(connection, request)
        question.remembered_only = request.remembered
        wanted = await self._one(request, question)
        image = wanted.image
        if image is None:
            raise UsageError("uenvd inspects images of the registry only", hint="uenvctl reads a file itself")
        read = next((served.meta for served in self._served if served.digest == wanted.digest), None)
        meta = wanted.pinned_meta or read or wanted.meta
        uarch = image.found.repository.label.uarch
        architecture = (image.config.architecture if image.config else None) or self._config.architecture_of(
            uarch
        )
        return Answer(
            protocol.success(
                label=wanted.label,
                digest=wanted.digest,
                size_bytes=image.layer.size_bytes,
                cached=await self._is_cached(image),
                date=_date(image),
                mount=meta.mount if meta else None,
                description=meta.description if meta else None,
                default_view=meta.default_view if meta else None,
                views=[{"name": view.name, "description": view.description} for view in meta.views]
                if meta
                else None,
                architecture=architecture,
                **await known.evidence(self._catalogue, image, question),
                annotations=dict(image.manifest.annotations),
                notes=question.notes,
            )
        )

    async def _recipe(self, connection: Connection, request: Request) -> Answer:
        question = await self._question(connection, request)
        wanted = await self._one(request, question)
        if wanted.image is None:
            raise UsageError(
                "uenvd reads the recipes of images of the registry only", hint="look into the file"
            )
        files = await known.recipe(self._catalogue, wanted.image, question)
        return Answer(
            protocol.success(label=wanted.label, digest=wanted.digest, files=files, notes=question.notes)
        )

    async def _one(self, request: Request, question: Question) -> Wanted:
        images = await requests.look_up(self._catalogue, request.uenv, request.cwd, question)
        if len(images) != 1:
            raise UsageError(f"'{request.uenv}' names {len(images)} images where one is expected")
        return images[0]

    # --- mounts -----------------------------------------------------------------------------------------------------

    async def _question(
        self, connection: Connection, request: Request, budget_s: float | None = None
    ) -> Question:
        """Begin a request for the user whom it is for. Raises `AccessDenied` when the peer may not speak for him."""
        owner = await user_of(connection, request)
        question = self._catalogue.question(refresh=request.refresh, budget_s=budget_s)
        question.permit = await self._access.permit(owner)
        return question

    async def _mount(self, connection: Connection, request: Request) -> Answer:
        question = await self._question(connection, request, _MOUNT_BUDGET_S)
        owner = question.owner or connection.peer.identity
        images = await requests.look_up(self._catalogue, request.uenv, request.cwd, question)
        requests.refuse_foreign(self._config, images)
        views = requests.wanted_views(request.view)
        metas = [wanted.meta for wanted in images]
        points = requests.mount_points(images, metas, self._config.mount_points[0])
        order = sorted(range(len(images)), key=lambda index: points[index])
        images, points = [images[index] for index in order], [points[index] for index in order]
        lease = Lease(owner, images, views, points, request.job)
        self._leases.begin(lease)
        connection.on_close.append(lambda: self._end(lease))
        clones: list[int] = []
        try:
            await self.observer.began(lease, [one for one in lease.served if one.state == "opening"])
            for served in lease.served:
                clones.append(await self._served.clone(served))
            env, applied = self._environment(lease) if lease.ready else (None, "")
        except BaseException:
            for clone in clones:
                os.close(clone)
            self._end(lease)
            raise
        log.info(
            "uid %d mounts %s%s", owner.uid, request.uenv, f" for job {request.job[0]}" if request.job else ""
        )
        return Answer(
            protocol.success(
                lease=lease.name,
                state="ready" if lease.ready else "waiting",
                mounts=[
                    {
                        "mount": point,
                        "digest": wanted.digest,
                        "label": wanted.label,
                        "source": served.mount_source,
                        "guard": "listed" if requests.is_listed(self._config, point) else "owned",
                    }
                    for wanted, served, point in zip(lease.images, lease.served, lease.points, strict=True)
                ],
                env=env,
                applied=applied,
                notes=[*question.notes, *(lease.notes if lease.ready else ())],
            ),
            clones,
        )

    def _environment(self, lease: Lease) -> tuple[list[list[Any]], str]:
        """Work out the views of a lease whose images are all served; what was not known before is checked now."""
        metas = [
            _best_meta(wanted, served) for wanted, served in zip(lease.images, lease.served, strict=True)
        ]
        points = requests.mount_points(lease.images, metas, None)
        for wanted, meant, used in zip(lease.images, points, lease.points, strict=True):
            if meant != used:
                raise MountConflict(
                    f"'{wanted.label}' is made for {meant}, which could not be known before it was pulled; it was put at {used}",
                    hint=f"say so in the request: {wanted.description}:{meant}",
                )
        ops, applied = requests.environment(lease.images, metas, lease.views)
        self.observer.usable(lease, applied)
        return ops_to_wire(ops), applied

    def _end(self, lease: Lease) -> None:
        self._leases.end(lease)
        self.observer.ended(lease)

    def _lease(self, connection: Connection, request: Request) -> Lease:
        lease = self._leases.get(request.lease)
        if lease is None or connection.peer.identity.uid not in (0, lease.owner.uid):
            raise SessionError(
                "there is no such lease", hint="the connection that asked for the mount must stay open"
            )
        return lease

    def _trace(self, connection: Connection, request: Request) -> Answer:
        """Say which bytes of its images were read, in order: of those that were started before their pull ended."""
        traces = [
            {"digest": served.digest, "ranges": served.lazy.reads()}
            for served in self._lease(connection, request).served
            if served.lazy is not None
        ]
        return Answer(protocol.success(traces=traces))

    async def _wait(self, connection: Connection, request: Request) -> Answer:
        lease = self._lease(connection, request)
        while not lease.ready:
            for served in lease.served:
                if served.error is not None:
                    raise served.error
                if served.state == "gone":
                    raise SessionError(f"{served.label} is not served any more")
            # Taken before the next checkpoint: what happens while the event is being sent must not be missed.
            changed = next(served for served in lease.served if served.state != "serving").changed
            await connection.send(_progress(lease))
            with trio.move_on_after(protocol.HEARTBEAT_S):
                await changed.wait()
        env, applied = self._environment(lease)
        return Answer(protocol.success(env=env, applied=applied, notes=lease.notes))

    async def _idmap(self, connection: Connection) -> Answer:
        peer = connection.peer
        try:
            process = await trio.to_thread.run_sync(mounts.open_process, peer.pid)
        except OSError as error:
            raise SessionError(f"the process {peer.pid} that asked is gone") from error
        try:
            # The directory pins the process: if it is alive and owned by the peer's uid now, it is the peer or another process
            # of the same user, and the map grants that user nothing that he does not have.
            if os.fstat(process).st_uid != peer.identity.uid:
                raise SessionError(f"the process {peer.pid} has another user now")
            gids = [peer.identity.gid, *peer.identity.groups]
            await trio.to_thread.run_sync(mounts.write_id_maps, process, peer.identity.uid, gids)
        finally:
            os.close(process)
        return Answer(protocol.success())

    # --- the cache --------------------------------------------------------------------------------------------------

    async def _pull(self, connection: Connection, request: Request) -> Answer:
        uid = connection.peer.identity.uid
        if uid != 0 and self._pulls_of[uid] >= self._config.limits.pulls:
            raise LimitExceeded(f"uid {uid} has {self._pulls_of[uid]} pulls under way on this node")
        self._pulls_of[uid] += 1
        try:
            question = await self._question(connection, request, _SLOW_BUDGET_S)
            images = await requests.look_up(self._catalogue, request.uenv, request.cwd, question)
            for wanted in images:
                if wanted.image is not None:
                    await self._pull_one(connection, wanted.label, wanted.image)
            described = [await self._describe(wanted) for wanted in images]
            return Answer(protocol.success(images=described, notes=question.notes))
        finally:
            self._pulls_of[uid] -= 1

    async def _pull_one(self, connection: Connection, label: str, image: Image) -> None:
        if not await self._is_cached(image):
            async with self._pulls.join(self._catalogue.remote, image) as pull:
                while not pull.ended.is_set():
                    await connection.send(
                        _pulling(label, pull.done_bytes, image.layer.size_bytes, pull.rate_bytes_per_s)
                    )
                    with trio.move_on_after(protocol.HEARTBEAT_S):
                        await pull.ended.wait()
                if pull.error is not None:
                    raise pull.error
        await self._pulls.record(image)

    async def _status(self, connection: Connection) -> Answer:
        """Say what is served. Files and leases of others are root's business only."""
        uid = connection.peer.identity.uid

        permit = await self._access.permit(connection.peer.identity)

        def is_visible(served: Served) -> bool:
            if served.owner is not None:
                return uid in (0, served.owner.uid)
            repository = served.repository
            return permit.allows(repository.label) if repository is not None else uid == 0

        levels = await disk.call(self._store.levels)
        return Answer(
            protocol.success(
                version=__version__,
                system=self._config.system,
                uarch=self._config.uarch,
                registry=str(self._catalogue.remote.address),
                mount_points=list(self._config.mount_points),
                images=[
                    {
                        "digest": served.digest,
                        "label": served.label,
                        "state": served.state,
                        "leases": served.leases,
                        "done_bytes": served.arrived_bytes,
                        "total_bytes": served.total_bytes,
                        "worker": served.worker.pid if served.worker else None,
                        "workers": list(served.worker.worker_pids) if served.worker else [],
                    }
                    for served in self._served
                    if is_visible(served)
                ],
                leases=[
                    {
                        "uid": lease.owner.uid,
                        "labels": [wanted.label for wanted in lease.images],
                        "job": lease.job,
                    }
                    for lease in self._leases
                    if uid in (0, lease.owner.uid)
                ],
                cache=_level(levels[0]) | {"levels": [_level(level) for level in levels]},
                connections=self.connections(),
                metrics=self.observer.summary(),
            )
        )


def _level(level: Level) -> dict[str, Any]:
    return {
        "name": level.name,
        "path": str(level.path),
        "used_bytes": level.used_bytes,
        "free_bytes": level.free_bytes,
        "quota_bytes": level.quota_bytes,
        "error": level.error,
    }


def _best_meta(wanted: Wanted, served: Served) -> ImageMeta | None:
    """Prefer what the config blob tells (pinned by the digest that was asked for), then what the worker read, then an attachment."""
    return wanted.pinned_meta or served.meta or wanted.meta


def _progress(lease: Lease) -> protocol.Frame:
    waiting: Sequence[Served] = [served for served in lease.served if served.state != "serving"]
    done = sum(served.done_bytes for served in waiting)
    total = sum(served.total_bytes for served in waiting)
    first = waiting[0]
    if first.state == "pulling":
        return _pulling(first.label, done, total, sum(served.rate_bytes_per_s for served in waiting))
    return protocol.progress("start", done, total, f"starting {first.label}")


def _pulling(label: str, done_bytes: int, total_bytes: int, rate_bytes_per_s: float) -> protocol.Frame:
    text = f"pulling {label}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
    frame = protocol.progress("pull", done_bytes, total_bytes, text, rate_bytes_per_s)
    if "eta_s" in frame:
        frame["message"] += f", {rate_bytes_per_s / 1e6:.0f} MB/s, {_duration(frame['eta_s'])} left"
    return frame


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _date(image: Image) -> str | None:
    created = image.manifest.annotations.get("org.opencontainers.image.created")
    return created or (image.config.created if image.config else None)
