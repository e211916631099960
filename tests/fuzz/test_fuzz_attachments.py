"""What the daemon reads from whoever may write to the registry: only errors of the tree, whatever the bytes are."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from uenvd.errors import ManifestError
from uenvd.oci.chunks import ChunkList
from uenvd.oci.index import Entry, SystemIndex, decode_index
from uenvd.oci.metadata import read_packed_meta

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DIGEST = "sha256:" + "1" * 64
FIELDS = (
    "name", "version", "uarch", "tags", "digest", "layer", "size", "date", "mount", "default_view", "views", "verdict",
    "remark", "deprecated",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.booleans())
def test_archives(data: bytes, header: bool) -> None:
    name = b"meta/env.json".ljust(100, b"\0") + data[100:500] if header else data
    for packed in (data, gzip.compress(name)):
        with suppress(ManifestError):
            read_packed_meta(packed)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_entries_of_an_index(change: dict[str, Any]) -> None:
    entry = Entry("deploy/demo/zen3/app/1.0", DIGEST, ("v1",), DIGEST, 3, views=(("default", ""),))
    body = json.loads(SystemIndex("deploy", "demo", {(entry.repository, DIGEST): entry}).encode())
    body["images"][0] |= change
    with suppress(ManifestError):
        found = decode_index(json.dumps(body).encode(), "deploy", "demo")
        assert decode_index(found.encode(), "deploy", "demo") == found


@settings(max_examples=300, deadline=None)
@given(
    JSON | st.fixed_dictionaries({"lengths": st.text(max_size=40), "sha256": st.text(max_size=90)}),
    st.integers(0, 99),
)
def test_chunk_lists(body: object, size_bytes: int) -> None:
    with suppress(ManifestError):
        assert ChunkList.from_json(body, size_bytes).size_bytes == size_bytes
