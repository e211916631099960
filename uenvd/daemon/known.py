"""What the registry knows of an image beside its bytes: test results, deprecation, the recipe. None of it is pinned by the image's digest."""

from __future__ import annotations

import logging
from typing import Any, Final

from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.question import Image, Question
from uenvd.errors import ManifestError, NotFound, UenvError
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, VERDICT, attachments
from uenvd.oci.metadata import MAX_PACKED_BYTES, packed_texts
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

MAX_RECIPE_BYTES: Final = 1 << 20
"""Of all files of a recipe that are handed out."""
_RECIPE: Final = "meta/recipe/"
_MAX_ATTACHMENTS: Final = 4
_VERDICTS: Final = {"pass": "passed", "fail": "failed", "waived": "waived"}


async def evidence(catalogue: Catalogue, image: Image, question: Question) -> dict[str, Any]:
    """Return ``{"tests": {"verdict", "remark"} | None, "deprecated": why | None, "tags": [...] | None}``.

    ``tests`` is None where nothing is known, and ``verdict`` one of ``passed``, ``failed``, ``waived``, ``untested``. From the index of the
    system; of an image that it does not name, or names as untested, from the newest report that is attached. Never raises: what the registry
    does not say in time is not known.
    """
    entry = await catalogue.entry(image, question)
    tests: dict[str, Any] | None = None
    if entry is not None and entry.verdict != "untested":
        tests = {"verdict": entry.verdict, "remark": entry.remark}
    else:
        found = image.found
        try:
            verdict = await catalogue.document(
                f"tests {found.digest}",
                question,
                lambda: _newest_verdict(catalogue.remote, found.repository.path, found.digest),
            )
        except UenvError as error:
            log.info("the test reports of %s cannot be read: %s", found.label, error)
        else:
            tests = {"verdict": verdict if isinstance(verdict, str) else "untested", "remark": None}
    return {
        "tests": tests,
        "deprecated": entry.deprecated if entry is not None else None,
        "tags": list(entry.tags) if entry is not None else None,
    }


def _newest_verdict(remote: Remote, repository: str, digest: str) -> str | None:
    reports = attachments(remote, repository, digest, REFRAME_TYPE)
    return _VERDICTS.get(reports[0].annotations.get(VERDICT, "")) if reports else None


async def recipe(catalogue: Catalogue, image: Image, question: Question) -> dict[str, str] | None:
    """Return the text files of the recipe that is attached to an image, named relative to it; None where there is none.

    Raises what the registry raises, when its answer is not remembered.
    """
    found = image.found
    answer = await catalogue.document(
        f"recipe {found.digest}",
        question,
        lambda: _attached_recipe(catalogue.remote, found.repository.path, found.digest),
    )
    if not isinstance(answer, dict):
        return None
    return {name: text for name, text in answer.items() if isinstance(text, str)}


def _attached_recipe(remote: Remote, repository: str, digest: str) -> dict[str, str] | None:
    for manifest in attachments(remote, repository, digest, META_TYPE)[:_MAX_ATTACHMENTS]:
        for layer in manifest.layers[:_MAX_ATTACHMENTS]:
            if layer.size_bytes > MAX_PACKED_BYTES:
                continue
            try:
                packed = remote.small_blob(repository, layer, MAX_PACKED_BYTES)
                found = packed_texts(packed, _RECIPE, MAX_RECIPE_BYTES)
            except (ManifestError, NotFound):
                continue
            if found:
                return found
    return None
