"""The daemon's configuration: YAML text -> typed values.

Every error names file, line and key. Unknown keys are errors (with a suggestion), because a misspelt limit that is
silently ignored is worse than a daemon that does not start. docs/admin.md describes the keys.
"""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import yaml

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

T = TypeVar("T")


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
    pulls: int = 8


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
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}:1: not valid YAML: {error}") from error
    top = _Section(name, "", root)
    registry_node = top.node("registry")
    if registry_node is None:
        top.fail("registry", "is missing", hint="for example  registry: oci-layout:/var/lib/uenvd/registry")

    def address(node: yaml.Node) -> str:
        url = _text(node)
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
            ca_file=section.take("ca_file", _path, None),
            auth_file=section.take("auth_file", _path, None),
            timeout_s=section.take("timeout", _seconds, 30.0),
        )
        section.end()
    control = top.section("control")
    cache = top.section("cache")
    resolve = top.section("resolve")
    mounts = top.section("mounts")
    worker = top.section("worker")
    limits = top.section("limits")
    config = Config(
        system=top.need("system", _word),
        registry=registry,
        uarch=top.take("uarch", _word, None),
        uarchs=top.take("uarchs", _words, ()),
        architectures=top.take("architectures", _word_map, {}),
        namespaces=top.take("namespaces", _words, ("deploy",)),
        socket=control.take("socket", _path, Config.socket),
        run_dir=top.take("run_dir", _path, Config.run_dir),
        cache_local=cache.take("local", _path, Config.cache_local),
        resolve_ttl_s=resolve.take("ttl", _seconds, Config.resolve_ttl_s),
        resolve_deadline_s=resolve.take("deadline", _seconds, Config.resolve_deadline_s),
        mount_points=mounts.take("points", _paths, Config.mount_points),
        linger_s=mounts.take("linger", _seconds, Config.linger_s),
        worker_user=worker.take("user", _text, Config.worker_user),
        worker_cache_bytes=worker.take("cache", _size, Config.worker_cache_bytes),
        limits=Limits(
            connections=limits.take("connections", _count, Limits.connections),
            mounts=limits.take("mounts", _count, Limits.mounts),
            pulls=limits.take("pulls", _count, Limits.pulls),
        ),
    )
    for section in (control, cache, resolve, mounts, worker, limits, top):
        section.end()
    return config


class _Section:
    """A mapping of the document, read key by key; what was not read in the end is an error."""

    def __init__(self, file: str, prefix: str, node: yaml.Node | None, line: int = 1) -> None:
        self._file = file
        self._prefix = prefix
        self._line = line
        self._values: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        self._known: set[str] = set()
        if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
            return
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{file}:{self._line}: {prefix.rstrip('.') or 'the file'}: must be a mapping of keys to values"
            )
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in self._values:
                raise ConfigError(
                    f"{file}:{line}: {prefix}{key}: is given twice (first in line {self._lines[key]})"
                )
            self._values[key] = value_node
            self._lines[key] = line

    def fail(self, key: str, problem: str, *, hint: str | None = None) -> NoReturn:
        line = self._lines.get(key, self._line)
        raise ConfigError(f"{self._file}:{line}: {self._prefix}{key}: {problem}", hint=hint)

    def node(self, key: str) -> yaml.Node | None:
        self._known.add(key)
        return self._values.get(key)

    def section(self, key: str) -> _Section:
        return _Section(self._file, f"{self._prefix}{key}.", self.node(key), self._lines.get(key, self._line))

    def take(self, key: str, convert: Callable[[yaml.Node], T], default: T | None) -> T:
        node = self.node(key)
        if node is None:
            return default  # type: ignore[return-value]  # None only where T admits it
        try:
            return convert(node)
        except ValueError as error:
            self.fail(key, str(error))

    def need(self, key: str, convert: Callable[[yaml.Node], T]) -> T:
        if self.node(key) is None:
            self.fail(key, "is missing")
        return self.take(key, convert, None)

    def end(self) -> None:
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                self.fail(
                    key,
                    "is no key that uenvd knows",
                    hint=f"did you mean {near[0]!r}?" if near else "see docs/admin.md",
                )


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise ValueError("must be a text")
    return str(node.value)


def _word(node: yaml.Node) -> str:
    text = _text(node)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        raise ValueError(f"{text!r} is no name (letters, digits, '_', '.', '-')")
    return text


def _items(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.ScalarNode):
        return [node]
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError("must be a list")  # noqa: TRY004  # a wrong value of the document, not of our caller
    return list(node.value)


def _words(node: yaml.Node) -> tuple[str, ...]:
    return tuple(_word(item) for item in _items(node))


def _word_map(node: yaml.Node) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of names to names")  # noqa: TRY004
    return {_word(key): _word(value) for key, value in node.value}


def _path(node: yaml.Node) -> Path:
    text = _text(node)
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is no absolute path")
    return Path(text)


def _paths(node: yaml.Node) -> tuple[str, ...]:
    return tuple(str(_path(item)) for item in _items(node))


def _seconds(node: yaml.Node) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", _text(node))
    if not match:
        raise ValueError(f"{node.value!r} is no duration (for example 60s, 500ms, 5m)")
    return float(match[1]) * {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def _size(node: yaml.Node) -> int:
    match = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB|TiB|B)?", _text(node))
    if not match:
        raise ValueError(f"{node.value!r} is no size (for example 64MiB, 20GiB)")
    return int(match[1]) << {None: 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[match[2]]


def _count(node: yaml.Node) -> int:
    text = _text(node)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise ValueError(f"{text!r} is no number from 1 up")
    return int(text)
