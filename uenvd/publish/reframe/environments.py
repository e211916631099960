"""``extra/reframe.yaml`` of a recipe, ``meta/extra/reframe.yaml`` of an image: the environments in which it wants to be tested. Pure.

A mapping of names to environments. The keys are those of CSCS's uenv recipes (features, cc, cxx, ftn, views, activation, extras) and one of
ours: ``uenv: false`` makes an environment of the plain host, in which the tests that select it run without any image, for comparison.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from uenvd import yamlfile

MANUAL: Final = "docs/testing-images.md"
IMAGE_FILE: Final = "meta/extra/reframe.yaml"
"""Inside an image."""
TESTS_DIRECTORY: Final = "meta/extra/reframe"
"""Inside an image: test files and what they need."""
MAX_FILE_BYTES: Final = 1 << 20
MAX_ENVIRONMENTS: Final = 1000

_DIALECT: Final = yamlfile.Dialect(manual=MANUAL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class TestEnvironment:
    """One environment of ReFrame."""

    __test__ = False

    name: str
    features: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    """As for ``--view``: ``view`` or ``uenv:view``."""
    activation: tuple[str, ...] = ()
    """Shell commands after the views, before each test."""
    cc: str | None = None
    cxx: str | None = None
    ftn: str | None = None
    extras: dict[str, Any] = field(default_factory=dict, hash=False)
    uenv: bool = True
    """Whether the image is mounted."""


def parse_environments(text: str, source: str) -> tuple[TestEnvironment, ...]:
    """Parse the file's text; ``source`` is its name in messages. Raises `ConfigError` that names file, line and key."""
    document = yamlfile.Section(source, "", yamlfile.compose(text, source, _DIALECT), 1, _DIALECT)
    found = []
    for name in document:
        section = document.section(name)
        if not _NAME.fullmatch(name):
            document.fail(name, "is no name of an environment (letters, digits, '_', '-', no digit first)")
        found.append(_environment(name, section))
        if len(found) > MAX_ENVIRONMENTS:
            document.fail(name, f"more than {MAX_ENVIRONMENTS} environments")
    document.end()
    return tuple(found)


def _environment(name: str, section: yamlfile.Section) -> TestEnvironment:
    activation = section.node("activation")
    script: tuple[str, ...] = ()
    if isinstance(activation, yaml.ScalarNode) and not yamlfile.is_null(activation):
        if not re.fullmatch(r"/[^\s'\"$`;&|]+", activation.value):
            section.fail(
                "activation",
                "must be a list of shell commands",
                hint="a script is written as a list too: activation: ['. /path/of/script']",
            )
        # Recipes of early 2024: the absolute path of a script.
        script = (f". {activation.value}",)
    environment = TestEnvironment(
        name,
        features=section.take("features", _features, ()),
        views=section.take("views", _views, ()),
        activation=script or section.take("activation", _texts, ()),
        cc=section.take("cc", yamlfile.text, None),
        cxx=section.take("cxx", yamlfile.text, None),
        ftn=section.take("ftn", yamlfile.text, None),
        extras=section.take("extras", _extras, {}),
        uenv=section.take("uenv", yamlfile.truth, True),
    )
    section.end()
    if environment.views and not environment.uenv:
        section.fail("views", "an environment without a uenv (uenv: false) has no views")
    return environment


def _texts(node: yaml.Node) -> tuple[str, ...]:
    return () if yamlfile.is_null(node) else yamlfile.texts(node)


def _views(node: yaml.Node) -> tuple[str, ...]:
    views = _texts(node)
    for view in views:
        if not re.fullmatch(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*:)?[A-Za-z0-9_][A-Za-z0-9_.-]*", view):
            raise ValueError(f"{view!r} is no name of a view")
    return views


def _features(node: yaml.Node) -> tuple[str, ...]:
    features = _texts(node)
    for feature in features:
        if not _NAME.fullmatch(feature):
            raise ValueError(f"{feature!r} is no feature (letters, digits, '_', '-', no digit first)")
    return features


def _extras(node: yaml.Node) -> dict[str, Any]:
    if yamlfile.is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of names to values")  # noqa: TRY004  # the document's fault
    loader = yaml.SafeLoader("")
    try:
        extras = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read: {error}") from error
    finally:
        loader.dispose()
    for key in extras:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no name (letters, digits and '_', no digit first)")
    return dict(extras)
