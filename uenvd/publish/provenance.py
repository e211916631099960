"""Where an image comes from: an in-toto statement with SLSA provenance, and all evidence of a build attached at once.

The statement is that of in-toto (v1) with the predicate ``https://slsa.dev/provenance/v1``. It says what the build says of itself; it is worth
as much as the signature of the image and the rights of who may push.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from uenvd.errors import UsageError
from uenvd.oci.attach import Content, attach, json_content
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import split_repository
from uenvd.oci.remote import Remote
from uenvd.publish.build.imagefile import opened
from uenvd.publish.sbom import SBOM_MEDIA_TYPE, SBOM_TYPE, components, document
from uenvd.squashfs import Image, Inode, Kind

PROVENANCE_TYPE: Final = "uenv/provenance"
PROVENANCE_MEDIA_TYPE: Final = "application/vnd.in-toto+json"
LOG_TYPE: Final = "uenv/log"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "https://uenvd.dev/build/recipe/v1"
CIRCUMSTANCES: Final = "configure.json"
"""In the directory ``meta`` that a build leaves: when, where and with what it was built."""
MAX_LOG_BYTES: Final = 16 << 20
"""Of a longer log the end is kept."""
MAX_LOCK_BYTES: Final = 4 << 20
MAX_INPUTS: Final = 10_000
_DEB = re.compile(r"^([a-z0-9][a-z0-9+.-]+)=(\S+)\s+([a-z0-9]+)\s+sha256:([0-9a-f]{64})", re.MULTILINE)
_WHEEL = re.compile(
    r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)((?:[\s\\]+--hash=sha256:[0-9a-f]{64})+)", re.MULTILINE
)
_SOURCE = re.compile(r"^([A-Za-z0-9][^\s=]*)[ \t]+sha256:([0-9a-f]{64})[ \t]+(\S+)", re.MULTILINE)
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_RECIPE: Final = b"meta/recipe"


@dataclass(frozen=True, order=True)
class Input:
    """Something that a build was given."""

    uri: str
    sha256: str
    """64 hexadecimal digits."""


CI_VARIABLES: Final = (
    *("GITLAB_CI", "CI_PROJECT_PATH", "CI_COMMIT_REF_NAME", "CI_COMMIT_SHA", "CI_PROJECT_URL", "CI_JOB_URL"),
    *(
        "GITHUB_ACTIONS",
        "GITHUB_REPOSITORY",
        "GITHUB_REF",
        "GITHUB_SHA",
        "GITHUB_RUN_ID",
        "GITHUB_SERVER_URL",
    ),
)
"""What tells which CI job this is: no secrets. A stage that runs elsewhere needs them for the provenance and the policy."""


def ci_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return those of `CI_VARIABLES` that are set."""
    return {name: environ[name] for name in CI_VARIABLES if name in environ}


def ci_identity(environ: Mapping[str, str]) -> str | None:
    """Return which pipeline this is, ``gitlab:GROUP/PROJECT@REF`` or ``github:OWNER/REPOSITORY@REF``; None outside of any."""
    if environ.get("GITLAB_CI") and environ.get("CI_PROJECT_PATH"):
        return f"gitlab:{environ['CI_PROJECT_PATH']}@{environ.get('CI_COMMIT_REF_NAME', '')}"
    if environ.get("GITHUB_ACTIONS") and environ.get("GITHUB_REPOSITORY"):
        return f"github:{environ['GITHUB_REPOSITORY']}@{environ.get('GITHUB_REF', '')}"
    return None


def invocation(environ: Mapping[str, str]) -> str | None:
    """Return the address of the job that this is; None outside of any CI."""
    if environ.get("CI_JOB_URL"):
        return environ["CI_JOB_URL"]
    if environ.get("GITHUB_RUN_ID") and environ.get("GITHUB_REPOSITORY"):
        server = environ.get("GITHUB_SERVER_URL", "https://github.com")
        return f"{server}/{environ['GITHUB_REPOSITORY']}/actions/runs/{environ['GITHUB_RUN_ID']}"
    return None


