"""Signatures of images: Ed25519 over what an image is and what it is called, attached to it, checked without any network.

A signature is an attachment (``uenv/signature``) with one DSSE envelope (github.com/secure-systems-lab/dsse, protocol 1.0.2) whose payload says
the digest of the manifest and the name for which it was signed: ``system/uarch/name/version``. Without the name, whoever may write to the registry
could offer one signed image as another. It may also say the tags under which the image is released: then it is not believed under any other tag.
The namespace is not part of it, so that a signature stays right when an image is promoted. Keys are
PEM files: private ones PKCS #8 (RFC 5958) and readable by their owner only, public ones SubjectPublicKeyInfo (RFC 5280), which OpenSSL reads too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uenvd.errors import ConfigError, ManifestError, NotFound, SignatureRefused, UsageError
from uenvd.oci.attach import Content, attach, attachments
from uenvd.oci.reference import split_repository
from uenvd.oci.remote import Remote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_TYPE: Final = "uenv/signature"
ENVELOPE_TYPE: Final = "application/vnd.dsse.envelope.v1+json"
PAYLOAD_TYPE: Final = "application/vnd.uenvd.signature.v1+json"
SIGNER: Final = "dev.uenvd.signature.key"
"""Annotation: the key's id, for humans; it is not believed."""
KEY_SUFFIX: Final = ".pub"
MAX_ENVELOPE_BYTES: Final = 16 << 10
MAX_SIGNATURES: Final = 16
"""Of one image; more are not looked at."""
MAX_KEYS: Final = 200
_MAX_KEY_BYTES: Final = 16 << 10


@dataclass(frozen=True)
class PublicKey:
    """A key that a site believes."""

    name: str
    """Of its file, without the suffix."""
    key_id: str
    """``sha256:`` and the digest of its SubjectPublicKeyInfo (DER)."""
    key: Ed25519PublicKey


@dataclass(frozen=True)
class PrivateKey:
    """A key to sign with."""

    key_id: str
    key: Ed25519PrivateKey


# --- keys ---------------------------------------------------------------------------------------------------------------------------


def make_keys(private: Path, public: Path) -> str:
    """Make a pair of keys, the private one with mode 0600; return the key's id. Raises `UsageError`, also for files that exist."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(private, secret, 0o600)
    try:
        _write_new(public, shown, 0o644)
    except UsageError:
        private.unlink()
        raise
    return _key_id(key.public_key())


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise UsageError(f"{path} exists already", hint="keys are never overwritten") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def read_private_key(path: Path) -> PrivateKey:
    """Read a key to sign with. Raises `UsageError` also where others may read it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise UsageError(f"the key {path} may be read by others", hint=f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} holds no private key without passphrase") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"the key {path} is not one of Ed25519", hint="make one: uenvd-publish keygen")
    return PrivateKey(_key_id(key.public_key()), key)


def read_keys(directory: Path) -> dict[str, PublicKey]:
    """Read all ``*.pub`` of a directory: key id -> key. Raises `ConfigError` for a directory or a file that cannot be used."""
    try:
        paths = sorted(path for path in directory.iterdir() if path.name.endswith(KEY_SUFFIX))
        found = [_public_key(path) for path in paths[:MAX_KEYS]]
    except OSError as error:
        raise ConfigError(f"the keys in {directory} cannot be read: {error.strerror}") from error
    return {key.key_id: key for key in found}


def _public_key(path: Path) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    with path.open("rb") as file:
        data = file.read(_MAX_KEY_BYTES + 1)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"the key {path} is not one of Ed25519")
    return PublicKey(path.name.removesuffix(KEY_SUFFIX), _key_id(key), key)


