"""What the registry has: repositories, tags, digests, manifests; what a label means. What is remembered of it: `uenvd.daemon.asking`."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import trio

from uenvd.cache.store import Store
from uenvd.config import Config
from uenvd.daemon import disk, resolution
from uenvd.daemon.asking import Asker
from uenvd.daemon.meanings import Meanings
from uenvd.daemon.membership import Membership
from uenvd.daemon.noted import Noted
from uenvd.daemon.question import Image, Question, listed_image, make_image
from uenvd.daemon.resolution import Found, Listed, Repository
from uenvd.daemon.signed import Signatures
from uenvd.errors import (
    AccessDenied,
    ManifestError,
    NotFound,
    UenvError,
    UnknownLabel,
)
from uenvd.label import Label
from uenvd.oci.attach import attached_meta
from uenvd.oci.index import Entry, SystemIndex, decode_index, read_index
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    MAX_CONFIG_BYTES,
    Manifest,
)
from uenvd.oci.reference import repository_of
from uenvd.oci.remote import Remote
from uenvd.views import ImageMeta

log = logging.getLogger(__name__)

_ATTACHED_TTL_S: Final = 3600.0
_ADVICE_S: Final = 1.0
"""What may be lost on advice that no job depends on."""
_MAX_MANIFESTS: Final = 512


class Catalogue:
    """The registry as this node sees it."""

    def __init__(self, config: Config, remote: Remote, store: Store) -> None:
        self._config = config
        self._remote = remote
        self._store = store
        self._manifests: OrderedDict[str, tuple[Manifest, bytes | None]] = OrderedDict()
        self.meanings = Meanings(config.resolve_ttl_s)
        self._asker = Asker(remote, config.resolve_ttl_s, on_change=self.meanings.clear)
        self._noted = Noted(store)
        self._membership = Membership(remote, store)
        self._signatures = Signatures(config.signatures, store)

    @property
    def remote(self) -> Remote:
        """The registry's client."""
        return self._remote

    @property
    def sources(self) -> Mapping[str, str]:
        """The directories of users' own images, by the namespace under which they are named."""
        return self._config.sources

    def question(self, *, refresh: bool = False, budget_s: float | None = None) -> Question:
        """Begin a request."""
        budget_s = self._config.resolve_deadline_s if budget_s is None else budget_s
        return Question(trio.current_time() + budget_s, refresh)

    # --- what a label means -------------------------------------------------------------------------------------------

    async def resolve(self, asked: Label, question: Question) -> Image:
        """Return the one image that a label means.

        Raises `LabelError`, `UnknownLabel`, `AmbiguousLabel`, `AccessDenied`, or the registry's error when nothing is remembered.
        """
        if asked.name is None and asked.digest is not None:
            asked = await disk.call(self._label_of, asked.digest)
        resolution.need_name(asked)
        wanted = self._complete(asked)
        image = self.meanings.recall(wanted, question)
        if image is None:
            image = await self._choose(asked, wanted, question)
            self.meanings.keep(wanted, image, question)
        await self._signatures.require(self, image, question, pinned=asked.digest is not None)
        await self._warn(image.found, question)
        await self._noted.note(image)
        return image

    async def _choose(self, asked: Label, wanted: Label, question: Question) -> Image:
        """Look among what there is for what a label means; ``wanted`` is the label with what it left out."""
        known: dict[str, Sequence[str]] = {}
        direct = self._direct(wanted)
        candidates = direct or resolution.matching(wanted, await self._repositories(wanted, question))
        found = await self._look(wanted, question.permitted(candidates), known, question)
        if not found and not direct:
            # The index names what was deployed; what others pushed is in the registry's own list only.
            unlisted = await self._unlisted(wanted, candidates, question)
            candidates = [*candidates, *unlisted]
            found = await self._look(wanted, question.permitted(unlisted), known, question)
        if not found:
            for repository in candidates:
                if question.permit is not None:
                    question.permit.require(repository.label)
            known |= await self._others(wanted, question)
        return await self.image(resolution.choose(asked, found, known), question)

    def _label_of(self, digest: str) -> Label:
        """Return the label of an image that this node has used, for one who knows it by its digest only (blocking).

        A session knows its images by what is mounted, and nothing else of it is to be believed. Raises `UnknownLabel`.
        """
        cached = self._store.image(digest)
        repository = resolution.Repository.parse(cached.repository) if cached is not None else None
        if cached is None or repository is None:
            raise UnknownLabel(
                f"this node knows no image {digest[:19]}…", hint="name it: name/version@sha256:…"
            )
        return repository.label._replace(tag=next(iter(cached.tags), None), digest=digest)

    async def _warn(self, found: Found, question: Question) -> None:
        """Tell the user of a deprecation, with date and successor. What the registry does not say soon is not waited for."""
        label = found.repository.label
        asked = Question(min(question.deadline_s, trio.current_time() + _ADVICE_S), refresh=False)
        asked.remembered_only = question.remembered_only
        index = await self._index(label, asked)
        question.oldest_s = max(question.oldest_s or 0.0, asked.oldest_s or 0.0)
        entry = index.entries.get((found.repository.path, found.digest)) if index is not None else None
        if entry is not None and entry.deprecated:
            question.note(f"{found.label._replace(namespace=None)} is deprecated: {entry.deprecated}")

    async def _look(
        self,
        wanted: Label,
        repositories: Sequence[Repository],
        known: dict[str, Sequence[str]],
        question: Question,
    ) -> list[Found]:
        """Return the tags (or the digest) of repositories that decide what a label means; note all their tags in ``known``."""
        found: list[Found] = []
        for repository in repositories:
            if wanted.digest is not None:
                if await self._has_manifest(repository, wanted.digest, question):
                    found.append(Found(repository, wanted.tag, wanted.digest))
                continue
            tags = resolution.image_tags(await self.tags(repository.path, question))
            known[repository.path] = tags
            found.extend(
                [
                    Found(repository, tag, await self.digest(repository.path, tag, question))
                    for tag in resolution.tags_to_ask(wanted, tags)
                ]
            )
        return found

    async def _unlisted(
        self, wanted: Label, seen: Sequence[Repository], question: Question
    ) -> list[Repository]:
        """Return the repositories that may hold what the index does not name; [] where the registry has no list."""
        if await self._index(wanted, question) is None:
            return []
        try:
            paths = await self._listed_repositories(wanted, question)
        except UenvError:
            return []
        return [repository for repository in resolution.matching(wanted, paths) if repository not in seen]

    async def image(self, found: Found, question: Question) -> Image:
        """Return an image with its manifest and metadata."""
        manifest, raw_config = await self._manifest(found.repository.path, found.digest, question)
        image = make_image(found, manifest, raw_config)
        if raw_config is not None:
            return image
        return replace(image, attached=await self._attached_meta(found, question))

    async def _attached_meta(self, found: Found, question: Question) -> ImageMeta | None:
        """Return what a stock client attached; without an answer in time the image is as one without metadata."""
        memory, name = self._store.memory, f"meta {found.digest}"

        def recall() -> tuple[ImageMeta | None, float] | None:
            known = memory.recall_document(name)
            try:
                return None if known is None else (ImageMeta.from_wire(known[0]), known[1])
            except (ValueError, TypeError, KeyError):
                return None

        def remember(meta: ImageMeta | None, when_s: float) -> None:
            memory.remember_document(name, None if meta is None else meta.to_wire(), when_s)

        answer: tuple[ImageMeta | None, float] = self._asker.known(("meta", found.digest)) or (None, 0.0)
        meta, when_s = answer
        if meta is not None and not question.refresh and 0 <= time.time() - when_s < _ATTACHED_TTL_S:
            return meta  # five questions to a registry without referrers API, for what hardly ever changes
        try:
            return await self._asker.remembered(
                ("meta", found.digest),
                question,
                ask=lambda: attached_meta(self._remote, found.repository.path, found.digest),
                recall=recall,
                remember=remember,
            )
        except UenvError as error:
            log.info("the attachments of %s cannot be read: %s", found.label, error)
            return None

    async def entry(self, image: Image, question: Question) -> Entry | None:
        """Return what the index of its system says of an image; None where there is no index, or it does not name the image."""
        found = image.found
        index = await self._index(found.repository.label, question)
        return index.entries.get((found.repository.path, found.digest)) if index is not None else None

    async def document(self, name: str, question: Question, ask: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
        """Return a JSON value that ``ask`` makes of what the registry has, remembered under a name. Raises what ``ask`` raises."""
        memory = self._store.memory
        return await self._asker.remembered(
            ("document", name),
            question,
            ask=ask,
            recall=lambda: memory.recall_document(name),
            remember=lambda answer, when_s: memory.remember_document(name, answer, when_s),
        )

    async def listing(self, wanted: Label, question: Question) -> list[Listed]:
        """Return every tagged image that a label with any fields missing may mean; the name is a prefix.

        From the index (one question to the registry), or where there is none from the registry's lists (one for each image).
        """
        wanted = self._complete(wanted)
        index = await self._index(wanted, question)
        if index is not None:
            listed = resolution.listed(wanted, index)
            return [one for one in listed if question.permitted([one.found.repository])]
        listed = []
        for found in await self._find(wanted, question):
            try:
                manifest, raw_config = await self._manifest(found.repository.path, found.digest, question)
                image = make_image(found, manifest, raw_config)
            except UenvError as error:
                question.note(f"{found.label}: {error.message}")
                continue
            listed.append(listed_image(image))
        return listed

    async def _find(self, wanted: Label, question: Question) -> list[Found]:
        repositories = resolution.matching(
            wanted, await self._repositories(wanted, question), name_prefix=True
        )
        found = []
        for repository in question.permitted(repositories):
            for tag in resolution.image_tags(await self.tags(repository.path, question)):
                if wanted.tag is None or wanted.tag == tag:
                    digest = await self.digest(repository.path, tag, question)
                    if wanted.digest is None or wanted.digest == digest:
                        found.append(Found(repository, tag, digest))
        return found

    def _complete(self, wanted: Label) -> Label:
        namespace = wanted.namespace or self._config.namespaces[0]
        if namespace not in self._config.namespaces:
            raise AccessDenied(
                f"the namespace '{namespace}' is not open on this system",
                hint=f"open namespaces: {', '.join(self._config.namespaces)}",
            )
        return wanted._replace(namespace=namespace, system=wanted.system or self._config.system)

    def _direct(self, wanted: Label) -> list[Repository]:
        """Return the repositories to look into where the label says enough to name them; [] where it does not."""
        uarchs = (wanted.uarch,) if wanted.uarch is not None else self._config.uarchs
        if wanted.version is None or wanted.system == "*" or not uarchs:
            return []
        assert wanted.namespace is not None and wanted.system is not None and wanted.name is not None
        paths = [
            repository_of(wanted.namespace, wanted.system, str(uarch), wanted.name, wanted.version)
            for uarch in uarchs
        ]
        return resolution.matching(wanted, paths)

    async def _others(self, wanted: Label, question: Question) -> dict[str, Sequence[str]]:
        """Return what the system has besides, for a hint; nothing when that is not known at once."""
        anything = Label(namespace=wanted.namespace, system=wanted.system)
        try:
            paths = await self._repositories(anything, question)
            paths = [one.path for one in question.permitted(resolution.matching(anything, paths))]
            same_name = resolution.matching(anything._replace(name=wanted.name), paths)
            tags = {repo.path: await self.tags(repo.path, question) for repo in same_name[:8]}
        except UenvError:
            return {}
        return {path: tags.get(path, ()) for path in paths}

    # --- questions to the registry, and what is remembered of the answers ---------------------------------------------

    async def _repositories(self, wanted: Label, question: Question) -> list[str]:
        """Return the repositories of a system: those that its index names, or those that the registry lists."""
        index = await self._index(wanted, question)
        return (
            index.repositories() if index is not None else await self._listed_repositories(wanted, question)
        )

    async def _index(self, wanted: Label, question: Question) -> SystemIndex | None:
        """Return the index of a label's system (`uenvd.oci.index`); None where there is none, or the label means all systems."""
        namespace, system = wanted.namespace, wanted.system
        if namespace is None or system is None or system == "*":
            return None
        memory, name = self._store.memory, f"index {namespace}/{system}"

        def ask() -> SystemIndex | None:
            try:
                return read_index(self._remote, namespace, system)
            except NotFound:
                return None
            except ManifestError as error:
                log.warning("the index of %s/%s is not used: %s", namespace, system, error)
                return None

        def recall() -> tuple[SystemIndex | None, float] | None:
            known = memory.recall_document(name)
            try:
                return (
                    None if known is None else (decode_index(known[0].encode(), namespace, system), known[1])
                )
            except (ManifestError, AttributeError):
                return None

        def remember(index: SystemIndex | None, when_s: float) -> None:
            memory.remember_document(name, None if index is None else index.encode().decode(), when_s)

        try:
            return await self._asker.remembered(
                ("index", f"{namespace}/{system}"), question, ask=ask, recall=recall, remember=remember
            )
        except UenvError as error:
            # The lists may still be remembered; if not, asking for them says the same.
            log.info("the index of %s/%s cannot be read: %s", namespace, system, error)
            return None

    async def _listed_repositories(self, wanted: Label, question: Question) -> list[str]:
        prefix = f"{wanted.namespace}/" if wanted.system == "*" else f"{wanted.namespace}/{wanted.system}/"
        return await self._asker.remembered(
            ("repositories", prefix),
            question,
            ask=lambda: self._remote.repositories(prefix),
            recall=lambda: self._store.recall_repositories(prefix),
            remember=lambda answer, when_s: self._store.remember_repositories(prefix, answer, when_s),
        )

    async def tags(self, repository: str, question: Question) -> list[str]:
        """Return the tags of a repository; [] when there is no such repository."""
        return await self._asker.remembered(
            ("tags", repository),
            question,
            ask=lambda: self._remote.tags(repository),
            recall=lambda: self._store.recall_tags(repository),
            remember=lambda answer, when_s: self._store.remember_tags(repository, answer, when_s),
        )

    async def digest(self, repository: str, tag: str, question: Question) -> str:
        """Return the digest of a tag."""

        def ask() -> str:
            manifest = self._remote.manifest(repository, tag)
            self._keep(manifest, self._fetch_config(repository, manifest))
            return manifest.digest

        return await self._asker.remembered(
            ("digest", f"{repository}:{tag}"),
            question,
            ask=ask,
            recall=lambda: self._store.recall_tag(repository, tag),
            remember=lambda answer, when_s: self._store.remember_tag(repository, tag, answer, when_s),
        )

    async def _has_manifest(self, repository: Repository, digest: str, question: Question) -> bool:
        try:
            await self._manifest(repository.path, digest, question)
            if self._config.access:
                await self._asker.ask(question, lambda: self._membership.require(repository.path, digest))
        except NotFound:
            return False
        return True

    async def _manifest(
        self, repository: str, digest: str, question: Question
    ) -> tuple[Manifest, bytes | None]:
        kept = self._manifests.get(digest) or await disk.call(self._stored, digest)
        if kept is None:

            def ask() -> tuple[Manifest, bytes | None]:
                manifest = self._remote.manifest(repository, digest)
                return manifest, self._fetch_config(repository, manifest)

            kept = await self._asker.ask(question, ask)
        self._keep(*kept)
        return kept

    def _stored(self, digest: str) -> tuple[Manifest, bytes | None] | None:
        manifest = self._store.manifest(digest)
        return None if manifest is None else (manifest, self._store.config(manifest))

    def _fetch_config(self, repository: str, manifest: Manifest) -> bytes | None:
        if manifest.config.media_type != CONFIG_TYPE:
            return None
        return self._remote.small_blob(repository, manifest.config, MAX_CONFIG_BYTES)

    def _keep(self, manifest: Manifest, raw_config: bytes | None) -> None:
        self._manifests[manifest.digest] = (manifest, raw_config)
        self._manifests.move_to_end(manifest.digest)
        while len(self._manifests) > _MAX_MANIFESTS:
            self._manifests.popitem(last=False)