def locked_inputs(lock: str) -> list[Input]:
    """Return the inputs that the text of a lock file pins: Debian packages, wheels and source files (docs/recipes.md). Others pin nothing."""
    found = [
        Input(f"pkg:deb/debian/{name}@{version}?arch={arch}", sha256)
        for name, version, arch, sha256 in _DEB.findall(lock)
    ]
    for name, version, hashes in _WHEEL.findall(lock):
        # Several: any of these files, for different machines, could have been taken.
        found += [Input(f"pkg:pypi/{name.lower()}@{version}", sha256) for sha256 in _HASH.findall(hashes)]
    for file, sha256, place in _SOURCE.findall(lock):
        name, equals, version = place.removeprefix("debian:").partition("=")
        debian = place.startswith("debian:") and equals
        uri = f"pkg:deb/debian/{name}@{version}?arch=source#{file}" if debian else place
        found.append(Input(uri, sha256))
    return found


def image_inputs(image: Path) -> list[Input]:
    """Return what the recipe inside an image pins, sorted. Raises `UsageError`, `FormatError`."""
    found: set[Input] = set()
    with opened(image) as squashfs:
        directory = squashfs.find(_RECIPE)
        if directory is None or directory.kind is not Kind.DIRECTORY:
            return []
        for entry in squashfs.entries(directory):
            inode = squashfs.child(entry)
            if entry.name.endswith(b".lock"):
                found.update(locked_inputs(_text(squashfs, inode)))
    return sorted(found)[:MAX_INPUTS]


def _text(image: Image, inode: Inode) -> str:
    if inode.kind is not Kind.FILE or inode.size_bytes > MAX_LOCK_BYTES:
        return ""
    return image.read_file(inode, MAX_LOCK_BYTES).decode(errors="replace")


def statement(
    *,
    label: str,
    digest: str,
    layer_digest: str,
    circumstances: Mapping[str, Any],
    inputs: Iterable[Input],
    environ: Mapping[str, str],
) -> bytes:
    """Return the statement about an image.

    Args:
        label: ``system/uarch/name/version``.
        digest: of the manifest.
        layer_digest: of the squashfs file.
        circumstances: what the builder noted (`CIRCUMSTANCES`); what is missing is left out.
        inputs: with their digests.
        environ: of the CI job.

    """
    recipe = circumstances.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    fingerprint = str(recipe.get("fingerprint") or "").removeprefix("sha256:")
    dependencies: list[dict[str, Any]] = []
    if re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        dependencies.append({"name": "recipe", "uri": f"recipe:{label}", "digest": {"sha256": fingerprint}})
    commit = environ.get("CI_COMMIT_SHA") or environ.get("GITHUB_SHA")
    source = environ.get("CI_PROJECT_URL") or _github(environ)
    if commit and source and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        dependencies.append({"name": "source", "uri": f"git+{source}", "digest": {"gitCommit": commit}})
    dependencies += [{"uri": one.uri, "digest": {"sha256": one.sha256}} for one in inputs]
    metadata = {
        "invocationId": invocation(environ),
        "startedOn": _zulu(circumstances.get("time"), 0),
        "finishedOn": _zulu(circumstances.get("time"), circumstances.get("seconds")),
    }
    body = {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": label, "digest": {"sha256": digest.removeprefix("sha256:")}},
            {"name": "store.squashfs", "digest": {"sha256": layer_digest.removeprefix("sha256:")}},
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    key: value
                    for key, value in (
                        ("label", label),
                        ("mount", circumstances.get("mount")),
                        ("ci", ci_identity(environ)),
                    )
                    if value is not None
                },
                "internalParameters": {
                    key: circumstances[key]
                    for key in ("machine", "kernel")
                    if isinstance(circumstances.get(key), str)
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": str(circumstances.get("builder") or "unknown")},
                "metadata": {key: value for key, value in metadata.items() if value is not None},
            },
        },
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _github(environ: Mapping[str, str]) -> str | None:
    repository = environ.get("GITHUB_REPOSITORY")
    return f"{environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}" if repository else None


