"""docs/admin.md describes exactly the keys that the configuration has, and the example is one that works."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from uenvd import config
from uenvd.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTED = re.findall(r"^\| `([a-z_.]+)` \|", (CHECKOUT / "docs/admin.md").read_text(), re.MULTILINE)


def is_known(key: str) -> bool:
    """Whether the parser knows a key (it need not like the value)."""
    *section, name = key.split(".")
    text = f"{section[0]}: {{{name}: '?'}}" if section else f"{name}: '?'"
    try:
        config.parse(
            text + "\nsystem: s\nregistry: oci-layout:/r\n" if key not in ("system", "registry") else text,
            "test",
        )
    except ConfigError as error:
        return "is no key" not in error.message
    return True


def keys_in_the_code() -> set[str]:
    source = inspect.getsource(config.parse)
    sections = dict(re.findall(r"(\w+) = top\.section\(\"(\w+)\"\)", source)) | {"top": ""}
    found = re.findall(r"(\w+)\.(?:take|need)\(\"(\w+)\"", source)
    return {f"{sections[variable]}.{key}".lstrip(".") for variable, key in found}


@pytest.mark.parametrize("key", DOCUMENTED)
def test_documented_key_exists(key: str) -> None:
    assert is_known(key)


def test_unknown_key_is_recognised_by_this_test() -> None:
    assert not is_known("nonsense")
    assert not is_known("cache.nonsense")


def test_every_key_is_documented() -> None:
    assert keys_in_the_code() - set(DOCUMENTED) == set()


def test_example_is_valid() -> None:
    text = (CHECKOUT / "systemd/config.yaml").read_text()
    assert config.parse(text, "config.yaml").system == "demo"
    commented = re.sub(r"^#(?=uarch|registry|  )", "", text, flags=re.MULTILINE)
    second = commented.replace("registry: oci-layout:/var/lib/uenvd/registry\n", "", 1)
    assert config.parse(second, "config.yaml").registry.url == "https://registry.example.org/uenv"
