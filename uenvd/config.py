"""The daemon's configuration: YAML text -> typed values.

Every error names file, line and key. Unknown keys are errors (with a suggestion), because a misspelt limit that is
silently ignored is worse than a daemon that does not start. docs/admin.md describes the keys.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from uenvd import own
from uenvd import yamlfile as y
from uenvd.errors import ConfigError, LabelError, UenvError
from uenvd.label import Label, parse_namespaced_label

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


LOG_FORMATS: Final = ("auto", "text", "json", "journal")


@dataclass(frozen=True)
class RegistryConfig:
    """Where images come from."""

    url: str
    ca_file: Path | None = None
    auth_file: Path | None = None
    token_file: Path | None = None
    """A password or token in the first line of a file that nobody else may read, used instead of ``auth_file``."""
    username: str = ""
    """Whose token that is."""
    timeout_s: float = 30.0
    mirrors: tuple[str, ...] = ()
    """Registries that are asked for content, in this order, before the registry itself."""
    mirrors_resolve: bool = False
    """Believe the mirrors' tags, too."""


@dataclass(frozen=True)
class PullConfig:
    """How images are fetched."""

    connections: int = 4
    piece_bytes: int = 36 << 20
    prefetch_on_submit: bool = False
    """Fetch an image into the shared cache as soon as a job that wants it is submitted."""
    lazy: bool = True
    """Let jobs start before the pull ends, where the image has a chunk list."""
    lazy_deadline_s: float = 45.0
    """How long a read waits for bytes that do not come."""


@dataclass(frozen=True)
class CacheConfig:
    """Where images are kept, whose rights are used, and what limits it (docs/cache.md)."""

    local: Path | None = Path("/var/cache/uenvd")
    """Of this node alone; None on nodes without a disk."""
    shared: Path | None = None
    """Of many nodes."""
    sources: tuple[Path, ...] = ()
    """Further cache directories, which are only read."""
    user: str | None = None
    """The account for all I/O on them; None: the daemon's own."""
    quota_bytes: int | None = None
    shared_quota_bytes: int | None = None
    high: float = 0.95
    """Fraction of a quota above which unused images go, the least recently used first, until ``low``."""
    low: float = 0.80
    copy: bool = False
    """Copy what this node serves from the shared directory into the local one, in the background, while there is room."""
    grace_s: float = 3600.0
    """How long a silent node's images in the shared directory are kept for it."""
    scrub_s: float = 30 * 86400.0
    """Each blob is read again this often; 0: never."""
    scrub_bytes_per_s: int = 20 << 20


@dataclass(frozen=True)
class AccessRule:
    """Images that only members of certain groups may use."""

    images: Label
    """Every field that is given must match; the namespace always is."""
    groups: tuple[str, ...]
    """Membership in one of them is enough."""


@dataclass(frozen=True)
class SignatureConfig:
    """Which images must be signed, and by whom."""

    required: tuple[str, ...] = ()
    """Namespaces of which only signed images are used."""
    keys: Path = Path("/etc/uenvd/keys")
    """Directory of the public keys (``*.pub``) that are believed."""
    tags: bool = False
    """Whether a signature must name the tag by which an image is asked for (one that moves, ``latest``, excepted)."""


MAX_CONNECTIONS: Final = 32
MIN_PIECE_BYTES: Final = 1 << 20
MAX_WORKERS: Final = 64
TRANSPORTS: Final = ("auto", "channel", "pyfuse3")


@dataclass(frozen=True)
class ServingConfig:
    """How images are served, and by how many processes."""

    transport: str = "auto"
    """One of `TRANSPORTS`; ``auto`` is ``channel``."""
    readahead_bytes: int = 512 << 10
    resend: bool = True
    """Ask the kernel (Linux 6.9) for requests whose slots are lost: a second net."""
    workers: int | None = None
    """Of one image; None: as many as processors, at most 2."""
    nice: int = 0
    affinity: tuple[int, ...] = ()
    """Processors on which workers may run; empty: all."""
    hang_s: float = 60.0
    grace_s: float = 60.0


