"""Images with a chunk list in a registry that can be spoilt, for tests of lazy starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from support.daemon import Client, Daemon
from support.publishing import env_json, make_squashfs
from support.registry import FakeRegistry, RealRegistry
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import no_progress, open_remote
from uenvd.publish.push import Target, push_image

MOUNT_POINT = "/user-environment"
LABEL = "app/1.0:v1"
MB = 1 << 20


@dataclass
class LazyImage:
    """An image of random files ``f0``, ``f1``, ... of one MiB each, in the order of the image."""

    digest: str
    layer: str
    size_bytes: int
    files: dict[str, bytes] = field(repr=False)

    @property
    def blob_path(self) -> str:
        """Regular expression for requests of the squashfs blob, and of no other."""
        return f"/blobs/{self.layer}"


def push_lazy(
    fake: FakeRegistry | RealRegistry, directory: Path, *, files: int = 12, name: str = "app"
) -> LazyImage:
    """Make and push an image as ``uenvd-publish push`` does; ``name/1.0:v1``."""
    directory.mkdir(parents=True, exist_ok=True)
    content: dict[str, bytes | str] = {f"f{number:02}": os.urandom(MB) for number in range(files)}
    content["word"] = name
    views = {"default": {"list": {}, "scalar": {"WORD": name}}}
    path = make_squashfs(directory / f"{name}.squashfs", content, meta=env_json(name, views=views))
    remote = open_remote(parse_registry(fake.url))
    repository = f"deploy/demo/zen3/{name}/1.0"
    pushed = push_image(remote, path, Target(repository, "v1"), hashing=no_progress, progress=no_progress)
    layer = squashfs_layer(remote.manifest(repository, pushed.digest))
    data = {key: value for key, value in content.items() if isinstance(value, bytes)}
    return LazyImage(pushed.digest, layer.digest, layer.size_bytes, data)


def mounted(client: Client, uenv: str = LABEL) -> dict[str, object]:
    """Mount an image and wait until it can be used; return what `wait` answered."""
    answer = client.ask("mount", uenv=uenv)
    assert answer["ok"], answer
    done = client.ask("wait", lease=answer["lease"])
    assert done["ok"], done
    return done


def arrived_bytes(daemon: Daemon) -> int:
    """Return how much of its one image a daemon has verified."""
    (image,) = daemon.ask("status")["images"]
    return int(image["done_bytes"])
