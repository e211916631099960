"""The configuration: every error names file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from uenvd.config import load, parse
from uenvd.errors import ConfigError

MINIMAL = "system: demo\nregistry: oci-layout:/srv/images\n"


def test_two_lines_are_enough() -> None:
    config = parse(MINIMAL, "c.yaml")
    assert config.system == "demo"
    assert config.registry.url == "oci-layout:/srv/images"
    assert config.namespaces == ("deploy",)
    assert config.resolve_ttl_s == 60


def test_all_keys() -> None:
    config = parse(
        """
system: alps
uarch: gh200
uarchs: [gh200, zen3]
architectures: {a64fx: aarch64}
namespaces: [deploy, build]
registry:
  url: https://registry.example/uenv
  ca_file: /etc/ca.pem
  auth_file: /etc/uenvd/auth.json
  timeout: 10s
control: {socket: /tmp/c}
run_dir: /tmp/r
cache: {local: /tmp/cache}
resolve: {ttl: 5m, deadline: 500ms}
mounts: {points: [/user-environment], linger: 1h}
worker: {user: nobody, cache: 128MiB}
limits: {connections: 3, mounts: 2, pulls: 1}
""",
        "c.yaml",
    )
    assert (config.resolve_ttl_s, config.resolve_deadline_s, config.linger_s) == (300, 0.5, 3600)
    assert config.worker_cache_bytes == 128 << 20
    assert config.registry.auth_file == Path("/etc/uenvd/auth.json")
    assert config.architecture_of("a64fx") == config.architecture_of("gh200") == "aarch64"
    assert config.architecture_of("zen3") == "x86_64"
    assert config.architecture_of("unheard-of") is None
    assert (config.limits.connections, config.limits.mounts, config.limits.pulls) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("registry: x\n", "c.yaml:1: system: is missing"),
        ("system: demo\n", "c.yaml:1: registry: is missing"),
        (MINIMAL + "cache:\n  lcoal: /x\n", "c.yaml:4: cache.lcoal: is no key"),
        (MINIMAL + "colour: blue\n", "c.yaml:3: colour: is no key"),
        (MINIMAL + "system: again\n", "c.yaml:3: system: is given twice (first in line 1)"),
        (MINIMAL + "resolve: {ttl: soon}\n", "c.yaml:3: resolve.ttl: 'soon' is no duration"),
        (MINIMAL + "worker: {cache: much}\n", "c.yaml:3: worker.cache: 'much' is no size"),
        (MINIMAL + "cache: {local: relative}\n", "c.yaml:3: cache.local: 'relative' is no absolute path"),
        (MINIMAL + "limits: {mounts: 0}\n", "c.yaml:3: limits.mounts:"),
        (MINIMAL + "limits: 7\n", "c.yaml:3: limits: must be a mapping"),
        (MINIMAL + "uarch: [a, b]\n", "c.yaml:3: uarch: must be a text"),
        (MINIMAL + "uarch: a/b\n", "c.yaml:3: uarch: 'a/b' is no name"),
        (MINIMAL + "namespaces: {a: b}\n", "c.yaml:3: namespaces: must be a list"),
        ("system: demo\n  registry: [\n", "c.yaml:2: not valid YAML"),
        ("- a\n- b\n", "c.yaml:1: the file: must be a mapping"),
        ("system: demo\nregistry:\n  auth_file: /x\n", "c.yaml:2: registry.url: is missing"),
    ],
)
def test_an_error_names_file_line_and_key(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml")
    assert where in caught.value.message


def test_a_misspelt_key_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MINIMAL + "cache:\n  lcoal: /x\n", "c.yaml")
    assert "local" in caught.value.hint


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "binary.yaml")