@dataclass(frozen=True)
class Limits:
    """What one user may hold of the daemon at once. Root is exempt."""

    connections: int = 512
    mounts: int = 256
    files: int = 32
    """Of these, mounts of the user's own files: each has a process of its own."""
    memory_bytes: int = 24 << 30
    """What the processes of these files may take together; each file counts as the most that its processes can."""
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
    cache: CacheConfig = field(default_factory=CacheConfig)
    access: tuple[AccessRule, ...] = ()
    signatures: SignatureConfig = field(default_factory=SignatureConfig)
    sources: dict[str, str] = field(default_factory=lambda: {own.NAMESPACE: own.SOURCE})
    """Name -> directory of users' own images; ``%h`` and ``%u`` in it are the user's home and name."""
    resolve_ttl_s: float = 60.0
    resolve_deadline_s: float = 2.5
    mount_points: tuple[str, ...] = ("/user-environment", "/user-tools")
    linger_s: float = 60.0
    pull: PullConfig = field(default_factory=PullConfig)
    worker_user: str = "uenvd-fs"
    worker_cache_bytes: int = 64 << 20
    serving: ServingConfig = field(default_factory=ServingConfig)
    limits: Limits = field(default_factory=Limits)
    log_format: str = "auto"
    metrics_port: int | None = None
    """Loopback port for Prometheus; None: only over the control socket."""

    @property
    def state_dir(self) -> Path:
        """Where this node keeps what should survive a restart."""
        return self.cache.local or self.run_dir

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


def _log_format(node: yaml.Node) -> str:
    text = y.word(node)
    if text not in LOG_FORMATS:
        raise ValueError(f"is one of {', '.join(LOG_FORMATS)}")
    return text


