"""The daemon's configuration: YAML text -> typed values.

Every error names file, line and key. Unknown keys are errors (with a suggestion), because a misspelt limit that is
silently ignored is worse than a daemon that does not start. docs/admin.md describes the keys.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.errors import ConfigError, UenvError

DEFAULT_PATH: Final = Path("/etc/uenvd/config.yaml")

ARCHITECTURES: Final = {
    "zen2": "x86_64",
    "zen3": "x86_64",
    "a100": "x86_64",
    "mi200": "x86_64",
    "mi300": "x86_64",
    "gh200": "aarch64",
}
"""Microarchitecture label -> machine name as of uname(2). ``architectures:`` adds to it."""


@dataclass(frozen=True)
class RegistryConfig:
    """Where images come from."""

    url: str
    ca_file: Path | None = None
    auth_file: Path | None = None
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Limits:
    """What one user may hold of the daemon at once. Root is exempt."""

    connections: int = 512
    mounts: int = 256
    files: int = 32
    """Of these, mounts of the user's own files: each has a process of its own."""
    pulls: int = 8
    """Images that are on their way to the node because of him."""


@dataclass(frozen=True)
class Config:
    """The whole configuration, checked."""

    system: str
    registry: RegistryConfig
    uarch: str | None = None
    uarchs: tuple[str, ...] = ()
    architectures: dict[str, str] = field(default_factory=dict)
    namespaces: tuple[str, ...] = ("deploy",)
    socket: Path = Path("/run/uenvd/control")
    run_dir: Path = Path("/run/uenvd")
    cache_local: Path = Path("/var/cache/uenvd")
    resolve_ttl_s: float = 60.0
    resolve_deadline_s: float = 2.5
    mount_points: tuple[str, ...] = ("/user-environment", "/user-tools")
    linger_s: float = 60.0
    worker_user: str = "uenvd-fs"
    worker_cache_bytes: int = 64 << 20
    limits: Limits = field(default_factory=Limits)

    def architecture_of(self, uarch: str | None) -> str | None:
        """Return the machine name for a microarchitecture label; None when unknown."""
        return None if uarch is None else self.architectures.get(uarch, ARCHITECTURES.get(uarch))

    @property
    def machine(self) -> str:
        """This node's machine name, as of uname(2)."""
        return platform.machine()


def load(path: Path, check_registry: Callable[[str], object] = str) -> Config:
    """Read and check a configuration file; ``check_registry`` raises an error of the tree for an address that is none.

    Raises `ConfigError`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", hint="copy the example config.yaml there, or name another with --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse(text, str(path), check_registry)


def parse(text: str, name: str, check_registry: Callable[[str], object] = str) -> Config:
    """Check a configuration text; ``name`` is the file's name for messages. Raises `ConfigError`."""
    top = y.Section(name, "", y.compose(text, name, y.Dialect()))
    registry_node = top.node("registry")
    if registry_node is None:
        top.fail("registry", "is missing", hint="for example  registry: oci-layout:/var/lib/uenvd/registry")

    def address(node: yaml.Node) -> str:
        url = y.text(node)
        try:
            check_registry(url)
        except UenvError as error:
            raise ValueError(error.message) from error
        return url

    if isinstance(registry_node, yaml.ScalarNode):
        registry = RegistryConfig(url=top.take("registry", address, ""))
    else:
        section = top.section("registry")
        registry = RegistryConfig(
            url=section.need("url", address),
            ca_file=section.take("ca_file", y.path, None),
            auth_file=section.take("auth_file", y.path, None),
            timeout_s=section.take("timeout", y.seconds, 30.0),
        )
        section.end()
    control = top.section("control")
    cache = top.section("cache")
    resolve = top.section("resolve")
    mounts = top.section("mounts")
    worker = top.section("worker")
    limits = top.section("limits")
    config = Config(
        system=top.need("system", y.word),
        registry=registry,
        uarch=top.take("uarch", y.word, None),
        uarchs=top.take("uarchs", y.words, ()),
        architectures=top.take("architectures", y.word_map, {}),
        namespaces=top.take("namespaces", y.words, ("deploy",)),
        socket=control.take("socket", y.path, Config.socket),
        run_dir=top.take("run_dir", y.path, Config.run_dir),
        cache_local=cache.take("local", y.path, Config.cache_local),
        resolve_ttl_s=resolve.take("ttl", y.seconds, Config.resolve_ttl_s),
        resolve_deadline_s=resolve.take("deadline", y.seconds, Config.resolve_deadline_s),
        mount_points=mounts.take("points", y.paths, Config.mount_points),
        linger_s=mounts.take("linger", y.seconds, Config.linger_s),
        worker_user=worker.take("user", y.text, Config.worker_user),
        worker_cache_bytes=worker.take("cache", y.size, Config.worker_cache_bytes),
        limits=Limits(
            connections=limits.take("connections", y.count, Limits.connections),
            mounts=limits.take("mounts", y.count, Limits.mounts),
            files=limits.take("files", y.count, Limits.files),
            pulls=limits.take("pulls", y.count, Limits.pulls),
        ),
    )
    for section in (control, cache, resolve, mounts, worker, limits, top):
        section.end()
    return config
