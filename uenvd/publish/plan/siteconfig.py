"""A site's ``config.yaml`` (clusters, uenvs) -> values and problems. Pure: text in, values out.

The format is that of CSCS's alps-uenv repository, of 2024 and of 2026: ``clusters.NAME.{targets,runner,no_bwrap}``,
``uenvs.NAME.VERSION.{recipes,deploy,mount,develop}``. Every problem of the file is collected, not only the first; what is wrong is left out of
the result, the rest is there. Microarchitectures are free names: those of the clusters' targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.errors import RecipeError
from uenvd.publish.plan.cell import Problem, Runner, Severity
from uenvd.publish.recipe.model import DEFAULT_MOUNT
from uenvd.views import clean_mount

DIALECT: Final = y.Dialect(RecipeError, "docs/pipelines.md")
_CLUSTER = re.compile(r"[a-z0-9]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WHERE = re.compile(r"(?P<file>[^\n]*?):(?P<line>\d+): (?:(?P<key>[^\s:]+): )?(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A kind of node of a cluster."""

    uarch: str
    partition: str | None
    variables: Mapping[str, str] = field(hash=False)
    line: int


@dataclass(frozen=True)
class Cluster:
    """A cluster: `targets` by uarch."""

    name: str
    line: int
    targets: Mapping[str, Target] = field(hash=False)
    runner: Runner
    no_bwrap: bool


@dataclass(frozen=True)
class Place:
    """A text of the file and its line."""

    text: str
    line: int


@dataclass(frozen=True)
class Entry:
    """One version of a uenv: `recipes` by uarch, `deploy` by cluster."""

    name: str
    version: str
    line: int
    recipes: Mapping[str, Place] = field(hash=False)
    deploy: Mapping[str, tuple[Place, ...]] = field(hash=False)
    mount: Place

    @property
    def uenv(self) -> str:
        """``name/version``."""
        return f"{self.name}/{self.version}"

    @property
    def key(self) -> str:
        """Where it is in the file."""
        return f"uenvs.{self.name}.{self.version}"


@dataclass(frozen=True)
class SiteConfig:
    """The file."""

    file: str
    clusters: Mapping[str, Cluster] = field(hash=False)
    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]


def problem_of(
    error: RecipeError, *, file: str = "", about: tuple[str, ...] = (), severity: Severity = "error"
) -> Problem:
    """Take apart the message of a reader of YAML, ``file:line: key: text``; what has no such form belongs to ``file``."""
    hint = "" if error.hint == RecipeError.default_hint else error.hint or ""
    match = _WHERE.fullmatch(error.message)
    if match is None:
        text = error.message
        if file and text.startswith(f"{file}: "):
            text = text[len(file) + 2 :]
        return Problem(file, 0, "", text, severity, hint, about)
    return Problem(
        match["file"], int(match["line"]), match["key"] or "", match["text"], severity, hint, about
    )


def parse_site_config(text: str, file: str) -> SiteConfig:
    """Parse the text of the file ``file``. Raises nothing: what is wrong is in `problems`."""
    reader = _Reader(file)
    with reader.attempt():
        document = y.Section(file, "", y.compose(text, file, DIALECT), 1, DIALECT)
        for key in ("clusters", "uenvs"):
            if key not in document:
                reader.add(document, key, "is missing")
        reader.clusters(document)
        reader.uenvs(document)
        document.end()
    return SiteConfig(
        file, MappingProxyType(reader.found), tuple(reader.entries), tuple(dict.fromkeys(reader.problems))
    )