def _port(node: yaml.Node) -> int:
    number = y.count(node)
    if number > 65535:
        raise ValueError("no port number")
    return number


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
            token_file=section.take("token_file", y.path, None),
            username=section.take("username", y.text, ""),
            timeout_s=section.take("timeout", y.seconds, 30.0),
            mirrors=section.take("mirrors", lambda node: y.each(node, address), ()),
            mirrors_resolve=section.take("mirrors_resolve", y.truth, False),
        )
        section.end()
    control = top.section("control")
    cache = top.section("cache")
    resolve = top.section("resolve")
    mounts = top.section("mounts")
    pull = top.section("pull")
    fuse = top.section("fuse")
    worker = top.section("worker")
    limits = top.section("limits")
    log = top.section("log")
    metrics = top.section("metrics")
    lazy = _lazy(top)
    signatures = top.section("signatures")
    config = Config(
        system=top.need("system", y.word),
        registry=registry,
        uarch=top.take("uarch", y.word, None),
        uarchs=top.take("uarchs", y.words, ()),
        architectures=top.take("architectures", y.word_map, {}),
        namespaces=top.take("namespaces", y.words, ("deploy",)),
        socket=control.take("socket", y.path, Config.socket),
        run_dir=top.take("run_dir", y.path, Config.run_dir),
        cache=CacheConfig(
            local=cache.take("local", _path_or_none, CacheConfig.local),  # type: ignore[arg-type]  # None is a value
            shared=cache.take("shared", _path_or_none, None),
            sources=tuple(map(Path, cache.take("sources", y.paths, tuple[str, ...]()))),
            user=cache.take("user", y.word, None),
            quota_bytes=cache.take("quota", y.size, None),
            shared_quota_bytes=cache.take("shared_quota", y.size, None),
            high=cache.take("high", _percent, CacheConfig.high),
            low=cache.take("low", _percent, CacheConfig.low),
            copy=cache.take("copy", _copy, False),
            grace_s=cache.take("grace", y.seconds, CacheConfig.grace_s),
            scrub_s=cache.take("scrub", _days, CacheConfig.scrub_s),
            scrub_bytes_per_s=cache.take("scrub_rate", y.size, CacheConfig.scrub_bytes_per_s),
        ),
        access=top.take("access", _access, ()),
        signatures=SignatureConfig(
            required=signatures.take("required", y.words, ()),
            keys=signatures.take("keys", y.path, SignatureConfig.keys),
            tags=signatures.take("tags", y.truth, SignatureConfig.tags),
        ),
        sources=top.take("sources", _sources, {own.NAMESPACE: own.SOURCE}),
        resolve_ttl_s=resolve.take("ttl", y.seconds, Config.resolve_ttl_s),
        resolve_deadline_s=resolve.take("deadline", y.seconds, Config.resolve_deadline_s),
        mount_points=mounts.take("points", y.paths, Config.mount_points),
        linger_s=mounts.take("linger", y.seconds, Config.linger_s),
        pull=PullConfig(
            connections=pull.take("connections", _connections, PullConfig.connections),
            piece_bytes=pull.take("piece", _piece, PullConfig.piece_bytes),
            prefetch_on_submit=pull.take("prefetch_on_submit", y.truth, False),
            lazy=lazy[0],
            lazy_deadline_s=lazy[1],
        ),
        worker_user=worker.take("user", y.text, Config.worker_user),
        worker_cache_bytes=worker.take("cache", y.size, Config.worker_cache_bytes),
        serving=ServingConfig(
            transport=fuse.take("transport", _transport, ServingConfig.transport),
            readahead_bytes=fuse.take("readahead", y.size, ServingConfig.readahead_bytes),
            resend=fuse.take("resend", _switch, ServingConfig.resend),
            workers=worker.take("count", _worker_count, None),
            nice=worker.take("nice", _nice, ServingConfig.nice),
            affinity=worker.take("affinity", _processors, ServingConfig.affinity),
            hang_s=worker.take("hang", y.seconds, ServingConfig.hang_s),
            grace_s=worker.take("grace", y.seconds, ServingConfig.grace_s),
        ),
        log_format=log.take("format", _log_format, Config.log_format),
        metrics_port=metrics.take("port", _port, None),
        limits=Limits(
            connections=limits.take("connections", y.count, Limits.connections),
            mounts=limits.take("mounts", y.count, Limits.mounts),
            files=limits.take("files", y.count, Limits.files),
            memory_bytes=limits.take("memory", y.size, Limits.memory_bytes),
            pulls=limits.take("pulls", y.count, Limits.pulls),
        ),
    )
    for section in (
        control,
        cache,
        resolve,
        mounts,
        pull,
        fuse,
        worker,
        limits,
        log,
        metrics,
        signatures,
        top,
    ):
        section.end()
    _check(config, top)
    return config


def _check(config: Config, top: y.Section) -> None:
    """Refuse what is right key by key, but not together."""
    cache = config.cache
    if cache.local is None and cache.shared is None:
        top.fail("cache", "neither local nor shared: images need a directory")
    if cache.local is not None and cache.local == cache.shared:
        top.fail(
            "cache", "local and shared are the same directory", hint="leave one of them out (local: none)"
        )
    if cache.low > cache.high:
        top.fail("cache", "low is above high")
    unknown = [name for name in config.signatures.required if name not in config.namespaces]
    if unknown:
        top.fail("signatures", f"{unknown[0]!r} is no namespace that is open here (namespaces)")
    for name in config.sources:
        if name in config.namespaces:
            top.fail("sources", f"{name!r} is a namespace of the registry already")


def _lazy(top: y.Section) -> tuple[bool, float]:
    """Return whether jobs start before the pull ends, and how long their reads wait: ``lazy: auto``, or a mapping."""
    if isinstance(top.node("lazy"), yaml.ScalarNode):
        return top.take("lazy", _auto, PullConfig.lazy), PullConfig.lazy_deadline_s
    section = top.section("lazy")
    found = (
        section.take("start", _auto, PullConfig.lazy),
        section.take("deadline", y.seconds, PullConfig.lazy_deadline_s),
    )
    section.end()
    return found


