"""Images for tests of the daemon: small trees, squashed, put into a registry as `uenvd-publish push` or a stock `oras push` would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uenvd.oci.manifest import (
    CONFIG_TYPE,
    EMPTY_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    ImageConfig,
    build_manifest,
    digest_of,
)
from uenvd.oci.reference import parse_registry, repository_of
from uenvd.oci.remote import Remote, open_remote
from uenvd.views import ImageMeta, read_image_meta

EMPTY_CONFIG = b"{}"


def env_json(
    name: str, *, mount: str | None = "/user-environment", views: Mapping[str, Any] | None = None
) -> bytes:
    """Return a ``meta/env.json`` of version 1; ``views`` maps a name to the ``values`` of its environment."""
    return json.dumps(
        {
            "name": name,
            "description": f"{name} for tests",
            "mount": mount,
            "modules": None,
            "views": {
                view: {
                    "activate": "",
                    "description": f"the view {view}",
                    "root": "",
                    "env": {"version": 1, "values": values},
                }
                for view, values in (views or {}).items()
            },
        }
    ).encode()


def make_squashfs(
    path: Path,
    files: Mapping[str, bytes | str],
    *,
    meta: bytes | None = None,
    links: Mapping[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> Path:
    """Squash a tree of regular files and symbolic ``links`` (``meta`` becomes meta/env.json), owned by root, world-readable."""
    tree = path.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    contents = dict(files) | ({"meta/env.json": meta} if meta is not None else {})
    for name, content in contents.items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        target.chmod(0o755 if name.startswith("bin/") else 0o644)
    tree.mkdir(exist_ok=True)
    for name, link_target in (links or {}).items():
        (tree / name).symlink_to(link_target)
    path.unlink(missing_ok=True)
    environ = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    subprocess.run(
        [
            "mksquashfs",
            tree,
            path,
            "-comp",
            "zstd",
            "-all-root",
            "-all-time",
            "1700000000",
            "-no-progress",
            "-quiet",
            *options,
        ],
        check=True,
        capture_output=True,
        env=environ,
    )
    shutil.rmtree(tree)
    path.chmod(0o644)
    return path


def simple_image(
    path: Path, name: str, word: str, *, mount: str | None = "/user-environment", megabytes: int = 0
) -> Path:
    """Make an image that says ``word``: in a file, in a program ``bin/say``, in the variable WORD of its view ``default``."""
    views = {
        "default": {
            "list": {"PATH": [{"op": "prepend", "value": [f"{mount}/bin"]}]},
            "scalar": {"WORD": word},
        },
        "plain": {"list": {}, "scalar": {"PLAIN": "yes"}},
    }
    files: dict[str, bytes | str] = {"word": word, "bin/say": f"#!/bin/sh\necho {word}\n"}
    if megabytes:
        files["ballast"] = os.urandom(megabytes << 20)
    return make_squashfs(path, files, meta=env_json(name, mount=mount, views=views))


def image_meta(path: Path) -> ImageMeta | None:
    """Read the metadata of an image by unsquashfs, independently of our reader."""

    def read(name: bytes) -> bytes | None:
        done = subprocess.run(["unsquashfs", "-cat", path, name.decode()], capture_output=True, check=False)
        return done.stdout if done.returncode == 0 else None

    return read_image_meta(read)


class Publisher:
    """Puts images into a registry or layout."""

    def __init__(
        self, registry: str, *, system: str = "demo", uarch: str = "zen3", namespace: str = "deploy"
    ) -> None:
        address = parse_registry(registry)
        if address.kind == "layout":
            Path(registry.removeprefix("oci-layout:")).mkdir(parents=True, exist_ok=True)
        self.remote: Remote = open_remote(address)
        self._system, self._uarch, self._namespace = system, uarch, namespace

    def push(
        self,
        image: Path,
        label: str,
        *tags: str,
        uarch: str | None = None,
        system: str | None = None,
        stock: bool = False,
        architecture: str | None = None,
        layer_digest: str | None = None,
        created: str = "2026-11-01T00:00:00Z",
    ) -> str:
        """Push ``name/version`` under tags; return the manifest's digest. ``stock``: as plain `oras push` does, no metadata."""
        name, _slash, version = label.partition("/")
        repository = repository_of(
            self._namespace, system or self._system, uarch or self._uarch, name, version
        )
        digest = (
            layer_digest
            or "sha256:"
            + subprocess.run(["sha256sum", image], check=True, capture_output=True, text=True).stdout.split()[
                0
            ]
        )
        layer = Descriptor(
            "application/vnd.oci.image.layer.v1.tar" if stock else SQUASHFS_TYPE,
            digest,
            image.stat().st_size,
            {"org.opencontainers.image.title": "store.squashfs"},
        )
        self.remote.push_blob(repository, image, layer)
        if stock:
            config = self.remote.push_bytes(repository, EMPTY_CONFIG, EMPTY_TYPE)
        else:
            data = ImageConfig(meta=image_meta(image), architecture=architecture).encode()
            config = self.remote.push_bytes(repository, data, CONFIG_TYPE)
        raw = build_manifest(layer, config, {}, created=created)
        for tag in tags:
            self.remote.push_manifest(repository, tag, raw)
        return digest_of(raw)

    def retag(self, label: str, digest: str, tag: str) -> None:
        """Point a tag at an image that is there."""
        name, _slash, version = label.partition("/")
        repository = repository_of(self._namespace, self._system, self._uarch, name, version)
        self.remote.push_manifest(repository, tag, self.remote.manifest(repository, digest).raw)
