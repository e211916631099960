"""Every input of an image with its hash, and why two sets of inputs make two images.

The document (``inputs.json`` in the metadata of an image) has, beside ``version`` and ``label``: ``builder``, ``mount``, ``recipe`` (file ->
digest, with ``+x`` where it is a program), ``inputs`` (Debian package, wheel, source, file of the system's configuration -> digest), ``tools``
(program of the machine that builds -> version), ``environment`` (variable -> digest of its value, which may be a secret), and once it was built
``image``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from uenvd.publish.build.kinds import Builder, Site, identity
from uenvd.publish.recipe import Recipe

VERSION: Final = 1
MAX_LOCK_BYTES: Final = 16 << 20
_SECTIONS: Final = (
    ("recipe", "the recipe's file"),
    ("inputs", "the"),
    ("tools", "this machine's"),
    ("environment", "the variable"),
)


def inputs_of(recipe: Recipe, builder: Builder, site: Site, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the document for a build that is to come. Nothing is fetched. Raises `ResourceMissing`."""
    files = {}
    for relative in recipe.files():
        path = recipe.directory / relative
        program = "+x" if path.stat().st_mode & 0o100 else ""
        files[relative.as_posix()] = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}{program}"
    return {
        "version": VERSION,
        "label": recipe.label,
        "builder": identity(builder),
        "mount": recipe.mount,
        "recipe": files,
        "inputs": dict(sorted(builder.pinned(recipe, site).items())),
        "tools": dict(sorted(builder.tools(recipe, site).items())),
        "environment": {
            name: _guarded(recipe.label, name, value) for name, value in sorted(environment.items())
        },
    }


def _guarded(label: str, name: str, value: str) -> str:
    """Return a digest from which a value that may be a password cannot be found by trying; images are public."""
    salt = f"{label} {name}".encode()
    return f"scrypt:{hashlib.scrypt(value.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=16).hex()}"


def read_lock(path: Path) -> dict[str, Any] | None:
    """Return the document of an earlier build; None where there is none that can be read."""
    try:
        if path.stat().st_size > MAX_LOCK_BYTES:
            return None
        return parse_lock(path.read_bytes())
    except OSError:
        return None


def parse_lock(data: bytes) -> dict[str, Any] | None:
    """Return the document, None for what is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("version") == VERSION else None


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return why the images of two documents differ, a line for each reason; none if they are of the same inputs."""
    found = []
    for key, name in (
        ("label", "name and version"),
        ("builder", "uenvd's builder"),
        ("mount", "the mount point"),
    ):
        if old.get(key) != new.get(key):
            found.append(f"{name} changed: {old.get(key)} -> {new.get(key)}")
    for key, name in _SECTIONS:
        found += _section(name, _texts(old.get(key)), _texts(new.get(key)), shown=key == "tools")
    return found


def _section(name: str, old: Mapping[str, str], new: Mapping[str, str], *, shown: bool) -> list[str]:
    lines = []
    gone = {_stem(key): key for key in old if key not in new}
    for key, value in new.items():
        if key not in old:
            before = gone.pop(_stem(key), None)
            if before is not None and _stem(key) != key:
                lines.append(f"{name} {before} is now {key.removeprefix(_stem(key)).lstrip('=')}")
            else:
                lines.append(f"{name} {key} is new")
        elif old[key] != value:
            lines.append(
                f"{name} {key}: {old[key]} -> {value}" if shown else f"{name} {key} has other contents"
            )
    lines += [f"{name} {key} is gone" for key in gone.values()]
    return lines


def _stem(key: str) -> str:
    """Return a package's name without its version."""
    return key.partition("=")[0]


def _texts(value: object) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}
