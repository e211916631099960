"""``environments.yaml``: what all builders have in common, and the form of the builder ``python``."""

from __future__ import annotations

import re
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.publish.recipe.common import file_name
from uenvd.publish.recipe.model import Environment, View

LIST_VARIABLES: Final = frozenset(
    {
        "ACLOCAL_PATH", "CMAKE_PREFIX_PATH", "CPATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "MANPATH", "MODULEPATH", "PATH",
        "PKG_CONFIG_PATH", "PYTHONPATH",
    }
)  # fmt: skip
"""The variables that Stackinator treats as lists of paths: others cannot be prepended to, these cannot be set."""
SUBSTITUTIONS: Final = frozenset({"mount", "view_path", "view_name"})


def for_python(document: y.Section) -> tuple[Environment, ...]:
    """Read the environments of the builder ``python``: ``specs``, ``requirements``, ``views``."""
    result = []
    for name in document:
        section = named(document, name)
        found = views(section)
        if not found:
            section.fail("views", "is missing: without a view nobody can use the environment")
        result.append(
            Environment(
                name=name,
                line=document.line_of(name),
                specs=section.take("specs", lambda node: y.each(node, _requirement), ()),
                views=found,
                requirements=section.take("requirements", file_name, "requirements.lock"),
            )
        )
        section.end()
    if not result:
        document.fail("NAME", "is missing: there is no environment")
    return tuple(result)


def named(document: y.Section, name: str) -> y.Section:
    """Return the section of an environment, whose name must be one."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        document.fail(name, "is no name for an environment (letters, digits, '_', '.', '-')")
    return document.section(name)


def views(environment: y.Section) -> tuple[View, ...]:
    """Read ``views:`` of an environment; a view without a body is one with all defaults."""
    section = environment.section("views")
    result = []
    for name in section:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            section.fail(name, "is no name for a view (letters, digits, '_', '.', '-')")
        body = section.section(name)
        for key in ("exclude", "select"):
            body.take(key, lambda node: y.each(node, _spec_or_nothing), None)
        body.take("link", _link, "roots")
        body.take("link_type", y.word, None)
        body.section("projections")
        description = body.take("description", y.text, "")
        uenv = body.section("uenv")
        uenv.take("add_compilers", y.truth, True)
        prefix = uenv.section("prefix_paths")
        variables = uenv.section("env_vars")
        result.append(
            View(
                name=name,
                line=section.line_of(name),
                description=description,
                prefix_paths=tuple(
                    (key, prefix.take(key, y.texts, ())) for key in prefix if _list_variable(prefix, key)
                ),
                set=_assignments(variables, "set", may_be_list=False),
                prepend=_strings(variables, "prepend_path"),
                append=_strings(variables, "append_path"),
                has_environment="uenv" in body,
            )
        )
        for part in (variables, uenv, body):
            part.end()
    return tuple(result)


def _list_variable(section: y.Section, key: str) -> bool:
    if key not in LIST_VARIABLES:
        section.fail(
            key,
            "is no list of paths that can be added to",
            hint=f"there are: {', '.join(sorted(LIST_VARIABLES))}",
        )
    return True


def _strings(variables: y.Section, key: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, value) for name, value in _assignments(variables, key, may_be_list=True) if value is not None
    )


def _assignments(variables: y.Section, key: str, *, may_be_list: bool) -> tuple[tuple[str, str | None], ...]:
    """Read a list of one-key maps."""
    node = variables.node(key)
    if node is None or y.is_null(node):
        return ()
    if not isinstance(node, yaml.SequenceNode):
        variables.fail(key, "must be a list of  - NAME: value")
    result: list[tuple[str, str | None]] = []
    for item in node.value:
        line = y.line_of(item)
        if not isinstance(item, yaml.MappingNode) or len(item.value) != 1:
            variables.fail(key, "must be a list of  - NAME: value", line=line)
        name_node, value_node = item.value[0]
        name = str(name_node.value)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            variables.fail(key, f"{name!r} is no name of a variable", line=line)
        if may_be_list and name not in LIST_VARIABLES:
            variables.fail(
                key,
                f"{name} is no list of paths",
                line=line,
                hint=f"lists: {', '.join(sorted(LIST_VARIABLES))}",
            )
        if y.is_null(value_node):
            if may_be_list:
                variables.fail(key, f"{name} has no value", line=line)
            result.append((name, None))
            continue
        if not may_be_list and name in LIST_VARIABLES:
            variables.fail(
                key, f"{name} is a list of paths: it can be unset (null) or added to, not set", line=line
            )
        if not isinstance(value_node, yaml.ScalarNode):
            variables.fail(key, f"the value of {name} must be a text", line=line)
        value = str(value_node.value)
        for unknown in set(re.findall(r"\$@(\w*)@", value)) - SUBSTITUTIONS:
            variables.fail(
                key,
                f"$@{unknown}@ is no substitution",
                line=line,
                hint="there are: $@mount@, $@view_path@, $@view_name@",
            )
        result.append((name, value))
    return tuple(result)


def _spec_or_nothing(node: yaml.Node) -> str:
    """Convert an item of ``select`` and ``exclude``; an empty text, which Stackinator allows, selects nothing."""
    return "" if isinstance(node, yaml.ScalarNode) and node.value == "" else y.text(node)


def _link(node: yaml.Node) -> str:
    value = y.text(node)
    if value not in {"roots", "all", "run"}:
        raise ValueError(f"{value!r} is not one of: roots, all, run")
    return value


def _requirement(node: yaml.Node) -> str:
    value = y.text(node)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!_-]+)?", value):
        raise ValueError(f"{value!r} is no requirement of the form name or name==version")
    return value
