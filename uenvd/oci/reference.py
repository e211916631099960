"""Names in a registry: where it is (`RegistryAddress`) and what repositories and tags may be called.

Pure: text in, values out. The grammars are those of the OCI distribution specification 1.1, "Pulling manifests".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from uenvd.errors import ConfigError, LabelError, RegistryError

MAX_REPOSITORY_CHARS = 255
"""Length at which clients and registries begin to differ (specification, "Pulling manifests", note on host + name)."""

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FALLBACK_TAG = re.compile(r"sha256-[0-9a-f]{64}(?:\..*)?")
_OWN_TAG_DIGITS = 40
_OWN_TAG_END = re.compile(rf"[0-9a-f]{{{_OWN_TAG_DIGITS}}}")
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:.]+\]"
)

_HOW = "write oci-layout:/DIRECTORY, https://HOST[:PORT][/PREFIX] or, for a test without TLS, http://HOST[:PORT][/PREFIX]"


@dataclass(frozen=True)
class RegistryAddress:
    """Where images are kept: a directory (``kind == "layout"``) or a server (``kind == "http"``)."""

    kind: Literal["layout", "http"]
    host: str = ""
    """``name`` or ``name:port``; empty for a layout."""
    prefix: str = ""
    """Leading components of every repository, without slashes at the ends; may be empty."""
    plain_http: bool = False
    path: str = ""
    """The directory of a layout, as it was written."""

    def __str__(self) -> str:
        if self.kind == "layout":
            return f"oci-layout:{self.path}"
        scheme = "http" if self.plain_http else "https"
        return f"{scheme}://{self.host}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def base_url(self) -> str:
        """``https://host[:port]`` of a server, without the prefix."""
        return f"{'http' if self.plain_http else 'https'}://{self.host}"


def parse_registry(text: str) -> RegistryAddress:
    """Parse the address of a registry: ``oci-layout:DIR``, ``https://…``, ``http://…`` or ``host[:port][/prefix]`` (https).

    Raises `ConfigError`. A user name or password in the address is refused and never echoed.
    """
    text = text.strip()
    if not text:
        raise ConfigError("the address of the registry is empty", hint=_HOW)
    if text.startswith("oci-layout:"):
        path = text.removeprefix("oci-layout:")
        if not path or "\0" in path:
            raise ConfigError(f"the address {text!r} names no directory", hint="write oci-layout:/DIRECTORY")
        return RegistryAddress("layout", path=path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "https", text
    if "@" in rest.partition("/")[0]:
        raise ConfigError(
            "the address of the registry holds a user name or a password",
            hint="leave them out; uenvd reads credentials from docker's configuration files and credential helpers",
        )
    if scheme.lower() not in {"http", "https"}:
        raise ConfigError(
            f"the address of the registry has the unknown scheme {scheme!r}: {text!r}", hint=_HOW
        )
    authority, _, prefix = rest.partition("/")
    host, port = _split_port(authority)
    if not _HOST.fullmatch(host):
        raise ConfigError(f"the address of the registry has no valid host name: {text!r}", hint=_HOW)
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise ConfigError(f"the address of the registry has no valid port: {text!r}", hint=_HOW)
    if port is not None and int(port) == (80 if scheme.lower() == "http" else 443):
        authority = host  # as credentials and redirections name it
    prefix = prefix.strip("/")
    if prefix and not _REPOSITORY.fullmatch(prefix):
        raise ConfigError(
            f"the prefix {prefix!r} in the address of the registry is no valid repository name",
            hint="a prefix consists of lower-case letters, digits and single . _ - between them, separated by /",
        )
    return RegistryAddress("http", host=authority.lower(), prefix=prefix, plain_http=scheme.lower() == "http")


def _split_port(authority: str) -> tuple[str, str | None]:
    if authority.startswith("["):
        host, bracket, rest = authority.partition("]")
        return host + bracket, rest[1:] if rest.startswith(":") else (rest or None)
    host, colon, port = authority.partition(":")
    return host, port if colon else None


def is_repository(text: str) -> bool:
    """Tell whether ``text`` is a repository name of the specification's grammar, of at most 255 characters."""
    return len(text) <= MAX_REPOSITORY_CHARS and _REPOSITORY.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    """Tell whether ``text`` is a tag of the specification's grammar (1..128 characters)."""
    return _TAG.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Tell whether ``text`` is ``sha256:`` and 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def is_fallback_tag(tag: str) -> bool:
    """Tell whether ``tag`` belongs to attachments (``sha256-<hex>``, or that and a dot and more), not to an image."""
    return _FALLBACK_TAG.fullmatch(tag) is not None


def fallback_tag(digest: str) -> str:
    """Return the tag under which referrers of ``digest`` are listed where a registry has no referrers API."""
    return digest.replace(":", "-", 1)


def attachment_tag(subject: str, digest: str) -> str:
    """Return the tag of its own that an attachment gets: ``sha256-<subject>.<first 40 digits of the attachment>``.

    It keeps the attachment from a clean-up of untagged manifests, and tells, with nothing but the list of tags, to whom it belongs.
    """
    return f"{fallback_tag(subject)}.{own_digits(digest)}"


def attachments_of(subject: str, tags: Iterable[str]) -> dict[str, str]:
    """Return, of a list of tags, those that `attachment_tag` made for ``subject``: first 40 digits of the digest -> tag."""
    begin = fallback_tag(subject) + "."
    found = ((tag.removeprefix(begin), tag) for tag in tags if tag.startswith(begin))
    return {digits: tag for digits, tag in found if _OWN_TAG_END.fullmatch(digits)}


def own_digits(digest: str) -> str:
    """Return the part of a digest that is in its `attachment_tag`."""
    return digest.removeprefix("sha256:")[:_OWN_TAG_DIGITS]


def check_reference(repository: str, reference: str) -> None:
    """Refuse a repository, tag or digest that no registry can have. Raises `RegistryError`."""
    if not is_repository(repository):
        raise RegistryError(f"{repository!r} is no valid repository name")
    if not is_tag(reference) and not is_digest(reference):
        raise RegistryError(f"{reference!r} is neither a valid tag nor a sha256 digest")


def repository_of(namespace: str, system: str, uarch: str, name: str, version: str) -> str:
    """Return ``namespace/system/uarch/name/version``. Raises `LabelError` for a part that a registry cannot hold."""
    parts = {"namespace": namespace, "system": system, "uarch": uarch, "name": name, "version": version}
    for what, part in parts.items():
        if not re.fullmatch(_COMPONENT, part):
            raise LabelError(
                f"the {what} {part!r} cannot be part of a repository name",
                hint="registries allow lower-case letters, digits and, between them, one of . _ __ or dashes",
            )
    repository = "/".join(parts.values())
    if len(repository) > MAX_REPOSITORY_CHARS:
        raise LabelError(
            f"the repository name would have {len(repository)} characters, more than {MAX_REPOSITORY_CHARS}"
        )
    return repository


def split_repository(repository: str) -> tuple[str, str, str, str, str] | None:
    """Return (namespace, system, uarch, name, version); None for a repository that is not of this form."""
    parts = repository.split("/")
    if len(parts) != 5 or not is_repository(repository):
        return None
    return parts[0], parts[1], parts[2], parts[3], parts[4]