def _auto(node: yaml.Node) -> bool:
    value = y.text(node)
    if value not in {"auto", "off"}:
        raise ValueError(f"{value!r} is neither 'auto' nor 'off'")
    return value == "auto"


def _connections(node: yaml.Node) -> int:
    number = y.count(node)
    if not 1 <= number <= MAX_CONNECTIONS:
        raise ValueError(f"is 1 to {MAX_CONNECTIONS}")
    return number


def _piece(node: yaml.Node) -> int:
    size_bytes = y.size(node)
    if size_bytes < MIN_PIECE_BYTES:
        raise ValueError(f"is {MIN_PIECE_BYTES >> 20}MiB at least")
    return size_bytes


def _transport(node: yaml.Node) -> str:
    value = y.text(node)
    if value not in TRANSPORTS:
        raise ValueError(f"{value!r} is none of {', '.join(TRANSPORTS)}")
    return value


def _switch(node: yaml.Node) -> bool:
    value = y.text(node)
    if value not in {"on", "off"}:
        raise ValueError(f"{value!r} is neither 'on' nor 'off'")
    return value == "on"


def _worker_count(node: yaml.Node) -> int:
    number = y.count(node)
    if number > MAX_WORKERS:
        raise ValueError(f"is {MAX_WORKERS} at most")
    return number


def _nice(node: yaml.Node) -> int:
    value = y.text(node)
    if not re.fullmatch("1?[0-9]", value):
        raise ValueError(f"{value!r} is no number from 0 to 19")
    return int(value)


def _processors(node: yaml.Node) -> tuple[int, ...]:
    found: set[int] = set()
    for part in y.text(node).split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"{node.value!r} is no list of processors (for example 0-3,8)")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def _path_or_none(node: yaml.Node) -> Path | None:
    return None if y.is_null(node) or y.text(node) == "none" else y.path(node)


def _percent(node: yaml.Node) -> float:
    match = re.fullmatch(r"(\d{1,3})\s*%", y.text(node))
    if not match or not 1 <= int(match[1]) <= 100:
        raise ValueError(f"{node.value!r} is no percentage (for example 90%)")
    return int(match[1]) / 100


def _copy(node: yaml.Node) -> bool:
    value = y.text(node)
    if value not in {"auto", "never"}:
        raise ValueError(f"{value!r} is neither 'auto' nor 'never'")
    return value == "auto"


def _days(node: yaml.Node) -> float:
    value = y.text(node)
    if value == "never":
        return 0.0
    match = re.fullmatch(r"(\d{1,4})\s*d", value)
    return int(match[1]) * 86400.0 if match else y.seconds(node)


def _access(node: yaml.Node) -> tuple[AccessRule, ...]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of namespaces or labels to groups")  # noqa: TRY004
    return tuple(_rule(key, groups) for key, groups in node.value)


def _rule(key: yaml.Node, groups: yaml.Node) -> AccessRule:
    text = y.text(key)
    try:
        images = parse_namespaced_label(text if "::" in text else f"{text}::")
    except LabelError as error:
        raise y.BadItem(error.message, y.line_of(key)) from error
    if images.namespace is None or images.tag is not None or images.digest is not None:
        raise y.BadItem(
            f"{text!r} is neither a namespace nor NAMESPACE::NAME[/VERSION][@SYSTEM][%UARCH]", y.line_of(key)
        )
    names = y.words(groups)
    if not names:
        raise y.BadItem(f"{text!r} is for no group at all", y.line_of(groups))
    return AccessRule(images, names)


def _sources(node: yaml.Node) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of names to directories")  # noqa: TRY004
    found = {}
    for key, value in node.value:
        directory = y.text(value)
        if not re.fullmatch(r"(/|%h(/|$)).*", directory):
            raise y.BadItem(f"{directory!r} begins neither with / nor with %h", y.line_of(value))
        found[y.word(key)] = directory
    return found