def _zulu(began: object, seconds: object) -> str | None:
    """Return an RFC 3339 time; None where it is not known."""
    if not isinstance(began, str) or not isinstance(seconds, (int, float)):
        return None
    try:
        when = datetime.fromisoformat(began) + timedelta(seconds=float(seconds))
    except (ValueError, OverflowError):
        return None
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def attach_evidence(
    remote: Remote,
    repository: str,
    digest: str,
    *,
    image: Path,
    meta_dir: Path | None = None,
    log: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Attach bill of materials, provenance and build log to a pushed image; return artifact type -> digest of the attachment.

    May be repeated: what is attached already is not attached again.

    Args:
        remote: where the image is.
        repository: where the image is.
        digest: of its manifest.
        image: the squashfs file that was pushed.
        meta_dir: what the build left beside it, for the provenance; None: only what the image itself tells.
        log: of the build; the names of this host and user are taken out of it. None: no log.
        environ: of the CI job; None: this process's.

    Raises:
        UsageError: a file cannot be read, or is not what was pushed.
        FormatError: the image is none.

    """
    environ = os.environ if environ is None else environ
    parts = split_repository(repository)
    if parts is None:
        raise UsageError(f"{repository} is no repository of images")
    manifest = remote.manifest(repository, digest)
    layer = squashfs_layer(manifest)
    if image.stat().st_size != layer.size_bytes:
        raise UsageError(f"{image} is not the image {digest}: it has another size")
    _namespace, _system, _uarch, name, version = parts
    created = manifest.annotations.get("org.opencontainers.image.created")
    bill = document(components(image), name=name, version=version, layer_digest=layer.digest, created=created)
    attached = {
        SBOM_TYPE: attach(
            remote, repository, digest, SBOM_TYPE, [Content("sbom.cdx.json", bill, SBOM_MEDIA_TYPE)]
        )
    }
    said = statement(
        label="/".join(parts[1:]),
        digest=digest,
        layer_digest=layer.digest,
        circumstances=_circumstances(meta_dir),
        inputs=image_inputs(image),
        environ=environ,
    )
    content = json_content("provenance.json", said)
    attached[PROVENANCE_TYPE] = attach(
        remote,
        repository,
        digest,
        PROVENANCE_TYPE,
        [Content(content.title, said, PROVENANCE_MEDIA_TYPE)],
        {"in-toto.io/predicate-type": PREDICATE_TYPE},
    )
    if log is not None:
        text = clean_log(_end_of(log), environ)
        attached[LOG_TYPE] = attach(
            remote, repository, digest, LOG_TYPE, [Content("build.log", text, "text/plain")]
        )
    return attached


def _circumstances(meta_dir: Path | None) -> Mapping[str, Any]:
    if meta_dir is None:
        return {}
    try:
        body = json.loads((meta_dir / CIRCUMSTANCES).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _end_of(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_LOG_BYTES))
            return file.read(MAX_LOG_BYTES)
    except OSError as error:
        raise UsageError(f"{log} cannot be read: {error.strerror}") from error


def clean_log(log: bytes, environ: Mapping[str, str]) -> bytes:
    """Return a log without the user's home, the user, the host, and the values of variables that are secrets by their names."""
    text = log.decode(errors="replace")
    secrets = [
        value
        for name, value in environ.items()
        if re.search(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|API_KEY", name, re.IGNORECASE)
        and len(value) >= 6
        and not value.startswith("/")
    ]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "[secret]")
    home = environ.get("HOME", "")
    if home.count("/") > 1:
        text = text.replace(home, "HOME")
    for word, shown in (
        (os.uname().nodename, "host"),
        (environ.get("USER") or environ.get("LOGNAME") or "", "USER"),
    ):
        if len(word) >= 3 and word != "root":
            text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown, text)
    return text.encode()
