"""Whether a repository has a manifest: where images are for some users only, a digest alone is no right to it.

A manifest that is here may have come from another repository than the one that a user names. Concurrency: blocking, for threads; what was
confirmed is kept in a set, which grows by one entry for each image that a repository really has.
"""

from __future__ import annotations

from typing import Final

from uenvd.cache.store import Store
from uenvd.errors import NotFound
from uenvd.oci.layout import LayoutRemote
from uenvd.oci.remote import Remote

MAX_TAGS: Final = 200


class Membership:
    """What this node knows of which repository has which manifest."""

    def __init__(self, remote: Remote, store: Store) -> None:
        self._remote = remote
        self._store = store
        self._confirmed: set[tuple[str, str]] = set()

    def require(self, repository: str, digest: str) -> None:
        """Raise `NotFound` unless the repository has the manifest; else what the remote raises when that cannot be found out."""
        if (repository, digest) in self._confirmed:
            return
        if repository not in self._store.repositories_of(digest):
            if isinstance(self._remote, LayoutRemote):
                # A directory gives out any blob under any repository's name; only its tags say what belongs where.
                tags = self._remote.tags(repository)[:MAX_TAGS]
                if not any(self._remote.resolve(repository, tag) == digest for tag in tags):
                    raise NotFound(f"{repository} has no image {digest}")
            else:
                self._remote.manifest(repository, digest)
        self._confirmed.add((repository, digest))
