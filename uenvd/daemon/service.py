"""What each request of the control socket does (docs/protocol.md).

Concurrency: a handler runs in its connection's task. A `Lease` hangs on the connection that asked for it and is given
back, without a checkpoint, when that connection ends.
"""

from __future__ import annotations

import contextvars
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import trio

from uenvd import mounts, protocol
from uenvd.cache.store import Store
from uenvd.config import Config
from uenvd.daemon import disk, known, requests
from uenvd.daemon.access import Access
from uenvd.daemon.atonce import Answered
from uenvd.daemon.cached import Cached, records, user_at_once, user_of
from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.control import Answer, Connection
from uenvd.daemon.journal import Journal
from uenvd.daemon.leases import Lease, Leases
from uenvd.daemon.noted import PRESENT_S, Presence
from uenvd.daemon.observe import Observer
from uenvd.daemon.peer import Identity
from uenvd.daemon.promises import Promises
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image, Question
from uenvd.daemon.requests import Wanted
from uenvd.daemon.served import Served
from uenvd.daemon.servedimages import ServedImages
from uenvd.daemon.telling import date_of, progress_frame, pull_frame
from uenvd.errors import (
    LimitExceeded,
    MountConflict,
    SessionError,
    StorageError,
    UenvError,
    UsageError,
)
from uenvd.label import ViewName, parse_namespaced_label
from uenvd.protocol import Frame, Request
from uenvd.views import ImageMeta, ops_to_wire

log = logging.getLogger(__name__)

_MOUNT_BUDGET_S: Final = 2.0
_SLOW_BUDGET_S: Final = 30.0
_SHOWN_DEPRECATIONS: Final = 5


