"""What is in the cache: the operations `images`, `evict` and `pin` (docs/protocol.md), and the form of records of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from uenvd import protocol
from uenvd.cache.store import Store
from uenvd.config import Config
from uenvd.daemon import disk, resolution
from uenvd.daemon.access import Access
from uenvd.daemon.control import Answer, Connection
from uenvd.daemon.peer import Identity, identity_of
from uenvd.daemon.question import Image, listed_image, make_image
from uenvd.daemon.resolution import Listed
from uenvd.daemon.servedimages import ServedImages
from uenvd.daemon.upkeep import open_here
from uenvd.errors import AccessDenied, UsageError
from uenvd.label import parse_descriptions, parse_namespaced_label
from uenvd.protocol import Request


def user_at_once(connection: Connection, request: Request) -> Identity | None:
    """Return for whom a request is where nobody has to be asked; None: ask `user_of`."""
    peer = connection.peer
    if request.uid is None or request.uid == peer.identity.uid:
        return peer.identity
    if peer.is_root and request.gid is not None and request.groups is not None:
        return Identity(request.uid, request.gid, request.groups)
    return None


async def user_of(connection: Connection, request: Request) -> Identity:
    """Return for whom a request is: the peer, or whom root names. Raises `AccessDenied`."""
    known = user_at_once(connection, request)
    if known is not None:
        return known
    assert request.uid is not None
    if not connection.peer.is_root:
        raise AccessDenied(f"uid {connection.peer.identity.uid} cannot speak for uid {request.uid}")
    return await trio.to_thread.run_sync(identity_of, request.uid)


class Cached:
    """The operations on what the cache has."""

    def __init__(self, config: Config, store: Store, served: ServedImages, access: Access) -> None:
        self._config = config
        self._store = store
        self._served = served
        self._access = access

    async def images(self, connection: Connection, request: Request) -> Answer:
        """Answer `images`: those that the user may use."""
        wanted = parse_namespaced_label(request.uenv)
        wanted = wanted._replace(system=wanted.system or self._config.system)
        stored = await disk.call(self._stored_images)
        permit = await self._access.permit(await user_of(connection, request))
        matching = [
            (image, pinned)
            for image, pinned in stored
            if permit.allows(image.found.repository.label)
            and wanted.matches(image.found.label._replace(digest=image.found.digest), name_prefix=True)
        ]
        rows = await records(self._store, [listed_image(image) for image, _pinned in matching])
        shown = [row | {"pinned": pinned} for row, (_image, pinned) in zip(rows, matching, strict=True)]
        return Answer(protocol.success(records=shown, notes=[]))

    async def evict(self, connection: Connection, request: Request) -> Answer:
        """Answer `evict`, for root only. Raises `InUse`, `NotFound`."""
        if not connection.peer.is_root:
            raise AccessDenied("only root may evict images from the node's cache")
        stored = await self._stored(request)
        await self._served.let_go(stored)
        await disk.call(self._store.give_back, stored, open_here)
        freed = await disk.call(self._store.evict, stored, deadline_s=disk.CHANGE_S)
        return Answer(protocol.success(freed_bytes=freed))

    async def pin(self, connection: Connection, request: Request) -> Answer:
        """Answer `pin`, for root only. Raises `NotFound`."""
        if not connection.peer.is_root:
            raise AccessDenied("only root may pin images in the node's cache")
        await disk.call(self._store.pin, await self._stored(request), request.pin, deadline_s=disk.CHANGE_S)
        return Answer(protocol.success())

    def _stored_images(self) -> list[tuple[Image, bool]]:
        """Return every image of the cache under each of its tags, and whether it is pinned (blocking)."""
        images = []
        for cached in self._store.images():
            repository = resolution.Repository.parse(cached.repository)
            manifest = self._store.manifest(cached.manifest_digest)
            if repository is None or manifest is None:
                continue
            raw_config = self._store.config(manifest)
            for tag in cached.tags or (None,):
                found = resolution.Found(repository, tag, cached.manifest_digest)
                images.append((make_image(found, manifest, raw_config), cached.pinned))
        return images

    async def _stored(self, request: Request) -> str:
        """Return the manifest digest of one image, whether its tag still exists in the registry or not."""
        label = parse_descriptions(request.uenv)[0].label
        if label is None:
            raise UsageError(f"'{request.uenv}' is no image of the cache")
        if label.digest is not None:
            return label.digest
        wanted = label._replace(system=label.system or self._config.system)
        stored = await disk.call(self._stored_images)
        matching = [image.found for image, _pinned in stored if wanted.matches(image.found.label)]
        return resolution.choose(label, matching, {}).digest


async def records(store: Store, listed: Sequence[Listed]) -> list[dict[str, Any]]:
    """Return the wire form of a list of images, with what of them is in the cache."""
    digests = {one.layer_digest for one in listed}
    cached = await disk.call(store.present, digests)
    return [_record(one, cached=one.layer_digest in cached) for one in listed]


def _record(listed: Listed, *, cached: bool) -> dict[str, Any]:
    label = listed.found.label
    record: dict[str, Any] = {
        "name": label.name,
        "version": label.version,
        "tag": label.tag,
        "system": label.system,
        "uarch": label.uarch,
        "namespace": label.namespace,
        "digest": listed.found.digest,
        "size_bytes": listed.size_bytes,
        "date": listed.date,
        "cached": cached,
    }
    return record if listed.deprecated is None else record | {"deprecated": listed.deprecated}
