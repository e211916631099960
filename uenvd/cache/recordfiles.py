"""The records of the images in a cache directory: one file for each manifest, written whole, read by any node at any time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from uenvd.cache.claim import unless_stale
from uenvd.cache.records import Record
from uenvd.errors import ManifestError, NotFound, StorageError
from uenvd.oci.files import read_bounded, storage_errors, write_atomically
from uenvd.oci.reference import is_digest

log = logging.getLogger(__name__)

MAX_RECORD_BYTES: Final = 1 << 20


class RecordFiles:
    """Reads and writes them, with the rights of the calling thread. Who changes one holds the directory's lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, manifest_digest: str) -> Record | None:
        """Return a record; None if there is none, or none that makes sense."""
        try:
            path = self._path(manifest_digest)
            return Record.decode(unless_stale(lambda: read_bounded(path, MAX_RECORD_BYTES), self._directory))
        except FileNotFoundError:
            return None
        except (OSError, StorageError, ManifestError) as error:
            log.warning("the record of %s in the cache is unusable: %s", manifest_digest, error)
            return None

    def existing(self, manifest_digest: str) -> Record:
        """Return a record. Raises `NotFound`."""
        record = self.get(manifest_digest)
        if record is None:
            raise NotFound(f"the image {manifest_digest} is not in the cache")
        return record

    def all(self) -> list[Record]:
        """Return all records that make sense. Raises `StorageError`."""
        with storage_errors(self._directory, "listing"):
            names = [path.stem for path in self._directory.glob("*.json")]
        found = (self.get(f"sha256:{name}") for name in names if is_digest(f"sha256:{name}"))
        return [record for record in found if record is not None]

    def write(self, record: Record) -> None:
        """Write a record in place of the former one. Raises `OSError`."""
        write_atomically(self._path(record.manifest_digest), record.encode())

    def remove(self, manifest_digest: str) -> None:
        """Remove a record. Raises `OSError`."""
        self._path(manifest_digest).unlink()

    def _path(self, manifest_digest: str) -> Path:
        if not is_digest(manifest_digest):
            raise StorageError(f"{manifest_digest!r} is no sha256 digest")
        return self._directory / f"{manifest_digest.removeprefix('sha256:')}.json"