class _Reader:
    def __init__(self, file: str) -> None:
        self.file = file
        self.found: dict[str, Cluster] = {}
        self.entries: list[Entry] = []
        self.problems: list[Problem] = []

    @contextmanager
    def attempt(self, *about: str) -> Iterator[None]:
        """Turn an error into a problem, and go on after the block."""
        try:
            yield
        except RecipeError as error:
            self.problems.append(problem_of(error, file=self.file, about=about))

    def add(self, section: y.Section, key: str, text: str, *about: str, hint: str | None = None) -> None:
        with self.attempt(*about):
            section.fail(key, text, hint=hint)

    def keys(self, parent: y.Section, key: str, *about: str) -> tuple[y.Section | None, tuple[str, ...]]:
        """Return the mapping under a key and its keys; None if it is none."""
        section = None
        with self.attempt(*about):
            section = parent.section(key)
        return section, tuple(section or ())

    def clusters(self, document: y.Section) -> None:
        section, names = self.keys(document, "clusters")
        for name in names:
            assert section is not None
            if not _CLUSTER.fullmatch(name):
                self.add(section, name, "is no name of a cluster (lower-case letters and digits)")
                continue
            body, _ = self.keys(section, name)
            if body is not None:
                self._cluster(section, name, body)

    def _cluster(self, section: y.Section, name: str, body: y.Section) -> None:
        targets: dict[str, Target] = {}
        with self.attempt():
            node = body.node("targets")
            if not isinstance(node, yaml.SequenceNode) or not node.value:
                body.fail("targets", "must be a list of at least one  - {uarch: ..., partition: ...}")
            for index, item in enumerate(node.value):
                with self.attempt():
                    target = self._target(
                        y.Section(
                            self.file, f"clusters.{name}.targets.{index}.", item, y.line_of(item), DIALECT
                        )
                    )
                    if target.uarch in targets:
                        body.fail("targets", f"{target.uarch!r} is there twice", line=target.line)
                    targets[target.uarch] = target
        runner, no_bwrap = Runner(), False
        with self.attempt():
            runner = _runner(body)
        with self.attempt():
            no_bwrap = body.take("no_bwrap", y.truth, False)
        with self.attempt():
            body.end()
        # Also a cluster with a mistake in it is one: otherwise each `deploy` to it would be reported, too.
        self.found[name] = Cluster(name, section.line_of(name), MappingProxyType(targets), runner, no_bwrap)

    def _target(self, body: y.Section) -> Target:
        uarch = body.need("uarch", y.word)
        partition = body.take("partition", _optional, None)
        variables = body.take("variables", _variables, None) or {}
        body.end()
        return Target(uarch, partition, MappingProxyType(variables), body.line)

    def uenvs(self, document: y.Section) -> None:
        section, names = self.keys(document, "uenvs")
        for name in names:
            assert section is not None
            if not _is_word(name):
                self.add(section, name, "is no name of a uenv (letters, digits, '_', '.', '-')")
                continue
            versions_section, versions = self.keys(section, name, name)
            for version in versions:
                assert versions_section is not None
                about = f"{name}/{version}"
                if not _is_word(version):
                    self.add(
                        versions_section, version, "is no version (letters, digits, '_', '.', '-')", about
                    )
                    continue
                body, _ = self.keys(versions_section, version, about)
                if body is not None:
                    self._entry(name, version, versions_section.line_of(version), body)

    def _entry(self, name: str, version: str, line: int, body: y.Section) -> None:
        about = f"{name}/{version}"
        recipes: dict[str, Place] = {}
        deploy: dict[str, tuple[Place, ...]] = {}
        mount = Place(DEFAULT_MOUNT, line)
        if "recipes" not in body:
            self.add(body, "recipes", "is missing", about)
        section, uarchs = self.keys(body, "recipes", about)
        for uarch in uarchs:
            with self.attempt(about):
                assert section is not None
                if not _is_word(uarch):
                    section.fail(uarch, "is no name of a microarchitecture")
                recipes[uarch] = Place(section.need(uarch, _relative), section.line_of(uarch))
        section, clusters = self.keys(body, "deploy", about)
        for cluster in clusters:
            with self.attempt(about):
                assert section is not None
                deploy[cluster] = section.take(cluster, _places, ())
        with self.attempt(about):
            mount = Place(body.take("mount", _mount, DEFAULT_MOUNT), body.line_of("mount"))
        with self.attempt(about):
            body.take("develop", y.truth, False)
            body.end()
        self.entries.append(
            Entry(name, version, line, MappingProxyType(recipes), MappingProxyType(deploy), mount)
        )


def _runner(body: y.Section) -> Runner:
    node = body.node("runner")
    if node is None or y.is_null(node):
        return Runner()
    if isinstance(node, yaml.ScalarNode):
        if node.value != "f7t":
            body.fail(
                "runner", f"{node.value!r} is no runner", hint="f7t, or  {slurm-tag: ..., baremetal-tag: ...}"
            )
        return Runner()
    section = body.section("runner")
    runner = Runner(
        firecrest=False,
        slurm_tag=section.need("slurm-tag", y.text),
        baremetal_tag=section.take("baremetal-tag", _optional, None),
    )
    section.end()
    return runner


def _is_word(value: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value) is not None


def _optional(node: yaml.Node) -> str | None:
    return None if y.is_null(node) else y.text(node)


def _variables(node: yaml.Node) -> dict[str, str]:
    if y.is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of names to texts")  # noqa: TRY004  # the document's fault
    found: dict[str, str] = {}
    for key, value in node.value:
        if not _VARIABLE.fullmatch(str(key.value)):
            raise y.BadItem(f"{key.value!r} is no name of a variable", y.line_of(key))
        if not isinstance(value, yaml.ScalarNode):
            raise y.BadItem(f"the value of {key.value} must be a text", y.line_of(value))
        found[str(key.value)] = str(value.value)
    return found


def _relative(node: yaml.Node) -> str:
    value = y.text(node)
    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError(f"{value!r} is no directory below the recipes")
    return value


def _mount(node: yaml.Node) -> str:
    mount = clean_mount(y.text(node))
    if mount is None:
        raise ValueError(f"{getattr(node, 'value', '')!r} is no absolute path of a directory")
    return mount


def _places(node: yaml.Node) -> tuple[Place, ...]:
    if y.is_null(node):
        return ()
    return y.each(node, lambda item: Place(y.word(item), y.line_of(item)))