def _key_id(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(der).hexdigest()


# --- envelopes ----------------------------------------------------------------------------------------------------------------------


def signed_name(repository: str) -> str:
    """Return the name of an image that a signature is about: ``system/uarch/name/version``. Raises `UsageError`."""
    parts = split_repository(repository)
    if parts is None:
        raise UsageError(f"{repository} is no repository of images")
    return "/".join(parts[1:])


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed (DSSE, "PAE")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def envelope(key: PrivateKey, name: str, digest: str, tags: Iterable[str] = ()) -> bytes:
    """Sign; equal arguments give equal bytes. ``tags``: the only ones under which it holds; none: it says nothing of tags."""
    said: dict[str, Any] = {"image": name, "digest": digest, "version": 1}
    bound = sorted(set(tags))
    if bound:
        said["tags"] = bound
    payload = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    signature = key.key.sign(pre_authentication(PAYLOAD_TYPE, payload))
    body = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def check_envelopes(
    envelopes: Iterable[bytes],
    keys: Mapping[str, PublicKey],
    name: str,
    digest: str,
    tag: str | None = None,
    *,
    tag_needed: bool = False,
) -> PublicKey:
    """Return the key of the first envelope that is right for this image under this name. Raises `SignatureRefused` with the reasons.

    ``tag``: by which it was asked for, and which stays with one image; None: by its digest, or by one that moves. ``tag_needed``: an
    envelope that says nothing of tags is not believed for one.
    """
    reasons = []
    for raw in envelopes:
        try:
            return _check(raw, keys, name, digest, tag, tag_needed=tag_needed)
        except ValueError as error:
            reasons.append(str(error))
    if not reasons:
        raise SignatureRefused(f"the image {digest} is not signed")
    raise SignatureRefused(
        f"no signature of {digest} is good: " + "; ".join(dict.fromkeys(reasons)),
        hint="it must be signed under this very name, with a key that this site believes"
        + (f"; under a further tag: uenvd-publish sign LABEL --tag {tag}" if tag is not None else ""),
    )


def _check(
    raw: bytes,
    keys: Mapping[str, PublicKey],
    name: str,
    digest: str,
    tag: str | None,
    *,
    tag_needed: bool,
) -> PublicKey:
    """Raises ValueError that says why the envelope is not good."""
    from cryptography.exceptions import InvalidSignature

    try:
        body: Any = json.loads(raw)
        kind, payload = body["payloadType"], base64.b64decode(body["payload"], validate=True)
        signatures = [
            (one["keyid"], base64.b64decode(one["sig"], validate=True)) for one in body["signatures"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise ValueError("one is malformed") from error
    if kind != PAYLOAD_TYPE:
        raise ValueError("one signs something else")
    for key_id, signature in signatures[:MAX_SIGNATURES]:
        key = keys.get(key_id) if isinstance(key_id, str) else None
        if key is None:
            continue
        try:
            key.key.verify(signature, pre_authentication(PAYLOAD_TYPE, payload))
        except InvalidSignature as error:
            raise ValueError(f"one that claims to be of {key.name} is forged or damaged") from error
        said = json.loads(payload)
        if not isinstance(said, dict) or said.get("digest") != digest:
            raise ValueError(f"one by {key.name} is of another image")
        if said.get("image") != name:
            raise ValueError(f"one by {key.name} is for {str(said.get('image'))[:200]}, not {name}")
        if tag is not None:
            _check_tag(said.get("tags"), key.name, tag, needed=tag_needed)
        return key
    shown = ", ".join(str(key_id)[:19] for key_id, _signature in signatures[:4]) or "nobody"
    raise ValueError(f"one is by {shown}, an unknown key")


def _check_tag(said: object, signer: str, tag: str, *, needed: bool) -> None:
    """Raises ValueError unless what an envelope says of tags allows this one."""
    if said is None and not needed:
        return
    if said is None:
        raise ValueError(f"one by {signer} does not say that it is for the tag {tag}")
    if not isinstance(said, list) or tag not in said:
        shown = ", ".join(map(str, said))[:200] if isinstance(said, list) else "something else"
        raise ValueError(f"one by {signer} is for the tag {shown}, not {tag}")


# --- in a registry ------------------------------------------------------------------------------------------------------------------


def sign(remote: Remote, repository: str, digest: str, key: PrivateKey, tags: Iterable[str] = ()) -> str:
    """Sign an image and attach the signature; return the digest of the attachment. ``tags`` as in `envelope`. Raises the remote's errors."""
    data = envelope(key, signed_name(repository), digest, tags)
    content = Content("signature.json", data, ENVELOPE_TYPE)
    return attach(remote, repository, digest, SIGNATURE_TYPE, [content], {SIGNER: key.key_id})


def read_envelopes(remote: Remote, repository: str, digest: str) -> list[bytes]:
    """Return what claims to sign an image, the newest first. Raises the remote's errors."""
    found = []
    for manifest in attachments(remote, repository, digest, SIGNATURE_TYPE)[:MAX_SIGNATURES]:
        for layer in manifest.layers[:1]:
            try:
                found.append(remote.small_blob(repository, layer, MAX_ENVELOPE_BYTES))
            except (ManifestError, NotFound):
                continue
    return found


def verify(
    remote: Remote,
    repository: str,
    digest: str,
    keys: Mapping[str, PublicKey],
    tag: str | None = None,
    *,
    tag_needed: bool = False,
) -> PublicKey:
    """Return the key that signed an image; ``tag`` as in `check_envelopes`. Raises `SignatureRefused`, `UsageError`, and the remote's errors."""
    return check_envelopes(
        read_envelopes(remote, repository, digest),
        keys,
        signed_name(repository),
        digest,
        tag,
        tag_needed=tag_needed,
    )
