"""What the registry has, remembered for a while: repositories, tags, digests, manifests.

Concurrency: the tables are changed synchronously between awaits. Registry calls run in threads with a deadline that both
sides keep. When the registry does not answer, the last known answer is used and a note says so; for a moment after that
the registry is not asked again, so that one request meets one deadline, not one for each of its questions.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from uenvd.cache.store import Store
from uenvd.config import Config
from uenvd.daemon import resolution
from uenvd.daemon.resolution import Found, Repository
from uenvd.errors import (
    AccessDenied,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryUnreachable,
    UenvError,
)
from uenvd.label import Label
from uenvd.oci.manifest import CONFIG_TYPE, Descriptor, ImageConfig, Manifest, parse_config, squashfs_layer
from uenvd.oci.reference import repository_of
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

T = TypeVar("T")

_REGISTRY_THREADS: Final = 16
_QUIET_S: Final = 3.0
"""After a failure the registry is left alone for this long."""
_MAX_MANIFESTS: Final = 512
_MAX_CONFIG_BYTES: Final = 1 << 20
_THREAD_GRACE_S: Final = 0.4


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the registry, known down to its layer."""

    found: Found
    manifest: Manifest
    layer: Descriptor
    config: ImageConfig | None


@dataclass
class Question:
    """One request's way through the catalogue: its deadline, whether it insists on fresh answers, what it must tell the user."""

    deadline_s: float
    """Absolute, on trio's clock."""
    refresh: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a line for the user, once."""
        if text not in self.notes:
            self.notes.append(text)


class Catalogue:
    """The registry as this node sees it."""

    def __init__(self, config: Config, remote: Remote, store: Store) -> None:
        self._config = config
        self._remote = remote
        self._store = store
        self._limiter = trio.CapacityLimiter(_REGISTRY_THREADS)
        self._manifests: OrderedDict[str, tuple[Manifest, ImageConfig | None]] = OrderedDict()
        self._quiet_until = float("-inf")
        self._failure: UenvError | None = None

    @property
    def remote(self) -> Remote:
        """The registry's client."""
        return self._remote

    def question(self, *, refresh: bool = False, budget_s: float | None = None) -> Question:
        """Begin a request."""
        budget_s = self._config.resolve_deadline_s if budget_s is None else budget_s
        return Question(trio.current_time() + budget_s, refresh)

    # --- what a label means -------------------------------------------------------------------------------------------

    async def resolve(self, wanted: Label, question: Question) -> Image:
        """Return the one image that a label means.

        Raises `LabelError`, `UnknownLabel`, `AmbiguousLabel`, `AccessDenied`, or the registry's error when nothing is remembered.
        """
        resolution.need_name(wanted)
        wanted = self._complete(wanted)
        repositories = await self._candidates(wanted, question)
        found: list[Found] = []
        known: dict[str, Sequence[str]] = {}
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
        if not found:
            known |= await self._others(wanted, question)
        return await self.image(resolution.choose(wanted, found, known), question)

    async def image(self, found: Found, question: Question) -> Image:
        """Return an image with its manifest and metadata."""
        manifest, config = await self._manifest(found.repository.path, found.digest, question)
        return Image(found, manifest, squashfs_layer(manifest), config)

    async def find(self, wanted: Label, question: Question) -> list[Found]:
        """Return every tagged image that a label with any fields missing may mean; the name is a prefix."""
        wanted = self._complete(wanted)
        repositories = resolution.matching(
            wanted, await self._repositories(wanted, question), name_prefix=True
        )
        found = []
        for repository in repositories:
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

    async def _candidates(self, wanted: Label, question: Question) -> list[Repository]:
        """Return the repositories to look into: named directly where the label says enough, else from the catalogue."""
        uarchs = (wanted.uarch,) if wanted.uarch is not None else self._config.uarchs
        if wanted.version is not None and wanted.system != "*" and uarchs:
            assert wanted.namespace is not None and wanted.system is not None and wanted.name is not None
            paths = [
                repository_of(wanted.namespace, wanted.system, str(uarch), wanted.name, wanted.version)
                for uarch in uarchs
            ]
            return resolution.matching(wanted, paths)
        return resolution.matching(wanted, await self._repositories(wanted, question))

    async def _others(self, wanted: Label, question: Question) -> dict[str, Sequence[str]]:
        """Return what the system has besides, for a hint; nothing when that is not known at once."""
        anything = Label(namespace=wanted.namespace, system=wanted.system)
        try:
            paths = await self._repositories(anything, question)
            same_name = resolution.matching(anything._replace(name=wanted.name), paths)
            tags = {repo.path: await self.tags(repo.path, question) for repo in same_name[:8]}
        except UenvError:
            return {}
        return {path: tags.get(path, ()) for path in paths}

    # --- questions to the registry, and what is remembered of the answers ---------------------------------------------

    async def _repositories(self, wanted: Label, question: Question) -> list[str]:
        prefix = f"{wanted.namespace}/" if wanted.system == "*" else f"{wanted.namespace}/{wanted.system}/"
        return await self._remembered(
            f"repositories {prefix}",
            question,
            lambda: self._remote.repositories(prefix),
            _text_list,
        )

    async def tags(self, repository: str, question: Question) -> list[str]:
        """Return the tags of a repository; [] when there is no such repository."""
        return await self._remembered(
            f"tags {repository}", question, lambda: self._remote.tags(repository), _text_list
        )

    async def digest(self, repository: str, tag: str, question: Question) -> str:
        """Return the digest of a tag."""

        def ask() -> str:
            manifest = self._remote.manifest(repository, tag)
            config = self._fetch_config(repository, manifest)
            self._keep(manifest, config)
            return manifest.digest

        return await self._remembered(f"digest {repository}:{tag}", question, ask, _text)

    async def _has_manifest(self, repository: Repository, digest: str, question: Question) -> bool:
        try:
            await self._manifest(repository.path, digest, question)
        except NotFound:
            return False
        return True

    async def _manifest(
        self, repository: str, digest: str, question: Question
    ) -> tuple[Manifest, ImageConfig | None]:
        kept = self._manifests.get(digest)
        if kept is not None:
            self._manifests.move_to_end(digest)
            return kept
        stored = await trio.to_thread.run_sync(self._store.image, digest)
        if stored is not None:
            self._keep(stored.manifest, stored.config)
            return stored.manifest, stored.config

        def ask() -> tuple[Manifest, ImageConfig | None]:
            manifest = self._remote.manifest(repository, digest)
            return manifest, self._fetch_config(repository, manifest)

        manifest, config = await self._ask(question, ask)
        self._keep(manifest, config)
        return manifest, config

    def _fetch_config(self, repository: str, manifest: Manifest) -> ImageConfig | None:
        if manifest.config.media_type != CONFIG_TYPE:
            return None
        try:
            return parse_config(self._remote.small_blob(repository, manifest.config, _MAX_CONFIG_BYTES))
        except ManifestError as error:
            log.warning("the metadata of %s in %s is unusable: %s", manifest.digest, repository, error)
            return None

    def _keep(self, manifest: Manifest, config: ImageConfig | None) -> None:
        self._manifests[manifest.digest] = (manifest, config)
        while len(self._manifests) > _MAX_MANIFESTS:
            self._manifests.popitem(last=False)

    async def _remembered(
        self, key: str, question: Question, ask: Callable[[], T], check: Callable[[object], T | None]
    ) -> T:
        remembered = await trio.to_thread.run_sync(self._store.recall, key)
        value = None if remembered is None else check(remembered.value)
        now = time.time()
        if remembered is not None and value is not None and not question.refresh:
            age_s = now - remembered.when_s
            if 0 <= age_s < self._config.resolve_ttl_s:
                return value
        try:
            answer = await self._ask(question, ask)
        except (RegistryUnreachable, RegistryDenied) as error:
            if remembered is None or value is None:
                raise
            question.note(f"{_first_line(error)}; using what it said {_ago(now - remembered.when_s)}")
            return value
        if answer or remembered is not None:  # names that somebody made up do not fill the disk
            await trio.to_thread.run_sync(self._store.remember, key, answer, now)
        return answer

    async def _ask(self, question: Question, ask: Callable[[], T]) -> T:
        """Ask the registry within the question's deadline. Raises `RegistryUnreachable` and the registry's other errors."""
        if trio.current_time() < self._quiet_until and self._failure is not None:
            raise self._failure
        left_s = question.deadline_s - trio.current_time()

        def in_thread() -> T:
            with self._remote.deadline(max(left_s, 0.05)):
                return ask()

        try:
            with trio.fail_at(question.deadline_s + _THREAD_GRACE_S):
                answer = await trio.to_thread.run_sync(
                    in_thread, limiter=self._limiter, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            error: UenvError = RegistryUnreachable(
                f"the registry {self._remote.address} does not answer in time"
            )
            self._be_quiet(error)
            raise error from None
        except RegistryUnreachable as error:
            self._be_quiet(error)
            raise
        self._quiet_until = float("-inf")
        return answer

    def _be_quiet(self, error: UenvError) -> None:
        log.warning("%s", error)
        self._failure = error
        self._quiet_until = trio.current_time() + _QUIET_S


def _text_list(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _first_line(error: UenvError) -> str:
    return error.message.splitlines()[0] if error.message else error.code


def _ago(age_s: float) -> str:
    if age_s < 120:
        return f"{max(age_s, 0):.0f} s ago"
    if age_s < 7200:
        return f"{age_s / 60:.0f} min ago"
    return f"{age_s / 3600:.0f} h ago"