class Offer(NamedTuple):
    """What a `mount` is to get: images, views (None: not even default ones) and mount points, outer ones first.

    ``environment`` (operations as in a frame, and their key) where the images' digests vouch for it; else None.
    """

    images: Sequence[Wanted]
    views: tuple[ViewName, ...] | None
    points: Sequence[str]
    environment: tuple[list[list[Any]], str] | None = None


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
        self._presence = Presence(store)
        meanings = catalogue.meanings
        self._resolved: Answered[Frame] = Answered(config, meanings, PRESENT_S)
        self._offers: Answered[Offer] = Answered(config, meanings)
        self._pulls_of: Counter[int] = Counter()
        self._access = Access(config.access)
        self._cached = Cached(config, store, served, self._access)
        self.connections: Callable[[], int] = lambda: 0
        self.observer = Observer(
            config,
            catalogue.remote,
            store=store,
            served=served,
            leases=self._leases,
            journal=Journal(config.state_dir),
            connections=lambda: self.connections(),
        )

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
                permit = await self._access.permit(connection.peer.identity)
                return await self.observer.status(connection, permit)
            case "metrics":
                return await self.observer.metrics()
            case "job":
                return await self.observer.job(connection, request)
            case "evict":
                answer = await self._cached.evict(connection, request)
                self._presence.forget()
                self._resolved.clear()
                return answer
            case _:
                return await self._cached.pin(connection, request)

    def at_once(self, connection: Connection, request: Request) -> Answer | None:
        """Answer a request that was answered a moment ago, where nothing has to be waited for; no checkpoint. None: `handle` it."""
        if request.op == "resolve":
            frame = self._resolved.recall((connection.peer.identity, request))
            return None if frame is None else Answer(frame)
        return self._mount_at_once(connection, request) if request.op == "mount" else None

    # --- labels -----------------------------------------------------------------------------------------------------

    async def _resolve(self, connection: Connection, request: Request) -> Answer:
        question = await self._question(connection, request)
        job = request.job[0] if request.job is not None and connection.peer.is_root else None
        text = self._promises.recall(job, request.uenv, request.cwd) or request.uenv
        images = await requests.look_up(
            self._catalogue, text, request.cwd, question, for_elsewhere=request.submit
        )
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
        described = [await self._describe(wanted, look=not request.submit) for wanted in images]
        frame = protocol.success(resolved=resolved, images=described, notes=question.notes)
        begins_pull = request.submit and self._config.pull.prefetch_on_submit
        if job is None and not begins_pull and all(map(_is_settled, described)):
            self._resolved.keep((connection.peer.identity, request), frame, question)
        return Answer(frame)

    async def _describe(self, wanted: Wanted, *, look: bool = True) -> dict[str, Any]:
        image = wanted.image
        cached: bool | None = None
        if look:
            cached = await self._presence.has(image.layer.digest) if image else True
        return {
            "label": wanted.label,
            "digest": wanted.digest,
            "mount": wanted.mount,
            "size_bytes": image.layer.size_bytes if image else None,
            "cached": cached,
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
                date=date_of(image),
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
        offer = self._offer(images, request)
        lease = Lease(owner, offer.images, offer.views, offer.points, request.job)
        self._leases.begin(lease)
        connection.on_close.append(lambda: self._end(lease))
        clones: list[int] = []
        try:
            await self.observer.began(lease, [one for one in lease.served if one.state == "opening"])
            for served in lease.served:
                clones.append(await self._served.clone(served))
            answer = self._mounted(lease, clones, request, question.notes)
        except BaseException:
            for clone in clones:
                os.close(clone)
            self._end(lease)
            raise
        if lease.ready and all(wanted.pinned_meta is not None for wanted in lease.images):
            known = offer._replace(environment=(answer.frame["env"], answer.frame["applied"]))
            self._offers.keep(_asked_for(owner, request), known, question)
        return answer

    def _offer(self, images: Sequence[Wanted], request: Request) -> Offer:
        """Work out what a request that names these images is to get, outer mount points first."""
        requests.refuse_foreign(self._config, images)
        views = requests.wanted_views(request.view)
        points = requests.mount_points(
            images, [wanted.meta for wanted in images], self._config.mount_points[0]
        )
        order = sorted(range(len(images)), key=lambda index: points[index])
        return Offer([images[index] for index in order], views, [points[index] for index in order])

    def _mount_at_once(self, connection: Connection, request: Request) -> Answer | None:
        """Mount what the same user has asked for before and what is served; None where anything is in the way: `_mount` sees to it."""
        owner = user_at_once(connection, request)
        offer = self._offers.recall(_asked_for(owner, request)) if owner is not None else None
        if owner is None or offer is None:
            return None
        if request.refresh or not all(self._served.is_ready(wanted.digest) for wanted in offer.images):
            return None
        lease = Lease(owner, offer.images, offer.views, offer.points, request.job)
        clones: list[int] = []
        try:
            self._leases.begin(lease)
            for served in lease.served:
                clone = self._served.clone_nowait(served)
                if clone is None:
                    raise LimitExceeded("there is no spare clone")
                clones.append(clone)
            self.observer.joined(lease)
            answer = self._mounted(lease, clones, request, (), offer.environment)
        except BaseException as error:
            for clone in clones:
                os.close(clone)
            self._end(lease)
            if isinstance(error, UenvError):
                return None
            raise
        connection.on_close.append(lambda: self._end(lease))
        return answer

    def _mounted(
        self,
        lease: Lease,
        clones: Sequence[int],
        request: Request,
        notes: Sequence[str],
        environment: tuple[list[list[Any]], str] | None = None,
    ) -> Answer:
        """Return the answer that hands the mounts of a lease out; no checkpoint. ``environment``: if it was worked out before."""
        env: list[list[Any]] | None
        if environment is not None:
            env, applied = environment
            self.observer.usable(lease, applied)
        else:
            env, applied = self._environment(lease) if lease.ready else (None, "")
        told = f" for job {request.job[0]}" if request.job else ""
        in_context = contextvars.copy_context().run
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
                notes=[*notes, *(lease.notes if lease.ready else ())],
            ),
            clones,
            after=lambda: in_context(log.info, "uid %d mounts %s%s", lease.owner.uid, request.uenv, told),
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
            await connection.send(progress_frame(lease))
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
                        pull_frame(label, pull.done_bytes, image.layer.size_bytes, pull.rate_bytes_per_s)
                    )
                    with trio.move_on_after(protocol.HEARTBEAT_S):
                        await pull.ended.wait()
                if pull.error is not None:
                    raise pull.error
        await self._pulls.record(image)


def _best_meta(wanted: Wanted, served: Served) -> ImageMeta | None:
    """Prefer what the config blob tells (pinned by the digest that was asked for), then what the worker read, then an attachment."""
    return wanted.pinned_meta or served.meta or wanted.meta


def _asked_for(owner: Identity, request: Request) -> Hashable:
    """Return what decides what a `mount` gets: all but the job and its step."""
    return owner, request.uenv, request.view, request.cwd


def _is_settled(described: Mapping[str, Any]) -> bool:
    """Tell whether all is known of an image of the registry that ever will be."""
    return (
        described["digest"] is not None
        and described["views"] is not None
        and described["cached"] is not False
    )
