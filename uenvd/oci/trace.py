"""Traces: which bytes of an image a program reads, in order. Attached to the image as ``uenv/prefetch`` and replayed at a lazy start.

The document is JSON: ``{"version": 1, "ranges": [[first, end], ...]}``, positions in the squashfs file, by the time of the first read. It is a hint
from whoever may write to the registry: bounded, and what comes of it is only the order in which bytes are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from uenvd.errors import ManifestError, NotFound
from uenvd.oci.manifest import parse_manifest
from uenvd.oci.remote import Remote

PREFETCH_TYPE: Final = "uenv/prefetch"
MAX_TRACE_BYTES: Final = 4 << 20
MAX_RANGES: Final = 1 << 16
_MAX_TRACES: Final = 4
NEAR_BYTES: Final = 256 << 10
"""Ranges so near to each other are fetched as one, with what is between: a question costs as much as so many bytes."""


def encode_trace(ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return the document."""
    return json.dumps({"version": 1, "ranges": [list(one) for one in ranges]}, separators=(",", ":")).encode()


def parse_trace(data: bytes, size_bytes: int) -> list[tuple[int, int]]:
    """Return the ranges of a document that lie in an image of ``size_bytes``. Raises `ManifestError`."""
    try:
        body: Any = json.loads(data)
        if body["version"] != 1:
            raise ManifestError("the trace is of another version")
        found = [(int(first), int(end)) for first, end in body["ranges"][:MAX_RANGES]]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ManifestError(f"the trace is malformed: {error}") from error
    return [(first, end) for first, end in found if 0 <= first < end <= size_bytes]


def coalesce(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that are near to each other; what was read first stays first. Without overlaps."""
    order = {first: number for number, (first, _end) in reversed(list(enumerate(ranges)))}
    joined: list[tuple[int, int, int]] = []
    for first, end in sorted(ranges):
        if joined and first - joined[-1][1] <= NEAR_BYTES:
            start, stop, rank = joined[-1]
            joined[-1] = start, max(stop, end), min(rank, order[first])
        else:
            joined.append((first, end, order[first]))
    return [(first, end) for first, end, _rank in sorted(joined, key=lambda one: one[2])]


def fetch_trace(
    remote: Remote, repository: str, digest: str, size_bytes: int, deadline_s: float
) -> list[tuple[int, int]]:
    """Return what the newest trace of the image ``digest`` names, ready to be fetched; [] without one. Raises the remote's errors."""
    with remote.deadline(deadline_s):
        for referrer in remote.referrers(repository, digest, PREFETCH_TYPE)[-_MAX_TRACES:][::-1]:
            try:
                raw, _media_type = remote.manifest_bytes(repository, referrer.digest)
                for layer in parse_manifest(raw, referrer.digest).layers:
                    if layer.size_bytes <= MAX_TRACE_BYTES:
                        data = remote.small_blob(repository, layer, MAX_TRACE_BYTES)
                        return coalesce(parse_trace(data, size_bytes))
            except (ManifestError, NotFound):
                continue
    return []
