"""Which manifests refer to a subject: the referrers API, or tags where a registry has none (`uenvd.oci.fallback`).

Source: distribution specification 1.1, "Listing Referrers"; what hosted registries get wrong is dealt with here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

from uenvd.errors import RegistryError
from uenvd.oci.fallback import by_tags, settled
from uenvd.oci.manifest import INDEX_TYPE, MAX_MANIFEST_BYTES, Descriptor, parse_index
from uenvd.oci.transport import Transport, join

if TYPE_CHECKING:
    from uenvd.oci.registry import RegistryRemote

MAX_PAGES: Final = 100
_NEXT = re.compile(r"<([^>]*)>\s*;[^,]*\brel\s*=\s*\"?next\"?")


def list_referrers(
    remote: RegistryRemote,
    http: Transport,
    full_name: str,
    repository: str,
    digest: str,
    artifact_type: str | None,
) -> list[Descriptor]:
    """Return the referrers of ``digest``, each once, filtered here too: registries may ignore the filter."""
    found = _by_api(http, full_name, digest, artifact_type)
    if found is None:
        found = by_tags(remote, repository, digest)
    return settled(remote, repository, found, artifact_type)


def _by_api(
    http: Transport, full_name: str, digest: str, artifact_type: str | None
) -> list[Descriptor] | None:
    """Ask the API; None where there is none (404, another error, or an answer that is no OCI index by its content type)."""
    query = f"?{urlencode({'artifactType': artifact_type})}" if artifact_type else ""
    url = http.url(f"{full_name}/referrers/{digest}{query}")
    what = f"the referrers of {digest}"
    found: list[Descriptor] = []
    seen: set[str] = set()
    while url not in seen and len(seen) < MAX_PAGES and http.is_ours(url):
        seen.add(url)
        try:
            reply = http.fetch(
                "GET",
                url,
                scope=f"{full_name}:pull",
                what=what,
                limit_bytes=MAX_MANIFEST_BYTES,
                headers={"Accept": INDEX_TYPE},
            )
        except RegistryError:
            return None
        if reply.headers.get("Content-Type", "").partition(";")[0].strip() != INDEX_TYPE:
            return None
        found.extend(parse_index(reply.body))
        link = _NEXT.search(reply.headers.get("Link", ""))
        if link is None:
            break
        url = join(reply, link.group(1))
    return found
